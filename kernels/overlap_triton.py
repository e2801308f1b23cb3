"""Dependent launch inside of Triton kernels; see `overlap`.

A kernel that may be launched so calls `begin` first and `wait` before it reads or writes what kernels before it wrote
or read. Every program waits, also one that has nothing to do: the kernel after this one relies on all kernels before it
having ended. What is allocated for a result may still be read as something else, so writes wait too.
"""
# ruff: noqa: ANN201 -- triton.jit reads annotations
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """Lets the next kernel start, which waits by itself where it needs this one's results."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """Waits until the kernels before this one have ended, and what they wrote can be read."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
