"""The Triton kernel of an NF4 matmul that does LoRA, too, where all rows with an adapter have the same one.

`lora_nf4_triton` launches it. Against the kernel for any adapters, A is multiplied with all rows at once and B with
those of a tile, both as matrices, so rows cost next to nothing: it is for as many as a tile of the matmul has.
"""
# ruff: noqa: ANN001, ANN201, ANN202 -- triton.jit reads annotations, and has none for pointers
# mypy: ignore-errors

import triton
import triton.language as tl

from .lora_nf4_triton_kernel import ARRIVED, slots_of, tell_tiles, wait_for_h
from .lora_triton_segments import ALIGNMENT
from .lora_triton_shrink import shrink_rows
from .nf4_triton_kernels import add_parts, multiply_tile, store_part
from .overlap_triton import begin, wait


@triton.jit
def _only_slot(seg_slots_ptr, num_segments, PADDED: tl.constexpr):
    """The slot that rows have, or -1."""
    numbers = tl.arange(0, PADDED)
    return tl.max(tl.load(seg_slots_ptr + numbers, mask=numbers < num_segments, other=-1), axis=0)


@triton.jit
def _shrink(
    h_ptr,
    x_ptr,
    arena_ptr,
    slot_offsets_ptr,
    ranks_ptr,
    seg_starts_ptr,
    seg_slots_ptr,
    seg_weights_ptr,
    program,
    num_rows,
    num_segments,
    in_features,
    max_rank,
    x_stride,
    ranks_stride_slot,
    ranks_stride_slice,
    NUM_SLICES: tl.constexpr,
    H_SPLITS: tl.constexpr,
    SHRINK_ROWS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A program's share of h: some columns of x, times as many of TILE_RANKS rows of A."""
    split = program % H_SPLITS
    first_rank = program // H_SPLITS * TILE_RANKS
    slot = _only_slot(seg_slots_ptr, num_segments, PADDED_SEGMENTS)
    rank = 0
    if slot >= 0:
        for s in tl.static_range(NUM_SLICES):
            rank += tl.load(ranks_ptr + slot.to(tl.int64) * ranks_stride_slot + s * ranks_stride_slice)
    if first_rank < rank:
        rank_rows = first_rank + tl.arange(0, TILE_RANKS)
        rows = tl.arange(0, SHRINK_ROWS)
        segments, slots = slots_of(rows, seg_starts_ptr, seg_slots_ptr, num_segments, PADDED_SEGMENTS)
        row_mask = (rows < num_rows) & (slots >= 0)
        offset = tl.load(slot_offsets_ptr + slot)
        if offset % ALIGNMENT == 0:
            h = shrink_rows(
                x_ptr, arena_ptr + offset // ALIGNMENT * ALIGNMENT, rows, row_mask, x_stride, rank_rows, rank,
                in_features, split * SPLIT_K, SHRINK_ROWS, TILE_RANKS, TILE_K, SPLIT_K, DEPENDENT,
            )  # fmt: skip
        else:
            h = shrink_rows(
                x_ptr, arena_ptr + offset, rows, row_mask, x_stride, rank_rows, rank,
                in_features, split * SPLIT_K, SHRINK_ROWS, TILE_RANKS, TILE_K, SPLIT_K, DEPENDENT,
            )  # fmt: skip
        if seg_weights_ptr is not None:
            h *= tl.load(seg_weights_ptr + segments, mask=row_mask, other=0.0)[:, None]
        h_ptrs = h_ptr + (split * num_rows + rows).to(tl.int64)[:, None] * max_rank + rank_rows[None, :]
        tl.store(h_ptrs, h, mask=row_mask[:, None] & (rank_rows < rank)[None, :])
    else:
        wait(DEPENDENT)


@triton.jit
def _product(h, b):
    """H b, rounded as lora_A's result is by PEFT: fp32."""
    h = h.to(b.dtype)
    if h.shape[0] < 16:  # fewer rows than a matrix instruction has
        return tl.sum(h.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    return tl.dot(h, b, input_precision="ieee")


@triton.jit
def _load_h(h_ptrs, split_stride, mask, H_SPLITS: tl.constexpr):
    """The sum of its splits, from L2."""
    h = tl.load(h_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    for s in tl.static_range(1, H_SPLITS):
        h += tl.load(h_ptrs + s * split_stride, mask=mask, other=0.0, cache_modifier=".cg")
    return h


@triton.jit(do_not_specialize=["num_rows", "num_shrinks", "num_segments", "max_rank"])
def one_slot_lora_gemm_kernel(
    y_ptr,
    pairs_ptr,
    codes_ptr,
    absmax_ptr,
    map_ptr,
    scales_ptr,
    offsets_ptr,
    bias_ptr,
    table_ptr,
    partials_ptr,
    arrivals_ptr,
    shrunk_ptr,
    h_ptr,
    x_ptr,
    arena_ptr,
    slot_offsets_ptr,
    ranks_ptr,
    seg_starts_ptr,
    seg_slots_ptr,
    seg_weights_ptr,
    num_rows,
    num_shrinks,
    num_segments,
    max_rank,
    out_features,
    row_bytes,
    pairs_stride,
    x_stride,
    ranks_stride_slot,
    ranks_stride_slice,
    TABLE_FACTOR: tl.constexpr,
    PTX: tl.constexpr,
    WORDS: tl.constexpr,
    EVEN_STEPS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SLICE_WIDTHS: tl.constexpr,
    SLICE_COLUMNS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    LORA_ROWS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    H_SPLITS: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """y[m] = W x[m] + bias, rounded, then y[m] += B (A x[m]) where m has the slot.

    Grid, counters and what is held as in `lora_gemm_kernel`; LORA_ROWS: of a program that computes h, at least 16.
    """
    begin(DEPENDENT)
    in_features = 2 * row_bytes
    program = tl.program_id(0)
    if program < num_shrinks:
        _shrink(
            h_ptr, x_ptr, arena_ptr, slot_offsets_ptr, ranks_ptr, seg_starts_ptr, seg_slots_ptr, seg_weights_ptr,
            program, num_rows, num_segments, in_features, max_rank, x_stride, ranks_stride_slot, ranks_stride_slice,
            NUM_SLICES, H_SPLITS, LORA_ROWS, TILE_RANKS, TILE_K, SPLIT_K, PADDED_SEGMENTS, DEPENDENT,
        )  # fmt: skip
        tell_tiles(shrunk_ptr, arrivals_ptr, num_shrinks, NUM_TILES, PADDED_TILES)
        return

    tile = (program - num_shrinks) % NUM_TILES
    split = (program - num_shrinks) // NUM_TILES
    columns = tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    rows = tl.arange(0, TILE_ROWS)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty

    # What is B of this tile's slice: tables first, then its first TILE_RANKS rows, [TILE_RANKS, TILE_COLUMNS].
    slot = _only_slot(seg_slots_ptr, num_segments, PADDED_SEGMENTS)
    _segments, slots = slots_of(rows, seg_starts_ptr, seg_slots_ptr, num_segments, PADDED_SEGMENTS)
    safe_slot = tl.maximum(slot, 0).to(tl.int64)
    rank, first_rank, rank_sum = 0, 0, 0
    b_start, b_sum = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    width, first_column = SLICE_WIDTHS[0], 0
    for s in tl.static_range(NUM_SLICES):
        slice_rank = tl.load(ranks_ptr + safe_slot * ranks_stride_slot + s * ranks_stride_slice)
        if tile * TILE_COLUMNS >= SLICE_COLUMNS[s]:  # true up to the tile's own slice, which has the last word
            rank, first_rank, b_start = slice_rank, rank_sum, b_sum
            width, first_column = SLICE_WIDTHS[s], SLICE_COLUMNS[s]
        rank_sum += slice_rank
        b_sum += slice_rank.to(tl.int64) * SLICE_WIDTHS[s]
    if slot < 0:
        rank = 0
    is_adapted = (rows < num_rows) & (slots >= 0) & (rank > 0)
    block = 0 * safe_slot
    if rank > 0:
        block = tl.load(slot_offsets_ptr + safe_slot)
    b_block = rank_sum.to(tl.int64) * in_features + b_start
    c = tl.arange(0, TILE_RANKS)
    within = c.to(tl.int64)[:, None] * width + (columns - first_column)[None, :]
    b_mask = (c < rank)[:, None]
    if block % ALIGNMENT == 0:
        b = tl.load(arena_ptr + (block // ALIGNMENT * ALIGNMENT + b_block) + within, mask=b_mask, other=0.0)
    else:
        b = tl.load(arena_ptr + (block + b_block) + within, mask=b_mask, other=0.0)

    acc = multiply_tile(
        pairs_ptr, codes_ptr, absmax_ptr, map_ptr, scales_ptr, offsets_ptr, table_ptr, rows, columns, split, num_rows,
        out_features, row_bytes, pairs_stride, DTYPE, PTX, WORDS, EVEN_STEPS, TILE_ROWS, TILE_COLUMNS, NUM_SPLITS,
        NUM_STAGES, DEPENDENT,
    )  # fmt: skip
    parts_ptrs = partials_ptr
    if NUM_SPLITS > 1:
        parts_ptrs = store_part(partials_ptr, acc, tile, split, TILE_ROWS, TILE_COLUMNS, NUM_SPLITS)
    seen = tl.atomic_add(arrivals_ptr + tile, ARRIVED, sem="acq_rel", scope="gpu")
    if seen // ARRIVED < NUM_SPLITS - 1:
        return
    wait_for_h(seen, arrivals_ptr, tile, PTX)
    if NUM_SPLITS > 1:
        acc = add_parts(parts_ptrs, TILE_ROWS, TILE_COLUMNS, NUM_SPLITS)
    acc *= 1.0 / TABLE_FACTOR
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    y = acc.to(DTYPE)

    h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * max_rank + (first_rank + c)[None, :]
    h_stride = num_rows.to(tl.int64) * max_rank
    delta = _product(_load_h(h_ptrs, h_stride, is_adapted[:, None] & (c < rank)[None, :], H_SPLITS), b)
    for first in range(TILE_RANKS, rank, TILE_RANKS):
        more = first + c
        h = _load_h(h_ptrs + first, h_stride, is_adapted[:, None] & (more < rank)[None, :], H_SPLITS)
        within = more.to(tl.int64)[:, None] * width + (columns - first_column)[None, :]
        delta += _product(h, tl.load(arena_ptr + (block + b_block) + within, mask=(more < rank)[:, None], other=0.0))
    y = tl.where(is_adapted[:, None], (y.to(tl.float32) + delta).to(DTYPE), y)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    tl.store(y_ptrs, y, mask=(rows < num_rows)[:, None])
