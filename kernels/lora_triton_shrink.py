"""The Triton kernel of LoRA's shrink; `lora_triton_segments` says how rows are divided."""
# ruff: noqa: ANN001, ANN201, ANN202 -- triton.jit reads annotations, and has none for pointers
# mypy: ignore-errors

import triton
import triton.language as tl

from .lora_triton_segments import ALIGNMENT, find_segment
from .overlap_triton import begin, wait


@triton.jit
def shrink_row(
    x_ptr,
    a_ptr,
    row,
    x_stride,
    rank_rows,
    rank,
    in_features,
    k_start,
    TILE_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Returns A[rank_rows, k_start : k_start + SPLIT_K] . x[row, the same]: [len(rank_rows)]."""
    x_row_ptr = x_ptr + row.to(tl.int64) * x_stride
    a_rows_ptr = a_ptr + rank_rows.to(tl.int64)[:, None] * in_features
    rank_mask = (rank_rows < rank)[:, None]
    columns = k_start + tl.arange(0, TILE_K)
    column_mask = columns < in_features
    a = tl.load(
        a_rows_ptr + columns[None, :],
        mask=rank_mask & column_mask[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    wait(DEPENDENT)
    x = tl.load(x_row_ptr + columns, mask=column_mask, other=0.0)
    h = tl.sum(a.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    if SPLIT_K > TILE_K:
        for k in range(k_start + TILE_K, tl.minimum(k_start + SPLIT_K, in_features), TILE_K):
            columns = k + tl.arange(0, TILE_K)
            column_mask = columns < in_features
            a = tl.load(
                a_rows_ptr + columns[None, :],
                mask=rank_mask & column_mask[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            x = tl.load(x_row_ptr + columns, mask=column_mask, other=0.0)
            h += tl.sum(a.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    return h


@triton.jit
def shrink_rows(
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
    DEPENDENT: tl.constexpr,
):
    """Returns x[rows, k_start : k_start + SPLIT_K] @ A[rank_rows, the same]^T."""
    acc = tl.zeros((TILE_ROWS, TILE_RANKS), tl.float32)
    x_rows_ptr = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    a_rows_ptr = a_ptr + rank_rows.to(tl.int64)[:, None] * in_features
    wait(DEPENDENT)
    for k in range(k_start, tl.minimum(k_start + SPLIT_K, in_features), TILE_K):
        columns = k + tl.arange(0, TILE_K)
        column_mask = columns[None, :] < in_features
        x = tl.load(x_rows_ptr + columns[None, :], mask=row_mask[:, None] & column_mask, other=0.0)
        a = tl.load(a_rows_ptr + columns[None, :], mask=(rank_rows < rank)[:, None] & column_mask, other=0.0)
        acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
    return acc


@triton.jit
def _shrink_tile_(
    out_ptr,
    x_ptr,
    a_ptr,
    first_row,
    end,
    weight,
    max_rank,
    x_stride,
    first_rank,
    rank,
    in_features,
    k_start,
    TILE_ROWS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    ROW_K: tl.constexpr,
    DOT_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    rank_rows = first_rank + tl.arange(0, TILE_RANKS)
    rows = first_row + tl.arange(0, TILE_ROWS)
    row_mask = rows < end
    if ROW_K > 0 and first_row + 1 == end:
        h = shrink_row(
            x_ptr, a_ptr, first_row, x_stride, rank_rows, rank, in_features, k_start, ROW_K, SPLIT_K, DEPENDENT
        )
        tl.store(out_ptr + first_row.to(tl.int64) * max_rank + rank_rows, h * weight, mask=rank_rows < max_rank)
    else:
        acc = shrink_rows(
            x_ptr, a_ptr, rows, row_mask, x_stride, rank_rows, rank, in_features, k_start,
            TILE_ROWS, TILE_RANKS, DOT_K, SPLIT_K, DEPENDENT,
        )  # fmt: skip
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * max_rank + rank_rows[None, :]
        tl.store(out_ptrs, acc * weight, mask=row_mask[:, None] & (rank_rows < max_rank)[None, :])


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
    NUM_SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    ROW_K: tl.constexpr,
    DOT_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out[split, t, c] = sum over the split's k of x[t, k] A_slot(t)[c, k], zero where the slot has no rank row c.

    Grid: (rank tiles * splits, row tiles). Together the programs write all of out [splits, num_tokens, max_rank].
    `seg_weights_ptr` is None where no segment has a weight, which compiles a kernel that knows none.
    """
    begin(DEPENDENT)
    segment, slot, first_row, end = find_segment(
        tl.program_id(1), seg_starts_ptr, seg_slots_ptr, num_segments, num_tokens, TILE_ROWS, PADDED_SEGMENTS
    )
    if first_row >= end:
        wait(DEPENDENT)
        return

    split = tl.program_id(0) % NUM_SPLITS
    first_rank = tl.program_id(0) // NUM_SPLITS * TILE_RANKS
    out_ptr += split.to(tl.int64) * num_tokens * max_rank
    rank = 0
    offset = tl.zeros((), tl.int64)
    weight = 1.0
    if slot >= 0:
        offset = tl.load(offsets_ptr + slot)
        for s in tl.static_range(NUM_SLICES):
            rank += tl.load(ranks_ptr + slot.to(tl.int64) * ranks_stride_slot + s * ranks_stride_slice)
        if seg_weights_ptr is not None:
            weight = tl.load(seg_weights_ptr + segment)
    if first_rank >= rank:
        wait(DEPENDENT)  # before it writes, too: the memory may be read by a kernel that still runs
        rows = first_row + tl.arange(0, TILE_ROWS)
        rank_rows = first_rank + tl.arange(0, TILE_RANKS)
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * max_rank + rank_rows[None, :]
        zeros = tl.zeros((TILE_ROWS, TILE_RANKS), tl.float32)
        tl.store(out_ptrs, zeros, mask=(rows < end)[:, None] & (rank_rows < max_rank)[None, :])
        return
    if offset % ALIGNMENT == 0:
        a_ptr = arena_ptr + offset // ALIGNMENT * ALIGNMENT
        _shrink_tile_(
            out_ptr, x_ptr, a_ptr, first_row, end, weight, max_rank, x_stride, first_rank, rank, in_features,
            split * SPLIT_K, TILE_ROWS, TILE_RANKS, ROW_K, DOT_K, SPLIT_K, DEPENDENT,
        )  # fmt: skip
    else:
        a_ptr = arena_ptr + offset
        _shrink_tile_(
            out_ptr, x_ptr, a_ptr, first_row, end, weight, max_rank, x_stride, first_rank, rank, in_features,
            split * SPLIT_K, TILE_ROWS, TILE_RANKS, ROW_K, DOT_K, SPLIT_K, DEPENDENT,
        )  # fmt: skip
