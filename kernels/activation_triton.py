"""The gated activation in Triton, for CUDA: a program takes a piece of one row.

Graph-safe: the grid depends on shapes alone, nothing waits for the device. May be launched dependently
(`overlap_triton`). Not tuned on a GPU yet.
"""
# ruff: noqa: ANN001, ANN202 -- triton.jit reads annotations, and has none for pointers

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import launches_dependently
from .overlap_triton import begin, wait

# Bytes of gate and of up that a program takes: one load of 16 bytes each for a thread of four warps.
_TILE_BYTES = 2048


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See `activation.silu_and_mul`."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows == 0 or width == 0:
        return out
    tile = _TILE_BYTES // gate_up.element_size()
    dependent = launches_dependently(gate_up.device)
    _silu_and_mul_kernel[(num_rows, triton.cdiv(width, tile))](
        out,
        gate_up,
        gate_up.stride(0),
        WIDTH=width,
        TILE=tile,
        DEPENDENT=dependent,
        num_warps=4,
        launch_pdl=dependent,
    )
    return out


@triton.jit
def _silu_and_mul_kernel(
    out_ptr, gate_up_ptr, gate_up_stride, WIDTH: tl.constexpr, TILE: tl.constexpr, DEPENDENT: tl.constexpr
):
    """Activate one piece of a row: out = round(gate / (1 + exp(-gate))) * up.

    Grid: (num_rows, tiles of the width).
    """
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    wait(DEPENDENT)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < WIDTH
    row_ptr = gate_up_ptr + row * gate_up_stride
    gate = tl.load(row_ptr + columns, mask=mask, other=0.0)
    up = tl.load(row_ptr + WIDTH + columns, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    out = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
