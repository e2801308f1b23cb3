"""RMS norm of rows, alone or with the residual add in front of it: `lorikeet::rms_norm` and `lorikeet::add_rms_norm_`.

    norm(x) = round(x / sqrt(mean(x^2) + eps)) * weight

computed in fp32; `round` is to the dtype of x, and so is the product with the weight, and a sum with the residual is
rounded before it is normalized. These are the rounding points of transformers' Llama, Mistral, Qwen2 and Qwen3 (5.23,
`LlamaRMSNorm`), so that only the order of the additions in the mean differs.

This file owns schemas, contract, the CPU implementation and the reference; CUDA's is in `norm_triton`. Called on the
step thread, twice a layer.
"""

from functools import lru_cache

import torch
from torch import Tensor

from .contract import check

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

torch.library.define(
    "lorikeet::rms_norm", "(Tensor x, Tensor weight, float eps, Tensor? residual=None, Tensor? rows=None) -> Tensor"
)
torch.library.define("lorikeet::add_rms_norm_", "(Tensor(a!) residual, Tensor x, Tensor weight, float eps) -> Tensor")


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """Computes norm(x) or norm(x + residual), of all rows or of some.

    Args:
        x: [num_rows, width], float32, bfloat16 or float16, rows contiguous.
        weight: [width], dtype of `x`, contiguous.
        eps: added to the mean of the squares.
        residual: as `x`; left as it is.
        rows: int64 [n], the rows whose norm is wanted, each below num_rows; None: all.

    Returns:
        [n or num_rows, width], dtype of `x`, contiguous.

    Raises:
        RuntimeError: a shape, dtype or layout is not as above.
    """
    # On a CPU the dispatcher and the checks would take longer than the norm of a few rows.
    if x.is_cpu and not torch.compiler.is_compiling():
        return _rms_norm(x, weight, eps, residual, rows)
    return torch.ops.lorikeet.rms_norm.default(x, weight, eps, residual, rows)


def add_rms_norm_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to the residual in place and computes the norm of the sum.

    Args:
        residual: [num_rows, width], float32, bfloat16 or float16, rows contiguous. Mutated.
        x: as `residual`.
        weight: [width], dtype of `residual`, contiguous.
        eps: added to the mean of the squares.

    Returns:
        [num_rows, width], dtype of `residual`, contiguous.

    Raises:
        RuntimeError: a shape, dtype or layout is not as above.
    """
    if x.is_cpu and not torch.compiler.is_compiling():
        return scale_rows(residual.add_(x), weight, eps)
    return torch.ops.lorikeet.add_rms_norm_.default(residual, x, weight, eps)


def scale_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """norm(x) over the last dimension of a CPU tensor, in few torch calls.

    1 to 32 rows of 576 in fp32 take 60 % of `F.rms_norm`'s time (one thread, AVX2, torch 2.13, 2026-11-22).
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    factor = torch.addcmul(_scalar(eps), length, length, value=1 / x.shape[-1]).rsqrt_()
    if x.dtype == torch.float32:
        return torch.mul(x, factor).mul_(weight)
    rounded = torch.empty(x.shape, dtype=x.dtype)
    return torch.mul(x, factor, out=rounded).mul_(weight)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """norm(x) as transformers writes it; the oracle of the tests."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


@lru_cache
def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None, rows: Tensor | None) -> None:
    check(x.dtype in _FLOATS, lambda: f"expected float32, bfloat16 or float16, got {x.dtype}")
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None:
            check(
                tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.shape == x.shape and tensor.dtype == x.dtype,
                lambda n=name, t=tensor: (
                    f"{n} must be {x.dtype} {list(x.shape)} with contiguous rows,"
                    f" got {t.dtype} {list(t.shape)}, strides {list(t.stride())}"
                ),
            )
    check(
        weight.shape == x.shape[1:] and weight.dtype == x.dtype and weight.is_contiguous(),
        lambda: f"weight must be {x.dtype} {list(x.shape[1:])}, contiguous, got {weight.dtype} {list(weight.shape)}",
    )
    if rows is not None:
        check(
            rows.dtype == torch.int64 and rows.dim() == 1 and rows.is_contiguous(),
            lambda: f"rows must be int64 [n], contiguous, got {rows.dtype} {list(rows.shape)}",
        )


def _rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, rows: Tensor | None) -> Tensor:
    if rows is not None:
        x = x.index_select(0, rows)
        residual = None if residual is None else residual.index_select(0, rows)
    return scale_rows(x if residual is None else x + residual, weight, eps)


def _rms_norm_cpu(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    _check(x, weight, residual, rows)
    return _rms_norm(x, weight, eps, residual, rows)


def _rms_norm_cuda(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    from . import norm_triton  # CPU-only installs have no Triton

    _check(x, weight, residual, rows)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments are on
        return norm_triton.rms_norm(x, weight, eps, residual, rows)


def _rms_norm_fake(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    _check(x, weight, residual, rows)
    return x.new_empty(x.shape if rows is None else (rows.shape[0], x.shape[1]))


def _add_rms_norm_cpu_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, weight, residual, None)
    return scale_rows(residual.add_(x), weight, eps)


def _add_rms_norm_cuda_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from . import norm_triton

    _check(x, weight, residual, None)
    with torch.cuda.device_of(x):
        return norm_triton.add_rms_norm_(residual, x, weight, eps)


def _add_rms_norm_fake_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, weight, residual, None)
    return x.new_empty(x.shape)


torch.library.impl("lorikeet::rms_norm", "CPU", _rms_norm_cpu)
torch.library.impl("lorikeet::rms_norm", "CUDA", _rms_norm_cuda)
torch.library.register_fake("lorikeet::rms_norm", _rms_norm_fake)
torch.library.impl("lorikeet::add_rms_norm_", "CPU", _add_rms_norm_cpu_)
torch.library.impl("lorikeet::add_rms_norm_", "CUDA", _add_rms_norm_cuda_)
torch.library.register_fake("lorikeet::add_rms_norm_", _add_rms_norm_fake_)
