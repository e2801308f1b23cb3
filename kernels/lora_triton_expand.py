"""The Triton kernel of LoRA's expand, affine included; `lora_triton_segments` says how rows are divided."""
# ruff: noqa: ANN001, ANN201, ANN202 -- triton.jit reads annotations, and has none for pointers
# mypy: ignore-errors

import triton
import triton.language as tl

from .lora_triton_segments import ALIGNMENT, find_segment
from .overlap_triton import begin, wait


@triton.jit
def _expand_row_(
    y_ptr,
    h_ptr,
    b_ptr,
    gain_ptr,
    row,
    y_stride,
    h_stride,
    h_stride_split,
    rank,
    columns,
    width,
    total_width,
    has_affine,
    AFFINE: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    column_mask = columns < width
    ranks = tl.arange(0, TILE_RANKS)
    b_ptrs = b_ptr + ranks.to(tl.int64)[:, None] * width + columns[None, :]
    b_mask = (ranks < rank)[:, None] & column_mask[None, :]
    b = tl.load(b_ptrs, mask=b_mask, other=0.0, eviction_policy="evict_first")
    if AFFINE:
        gain = tl.load(gain_ptr + columns, mask=column_mask & has_affine, other=1.0).to(tl.float32)
        offset = tl.load(gain_ptr + total_width + columns, mask=column_mask & has_affine, other=0.0).to(tl.float32)
    wait(DEPENDENT)
    y_ptrs = y_ptr + row.to(tl.int64) * y_stride + columns
    y = tl.load(y_ptrs, mask=column_mask, other=0.0).to(tl.float32)
    splits = tl.arange(0, PADDED_SPLITS)
    h_ptrs = h_ptr + row.to(tl.int64) * h_stride + splits.to(tl.int64)[:, None] * h_stride_split
    split_mask = (splits < NUM_SPLITS)[:, None]
    h = tl.sum(tl.load(h_ptrs + ranks[None, :], mask=split_mask & (ranks < rank)[None, :], other=0.0), axis=0)
    delta = tl.sum(h.to(b.dtype).to(tl.float32)[:, None] * b.to(tl.float32), axis=0)
    for c in range(TILE_RANKS, rank, TILE_RANKS):
        ranks = c + tl.arange(0, TILE_RANKS)
        b_ptrs = b_ptr + ranks.to(tl.int64)[:, None] * width + columns[None, :]
        b_mask = (ranks < rank)[:, None] & column_mask[None, :]
        b = tl.load(b_ptrs, mask=b_mask, other=0.0, eviction_policy="evict_first")
        h = tl.sum(tl.load(h_ptrs + ranks[None, :], mask=split_mask & (ranks < rank)[None, :], other=0.0), axis=0)
        delta += tl.sum(h.to(b.dtype).to(tl.float32)[:, None] * b.to(tl.float32), axis=0)
    if AFFINE:
        y = y * gain + offset
    tl.store(y_ptrs, (y + delta).to(y_ptr.dtype.element_ty), mask=column_mask)


@triton.jit
def _expand_rows_(
    y_ptr,
    h_ptr,
    b_ptr,
    gain_ptr,
    rows,
    row_mask,
    y_stride,
    h_stride,
    h_stride_split,
    rank,
    columns,
    width,
    total_width,
    has_affine,
    AFFINE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    column_mask = columns < width
    acc = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    h_rows_ptr = h_ptr + rows.to(tl.int64)[:, None] * h_stride
    wait(DEPENDENT)
    for c in range(0, rank, TILE_RANKS):
        ranks = c + tl.arange(0, TILE_RANKS)
        h_mask = row_mask[:, None] & (ranks < rank)[None, :]
        h = tl.load(h_rows_ptr + ranks[None, :], mask=h_mask, other=0.0)
        for s in tl.static_range(1, NUM_SPLITS):
            h += tl.load(h_rows_ptr + s * h_stride_split + ranks[None, :], mask=h_mask, other=0.0)
        b_ptrs = b_ptr + ranks.to(tl.int64)[:, None] * width + columns[None, :]
        b = tl.load(b_ptrs, mask=(ranks < rank)[:, None] & column_mask[None, :], other=0.0)
        acc = tl.dot(h.to(b.dtype), b, acc, input_precision="ieee")
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    y_mask = row_mask[:, None] & column_mask[None, :]
    y = tl.load(y_ptrs, mask=y_mask, other=0.0).to(tl.float32)
    if AFFINE:
        gain = tl.load(gain_ptr + columns, mask=column_mask & has_affine, other=1.0).to(tl.float32)
        offset = tl.load(gain_ptr + total_width + columns, mask=column_mask & has_affine, other=0.0).to(tl.float32)
        y = y * gain[None, :] + offset[None, :]
    tl.store(y_ptrs, (y + acc).to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit
def _expand_tile_(
    y_ptr,
    h_ptr,
    b_ptr,
    gain_ptr,
    first_row,
    end,
    y_stride,
    h_stride,
    h_stride_split,
    rank,
    columns,
    width,
    total_width,
    has_affine,
    AFFINE: tl.constexpr,
    ROWS_APART: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if ROWS_APART and first_row + 1 == end:
        _expand_row_(
            y_ptr, h_ptr, b_ptr, gain_ptr, first_row, y_stride, h_stride, h_stride_split, rank, columns, width,
            total_width, has_affine, AFFINE, TILE_RANKS, NUM_SPLITS, PADDED_SPLITS, DEPENDENT,
        )  # fmt: skip
    else:
        rows = first_row + tl.arange(0, TILE_ROWS)
        _expand_rows_(
            y_ptr, h_ptr, b_ptr, gain_ptr, rows, rows < end, y_stride, h_stride, h_stride_split, rank, columns, width,
            total_width, has_affine, AFFINE, TILE_ROWS, TILE_COLUMNS, TILE_RANKS, NUM_SPLITS, DEPENDENT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_segments", "num_tokens", "h_stride", "h_stride_split"])
def expand_kernel(
    y_ptr,
    h_ptr,
    arena_ptr,
    offsets_ptr,
    ranks_ptr,
    affines_ptr,
    seg_starts_ptr,
    seg_slots_ptr,
    num_tokens,
    num_segments,
    in_features,
    y_stride,
    h_stride,
    h_stride_split,
    ranks_stride_slot,
    ranks_stride_slice,
    SLICE_WIDTHS: tl.constexpr,
    SLICE_COLUMNS: tl.constexpr,
    SLICE_TILES: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    ROWS_APART: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """y[t, n] = y[t, n] * gain + offset + sum over c of h[t, c] B_slot(t)[n, c], for the slice that n belongs to.

    h is the sum of NUM_SPLITS partial sums. `affines_ptr` is None where no slot has gains and offsets, which compiles a
    kernel that knows none. Grid: (column tiles of all slices, row tiles), so that programs without a row come last.
    Slice s has the column tiles [SLICE_TILES[s], SLICE_TILES[s + 1]), its first column in y is SLICE_COLUMNS[s].
    Programs without an adapted row or slice leave y alone.
    """
    begin(DEPENDENT)
    _segment, slot, first_row, end = find_segment(
        tl.program_id(1), seg_starts_ptr, seg_slots_ptr, num_segments, num_tokens, TILE_ROWS, PADDED_SEGMENTS
    )
    if first_row >= end or slot < 0:
        wait(DEPENDENT)
        return

    tile = tl.program_id(0)
    rank, first_rank, b_start = 0, 0, tl.zeros((), tl.int64)
    width, first_column, first_tile = SLICE_WIDTHS[0], 0, 0
    rank_sum, b_sum = 0, tl.zeros((), tl.int64)
    offset = tl.load(offsets_ptr + slot)
    affine = tl.full((), -1, tl.int64)
    if affines_ptr is not None:
        affine = tl.load(affines_ptr + slot)
    for s in tl.static_range(NUM_SLICES):
        slice_rank = tl.load(ranks_ptr + slot.to(tl.int64) * ranks_stride_slot + s * ranks_stride_slice)
        if tile >= SLICE_TILES[s]:  # true for all slices up to the tile's own, which thus has the last word
            rank, first_rank, b_start = slice_rank, rank_sum, b_sum
            width, first_column, first_tile = SLICE_WIDTHS[s], SLICE_COLUMNS[s], SLICE_TILES[s]
        rank_sum += slice_rank
        b_sum += slice_rank.to(tl.int64) * SLICE_WIDTHS[s]
    if rank == 0 and affine < 0:
        wait(DEPENDENT)
        return

    columns = (tile - first_tile) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    y_ptr += first_column
    h_ptr += first_rank
    # A slot has no offset where it has no rank.
    b_offset = rank_sum.to(tl.int64) * in_features + b_start  # in the block: B lies behind A
    offset = tl.maximum(offset, 0)
    has_affine = affine >= 0
    affine = tl.maximum(affine, 0)
    total_width = SLICE_COLUMNS[NUM_SLICES]
    if offset % ALIGNMENT == 0 and affine % ALIGNMENT == 0:
        b_ptr = arena_ptr + (offset // ALIGNMENT * ALIGNMENT + b_offset)
        gain_ptr = arena_ptr + (affine // ALIGNMENT * ALIGNMENT + first_column)
        _expand_tile_(
            y_ptr, h_ptr, b_ptr, gain_ptr, first_row, end, y_stride, h_stride, h_stride_split, rank, columns, width,
            total_width, has_affine, affines_ptr is not None, ROWS_APART, TILE_ROWS, TILE_COLUMNS, TILE_RANKS,
            NUM_SPLITS, PADDED_SPLITS, DEPENDENT,
        )  # fmt: skip
    else:
        b_ptr = arena_ptr + (offset + b_offset)
        gain_ptr = arena_ptr + (affine + first_column)
        _expand_tile_(
            y_ptr, h_ptr, b_ptr, gain_ptr, first_row, end, y_stride, h_stride, h_stride_split, rank, columns, width,
            total_width, has_affine, affines_ptr is not None, ROWS_APART, TILE_ROWS, TILE_COLUMNS, TILE_RANKS,
            NUM_SPLITS, PADDED_SPLITS, DEPENDENT,
        )  # fmt: skip
