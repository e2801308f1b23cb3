"""The Triton kernel of LoRA's affine where no expand follows; `lora_triton_segments` says how rows are divided."""
# ruff: noqa: ANN001, ANN201, ANN202 -- triton.jit reads annotations, and has none for pointers
# mypy: ignore-errors

import triton
import triton.language as tl

from .lora_triton_segments import ALIGNMENT, find_segment


@triton.jit
def _affine_tile_(y_ptr, gain_ptr, rows, row_mask, y_stride, first_column, width, TILE_COLUMNS: tl.constexpr):
    columns = first_column + tl.arange(0, TILE_COLUMNS)
    column_mask = columns < width
    gain = tl.load(gain_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    offset = tl.load(gain_ptr + width + columns, mask=column_mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    y_mask = row_mask[:, None] & column_mask[None, :]
    y = tl.load(y_ptrs, mask=y_mask, other=0.0).to(tl.float32) * gain[None, :] + offset[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=["num_tokens", "num_segments"])
def affine_kernel(
    y_ptr,
    arena_ptr,
    offsets_ptr,
    seg_starts_ptr,
    seg_slots_ptr,
    num_tokens,
    num_segments,
    width,
    y_stride,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
):
    """y[t, n] = y[t, n] * arena[offset + n] + arena[offset + width + n], with the offset of t's slot.

    Grid: (row tiles, column tiles). Programs without a row whose slot has an offset leave y alone.
    """
    _segment, slot, first_row, end = find_segment(
        tl.program_id(0), seg_starts_ptr, seg_slots_ptr, num_segments, num_tokens, TILE_ROWS, PADDED_SEGMENTS
    )
    if first_row >= end or slot < 0:
        return
    offset = tl.load(offsets_ptr + slot)
    if offset < 0:
        return

    rows = first_row + tl.arange(0, TILE_ROWS)
    row_mask = rows < end
    first_column = tl.program_id(1) * TILE_COLUMNS
    if offset % ALIGNMENT == 0:
        gain_ptr = arena_ptr + offset // ALIGNMENT * ALIGNMENT
        _affine_tile_(y_ptr, gain_ptr, rows, row_mask, y_stride, first_column, width, TILE_COLUMNS)
    else:
        gain_ptr = arena_ptr + offset
        _affine_tile_(y_ptr, gain_ptr, rows, row_mask, y_stride, first_column, width, TILE_COLUMNS)
