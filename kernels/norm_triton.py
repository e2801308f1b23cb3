"""RMS norm in Triton, for CUDA: a program takes one row whole, so that it is read once.

Graph-safe: the grid is the number of rows, nothing waits for the device. May be launched dependently
(`overlap_triton`). Not tuned on a GPU yet.
"""
# ruff: noqa: ANN001, ANN202 -- triton.jit reads annotations, and has none for pointers

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import launches_dependently
from .overlap_triton import begin, wait

# Elements of a row for each warp: two loads of 16 bytes a thread at 16 bit. A decode step has too few rows to fill a
# GPU, so what counts is that one row's loads are all in flight at once.
_ELEMENTS_PER_WARP = 512
_MAX_WARPS = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, rows: Tensor | None) -> Tensor:
    """See `norm.rms_norm`."""
    out = torch.empty((x.shape[0] if rows is None else rows.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    _launch(out, x, weight, eps, residual, rows, write_residual=False)
    return out


def add_rms_norm_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `norm.add_rms_norm_`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(out, x, weight, eps, residual, None, write_residual=True)
    return out


def _launch(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    rows: Tensor | None,
    *,
    write_residual: bool,
) -> None:
    num_rows, width = out.shape
    if num_rows == 0:
        return
    padded = max(16, triton.next_power_of_2(width))
    dependent = launches_dependently(x.device)
    _rms_norm_kernel[(num_rows,)](
        out,
        x,
        weight,
        # Unused without a residual or rows, but an argument needs some tensor.
        x if residual is None else residual,
        x if rows is None else rows,
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        eps,
        WIDTH=width,
        PADDED_WIDTH=padded,
        ADD=residual is not None,
        WRITE_RESIDUAL=write_residual,
        SELECT=rows is not None,
        DEPENDENT=dependent,
        num_warps=min(_MAX_WARPS, max(1, padded // _ELEMENTS_PER_WARP)),
        launch_pdl=dependent,
    )


@triton.jit
def _rms_norm_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    residual_ptr,
    rows_ptr,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    WRITE_RESIDUAL: tl.constexpr,
    SELECT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Normalize one row a program: out[i] = round(s / sqrt(mean(s^2) + eps)) * weight.

    s = x[r] or, with ADD, round(x[r] + residual[r]), where r = rows[i] with SELECT and otherwise i.
    """
    begin(DEPENDENT)
    target = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED_WIDTH)
    mask = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    wait(DEPENDENT)
    row = target
    if SELECT:
        row = tl.load(rows_ptr + target)
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    if ADD:
        residual_row_ptr = residual_ptr + row * residual_stride
        residual = tl.load(residual_row_ptr + columns, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        if WRITE_RESIDUAL:
            tl.store(residual_row_ptr + columns, x, mask=mask)
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    normed = (wide * factor).to(x.dtype)
    out = normed.to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + target * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
