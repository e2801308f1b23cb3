"""The Triton kernels of LoRA shrink, expand and affine; `lora_triton` launches them, and tells how the work is divided.

Tiles of rows are numbered without a prefix sum: segment g starts with tile `seg_starts[g] // TILE_ROWS + g`. That
leaves room for its ceil(length / TILE_ROWS) tiles, wastes at most one number a segment, and bounds the grid by
`num_tokens // TILE_ROWS + num_segments`. Running example with 16 rows a tile, segments of 3, 40 and 1 rows: they start
with tiles 0, 0 + 1 and 2 + 2, so tile 0 is segment 0, tiles 1 to 3 are segment 1 and tile 4 is segment 2.
"""
# ruff: noqa: ANN001, ANN201, ANN202 -- triton.jit reads annotations, and has none for pointers
# mypy: ignore-errors

import triton
import triton.language as tl

# Elements in 16 bytes of a 16-bit dtype: what a block must be aligned to for the widest loads.
_ALIGNMENT = tl.constexpr(8)


@triton.jit
def _find_segment(tile, seg_starts_ptr, num_segments, TILE_ROWS: tl.constexpr, PADDED_SEGMENTS: tl.constexpr):
    """Returns the segment that the row tile belongs to, and the tile's first row, which may lie behind its end."""
    segments = tl.arange(0, PADDED_SEGMENTS)
    starts = tl.load(seg_starts_ptr + segments, mask=segments < num_segments, other=0)
    begun = (segments < num_segments) & (starts // TILE_ROWS + segments <= tile)
    segment = tl.sum(begun.to(tl.int32), axis=0) - 1
    start = tl.load(seg_starts_ptr + segment)
    return segment, start + (tile - start // TILE_ROWS - segment) * TILE_ROWS


@triton.jit
def _shrink_tile(
    x_ptr,
    a_ptr,
    rows,
    row_mask,
    x_stride,
    rank_rows,
    rank,
    in_features,
    k_start,
    TILE_ROWS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Returns x[rows, k_start : k_start + SPLIT_K] @ A[rank_rows, the same]^T."""
    acc = tl.zeros((TILE_ROWS, TILE_RANKS), tl.float32)
    x_rows_ptr = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    a_rows_ptr = a_ptr + rank_rows.to(tl.int64)[:, None] * in_features
    for k in range(k_start, tl.minimum(k_start + SPLIT_K, in_features), TILE_K):
        columns = k + tl.arange(0, TILE_K)
        column_mask = columns[None, :] < in_features
        x = tl.load(x_rows_ptr + columns[None, :], mask=row_mask[:, None] & column_mask, other=0.0)
        a = tl.load(a_rows_ptr + columns[None, :], mask=(rank_rows < rank)[:, None] & column_mask, other=0.0)
        acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
    return acc


# Not specialized: what varies from step to step would compile anew when it becomes 1 or a multiple of 16.
@triton.jit(do_not_specialize=["num_tokens", "num_segments", "max_rank"])
def shrink_kernel(
    out_ptr,
    x_ptr,
    arena_ptr,
    offsets_ptr,
    ranks_ptr,
    seg_starts_ptr,
    seg_slots_ptr,
    seg_weights_ptr,
    num_tokens,
    num_segments,
    in_features,
    max_rank,
    x_stride,
    ranks_stride_slot,
    ranks_stride_slice,
    NUM_SLICES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
):
    """out[split, t, c] = sum over the split's k of x[t, k] A_slot(t)[c, k], zero where the slot has no rank row c.

    Grid: (row tiles, rank tiles, splits). Together the programs write all of out [splits, num_tokens, max_rank].
    `seg_weights_ptr` is None where no segment has a weight, which compiles a kernel that knows none.
    """
    segment, first_row = _find_segment(tl.program_id(0), seg_starts_ptr, num_segments + 1, TILE_ROWS, PADDED_SEGMENTS)
    end = num_tokens
    slot = -1
    if segment < num_segments:
        end = tl.load(seg_starts_ptr + segment + 1)
        slot = tl.load(seg_slots_ptr + segment)
    if first_row >= end:
        return

    rank = 0
    if slot >= 0:
        for s in tl.static_range(NUM_SLICES):
            rank += tl.load(ranks_ptr + slot.to(tl.int64) * ranks_stride_slot + s * ranks_stride_slice)
    rows = first_row + tl.arange(0, TILE_ROWS)
    row_mask = rows < end
    first_rank = tl.program_id(1) * TILE_RANKS
    rank_rows = first_rank + tl.arange(0, TILE_RANKS)
    acc = tl.zeros((TILE_ROWS, TILE_RANKS), tl.float32)
    if first_rank < rank:
        offset = tl.load(offsets_ptr + slot)
        k_start = tl.program_id(2) * SPLIT_K
        # The compiler can't know how a block is aligned, and would load 2 bytes at a time. The product with the
        # constant tells it, without a promise that an arena could break.
        if offset % _ALIGNMENT == 0:
            a_ptr = arena_ptr + offset // _ALIGNMENT * _ALIGNMENT
            acc = _shrink_tile(
                x_ptr, a_ptr, rows, row_mask, x_stride, rank_rows, rank, in_features, k_start,
                TILE_ROWS, TILE_RANKS, TILE_K, SPLIT_K,
            )  # fmt: skip
        else:
            a_ptr = arena_ptr + offset
            acc = _shrink_tile(
                x_ptr, a_ptr, rows, row_mask, x_stride, rank_rows, rank, in_features, k_start,
                TILE_ROWS, TILE_RANKS, TILE_K, SPLIT_K,
            )  # fmt: skip
        if seg_weights_ptr is not None:
            acc *= tl.load(seg_weights_ptr + segment)
    out_rows = tl.program_id(2).to(tl.int64) * num_tokens + rows
    out_mask = row_mask[:, None] & (rank_rows < max_rank)[None, :]
    tl.store(out_ptr + out_rows[:, None] * max_rank + rank_rows[None, :], acc, mask=out_mask)


@triton.jit
def _expand_tile(
    h_ptr,
    b_ptr,
    rows,
    row_mask,
    h_stride,
    rank,
    columns,
    width,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
):
    """Returns h[rows, :rank] @ B^T[:rank, columns], where h_ptr points at the slice's first column."""
    acc = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for first_rank in range(0, rank, TILE_RANKS):
        rank_rows = first_rank + tl.arange(0, TILE_RANKS)
        rank_mask = rank_rows < rank
        h = tl.load(
            h_ptr + rows.to(tl.int64)[:, None] * h_stride + rank_rows[None, :],
            mask=row_mask[:, None] & rank_mask[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + rank_rows.to(tl.int64)[:, None] * width + columns[None, :],
            mask=rank_mask[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        acc = tl.dot(h.to(b.dtype), b, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_segments", "h_stride"])
def expand_kernel(
    y_ptr,
    h_ptr,
    arena_ptr,
    offsets_ptr,
    ranks_ptr,
    seg_starts_ptr,
    seg_slots_ptr,
    num_segments,
    in_features,
    y_stride,
    h_stride,
    ranks_stride_slot,
    ranks_stride_slice,
    SLICE_WIDTHS: tl.constexpr,
    SLICE_COLUMNS: tl.constexpr,
    SLICE_TILES: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
):
    """y[t, n] += sum over c of h[t, c] B_slot(t)[n, c], for the slice that column n belongs to.

    Grid: (row tiles, column tiles of all slices). Slice s has the column tiles [SLICE_TILES[s], SLICE_TILES[s + 1]),
    its first column in y is SLICE_COLUMNS[s]. Programs without an adapted row or slice leave y alone.
    """
    segment, first_row = _find_segment(tl.program_id(0), seg_starts_ptr, num_segments, TILE_ROWS, PADDED_SEGMENTS)
    end = tl.load(seg_starts_ptr + segment + 1)
    slot = tl.load(seg_slots_ptr + segment)
    if first_row >= end or slot < 0:
        return

    tile = tl.program_id(1)
    rank, first_rank, b_start = 0, 0, tl.zeros((), tl.int64)
    width, first_column, first_tile = SLICE_WIDTHS[0], 0, 0
    rank_sum, b_sum = 0, tl.zeros((), tl.int64)
    for s in tl.static_range(NUM_SLICES):
        slice_rank = tl.load(ranks_ptr + slot.to(tl.int64) * ranks_stride_slot + s * ranks_stride_slice)
        if tile >= SLICE_TILES[s]:  # true for all slices up to the tile's own, which thus has the last word
            rank, first_rank, b_start = slice_rank, rank_sum, b_sum
            width, first_column, first_tile = SLICE_WIDTHS[s], SLICE_COLUMNS[s], SLICE_TILES[s]
        rank_sum += slice_rank
        b_sum += slice_rank.to(tl.int64) * SLICE_WIDTHS[s]
    if rank == 0:
        return

    rows = first_row + tl.arange(0, TILE_ROWS)
    row_mask = rows < end
    columns = (tile - first_tile) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    h_slice_ptr = h_ptr + first_rank
    offset = tl.load(offsets_ptr + slot)
    b_offset = rank_sum.to(tl.int64) * in_features + b_start  # in the block: B lies behind A
    if offset % _ALIGNMENT == 0:  # as in shrink_kernel
        b_ptr = arena_ptr + (offset // _ALIGNMENT * _ALIGNMENT + b_offset)
        acc = _expand_tile(
            h_slice_ptr, b_ptr, rows, row_mask, h_stride, rank, columns, width, TILE_ROWS, TILE_COLUMNS, TILE_RANKS
        )
    else:
        b_ptr = arena_ptr + (offset + b_offset)
        acc = _expand_tile(
            h_slice_ptr, b_ptr, rows, row_mask, h_stride, rank, columns, width, TILE_ROWS, TILE_COLUMNS, TILE_RANKS
        )
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * y_stride + (first_column + columns)[None, :]
    y_mask = row_mask[:, None] & (columns < width)[None, :]
    y = tl.load(y_ptrs, mask=y_mask, other=0.0)
    tl.store(y_ptrs, (y.to(tl.float32) + acc).to(y_ptr.dtype.element_ty), mask=y_mask)


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


@triton.jit(do_not_specialize=["num_segments"])
def affine_kernel(
    y_ptr,
    arena_ptr,
    offsets_ptr,
    seg_starts_ptr,
    seg_slots_ptr,
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
    segment, first_row = _find_segment(tl.program_id(0), seg_starts_ptr, num_segments, TILE_ROWS, PADDED_SEGMENTS)
    end = tl.load(seg_starts_ptr + segment + 1)
    slot = tl.load(seg_slots_ptr + segment)
    if first_row >= end or slot < 0:
        return
    offset = tl.load(offsets_ptr + slot)
    if offset < 0:
        return

    rows = first_row + tl.arange(0, TILE_ROWS)
    row_mask = rows < end
    first_column = tl.program_id(1) * TILE_COLUMNS
    if offset % _ALIGNMENT == 0:  # as in shrink_kernel
        gain_ptr = arena_ptr + offset // _ALIGNMENT * _ALIGNMENT
        _affine_tile_(y_ptr, gain_ptr, rows, row_mask, y_stride, first_column, width, TILE_COLUMNS)
    else:
        gain_ptr = arena_ptr + offset
        _affine_tile_(y_ptr, gain_ptr, rows, row_mask, y_stride, first_column, width, TILE_COLUMNS)
