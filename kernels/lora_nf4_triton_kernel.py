"""The Triton kernel of an NF4 matmul that does LoRA, too, for few rows; `lora_nf4_triton` launches it."""
# ruff: noqa: ANN001, ANN201, ANN202 -- triton.jit reads annotations, and has none for pointers
# mypy: ignore-errors

import triton
import triton.language as tl

from .lora_triton_segments import ALIGNMENT
from .lora_triton_shrink import shrink_row
from .nf4_triton_kernels import add_parts, multiply_tile, store_part
from .overlap_triton import begin, wait

# A tile's counter: programs of the matmul that have arrived, in these units; below, whether all of h is there.
ARRIVED = tl.constexpr(1 << 16)
# Looks at the counter, some seconds, before the program ends with an error of the device. That would be a bug of ours,
# which must neither hang a GPU that others wait for nor leave counters behind that later launches would misread.
_PATIENCE = tl.constexpr(1 << 23)


@triton.jit
def slots_of(rows, seg_starts_ptr, seg_slots_ptr, num_segments, PADDED: tl.constexpr):
    """(segment, slot) of each row; slot -1 for base rows and those behind the last segment."""
    numbers = tl.arange(0, PADDED)
    starts = tl.load(seg_starts_ptr + numbers, mask=numbers <= num_segments, other=0)
    begun = (numbers <= num_segments)[None, :] & (starts[None, :] <= rows[:, None])
    segments = tl.sum(begun.to(tl.int32), axis=1) - 1
    slots = tl.load(seg_slots_ptr + segments, mask=segments < num_segments, other=-1)
    return segments, slots


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
    TILE_RANKS: tl.constexpr,
    TILE_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A program's share of h: some columns of one row's x, times as many of TILE_RANKS rows of A."""
    split = program % H_SPLITS
    row = program // H_SPLITS % num_rows
    first_rank = program // H_SPLITS // num_rows * TILE_RANKS
    segments, slots = slots_of(
        row + tl.arange(0, 1), seg_starts_ptr, seg_slots_ptr, num_segments, PADDED_SEGMENTS
    )  # fmt: skip
    segment, slot = tl.max(segments, axis=0), tl.max(slots, axis=0)
    rank = 0
    if slot >= 0:
        for s in tl.static_range(NUM_SLICES):
            rank += tl.load(ranks_ptr + slot.to(tl.int64) * ranks_stride_slot + s * ranks_stride_slice)
    if first_rank < rank:
        rank_rows = first_rank + tl.arange(0, TILE_RANKS)
        offset = tl.load(slot_offsets_ptr + slot)
        weight = 1.0
        if seg_weights_ptr is not None:
            weight = tl.load(seg_weights_ptr + segment)
        if offset % ALIGNMENT == 0:
            h = shrink_row(
                x_ptr, arena_ptr + offset // ALIGNMENT * ALIGNMENT, row, x_stride, rank_rows, rank, in_features,
                split * SPLIT_K, TILE_K, SPLIT_K, DEPENDENT,
            )  # fmt: skip
        else:
            h = shrink_row(
                x_ptr, arena_ptr + offset, row, x_stride, rank_rows, rank, in_features,
                split * SPLIT_K, TILE_K, SPLIT_K, DEPENDENT,
            )  # fmt: skip
        h_row_ptr = h_ptr + (split * num_rows + row).to(tl.int64) * max_rank
        tl.store(h_row_ptr + rank_rows, h * weight, mask=rank_rows < rank)
    else:
        wait(DEPENDENT)


@triton.jit
def tell_tiles(shrunk_ptr, arrivals_ptr, num_shrinks, NUM_TILES: tl.constexpr, PADDED_TILES: tl.constexpr):
    """This program's share of h is there; the last of them to say so tells every tile."""
    tl.debug_barrier()  # all threads have stored before one of them tells it
    ended = tl.atomic_add(shrunk_ptr, 1, sem="acq_rel", scope="gpu")
    if ended == num_shrinks - 1:
        tl.store(shrunk_ptr, 0)
        tiles = tl.arange(0, PADDED_TILES)
        tl.atomic_add(arrivals_ptr + tiles, 1, mask=tiles < NUM_TILES, sem="release", scope="gpu")


@triton.jit
def wait_for_h(seen, arrivals_ptr, tile, PTX: tl.constexpr):
    """Until all of h is there, of which the tile's counter, `seen` so, tells; leaves it at zero."""
    looks = 0
    while (seen % ARRIVED == 0) & (looks < _PATIENCE):
        seen = tl.atomic_add(arrivals_ptr + tile, 0, sem="acq_rel", scope="gpu")
        looks += 1
    if PTX and seen % ARRIVED == 0:
        tl.inline_asm_elementwise("trap; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(arrivals_ptr + tile, 0)


@triton.jit
def _load_b(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "num_shrinks", "num_segments", "max_rank"])
def lora_gemm_kernel(
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
    """y[m] = W x[m] + bias, rounded, then y[m] += B_slot(m) (A_slot(m) x[m]) where m has a slot.

    Grid: the `num_shrinks` programs that compute h = A x, then for each split of the matmul its NUM_TILES programs, of
    one tile of all rows each. The first ones are the first to run, and are done long before the others need h. The last
    of them to end tells every tile, by adding 1 to its counter; programs of the matmul add ARRIVED, and the last one
    of a tile, which has added up its splits, adds B h and leaves the counter at zero. So what it waits for, if it
    waits, is running already, and costs nothing to know: the counter tells both.

    Tiles lie within a slice. Up to TILE_RANKS rows of B are loaded before the matmul, and held meanwhile.
    """
    begin(DEPENDENT)
    in_features = 2 * row_bytes
    program = tl.program_id(0)
    if program < num_shrinks:
        _shrink(
            h_ptr, x_ptr, arena_ptr, slot_offsets_ptr, ranks_ptr, seg_starts_ptr, seg_slots_ptr, seg_weights_ptr,
            program, num_rows, num_segments, in_features, max_rank, x_stride, ranks_stride_slot, ranks_stride_slice,
            NUM_SLICES, H_SPLITS, TILE_RANKS, TILE_K, SPLIT_K, PADDED_SEGMENTS, DEPENDENT,
        )  # fmt: skip
        tell_tiles(shrunk_ptr, arrivals_ptr, num_shrinks, NUM_TILES, PADDED_TILES)
        return

    tile = (program - num_shrinks) % NUM_TILES
    split = (program - num_shrinks) // NUM_TILES
    columns = tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty

    # What is B for each row: tables first, then its first TILE_RANKS rows, [LORA_ROWS, TILE_RANKS, TILE_COLUMNS].
    lora_rows = tl.arange(0, LORA_ROWS)
    _segments, slots = slots_of(lora_rows, seg_starts_ptr, seg_slots_ptr, num_segments, PADDED_SEGMENTS)
    has_slot = (slots >= 0) & (lora_rows < num_rows)
    safe_slots = tl.maximum(slots, 0).to(tl.int64)
    slot_ranks_ptr = ranks_ptr + safe_slots * ranks_stride_slot
    ranks = tl.zeros((LORA_ROWS,), tl.int32)
    first_ranks = tl.zeros((LORA_ROWS,), tl.int32)
    rank_sums = tl.zeros((LORA_ROWS,), tl.int32)
    b_starts = tl.zeros((LORA_ROWS,), tl.int64)
    b_sums = tl.zeros((LORA_ROWS,), tl.int64)
    width, first_column = SLICE_WIDTHS[0], 0
    for s in tl.static_range(NUM_SLICES):
        slice_ranks = tl.load(slot_ranks_ptr + s * ranks_stride_slice, mask=has_slot, other=0)
        if tile * TILE_COLUMNS >= SLICE_COLUMNS[s]:  # true up to the tile's own slice, which has the last word
            ranks, first_ranks, b_starts = slice_ranks, rank_sums, b_sums
            width, first_column = SLICE_WIDTHS[s], SLICE_COLUMNS[s]
        rank_sums += slice_ranks
        b_sums += slice_ranks.to(tl.int64) * SLICE_WIDTHS[s]
    is_adapted = ranks > 0
    blocks = tl.load(slot_offsets_ptr + safe_slots, mask=is_adapted, other=0)
    b_blocks = rank_sums.to(tl.int64) * in_features + b_starts
    slice_columns = columns - first_column
    c = tl.arange(0, TILE_RANKS)
    within = c.to(tl.int64)[:, None] * width + slice_columns[None, :]
    b_mask = (c[None, :] < ranks[:, None])[:, :, None]
    if tl.max(blocks % ALIGNMENT, axis=0) == 0:
        aligned = blocks // ALIGNMENT * ALIGNMENT + b_blocks
        b = _load_b(arena_ptr + aligned[:, None, None] + within[None, :, :], b_mask)
    else:
        b = _load_b(arena_ptr + (blocks + b_blocks)[:, None, None] + within[None, :, :], b_mask)

    rows = tl.arange(0, TILE_ROWS)
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

    # h from L2, too. It is rounded as lora_A's result is by PEFT, y once more at the end, as by the expand kernel.
    h_ptrs = h_ptr + lora_rows.to(tl.int64)[:, None] * max_rank + first_ranks[:, None] + c[None, :]
    h_stride = num_rows.to(tl.int64) * max_rank
    h_mask = c[None, :] < ranks[:, None]
    h = tl.load(h_ptrs, mask=h_mask, other=0.0, cache_modifier=".cg")
    for s in tl.static_range(1, H_SPLITS):
        h += tl.load(h_ptrs + s * h_stride, mask=h_mask, other=0.0, cache_modifier=".cg")
    delta = tl.sum(h.to(DTYPE).to(tl.float32)[:, :, None] * b.to(tl.float32), axis=1)
    for first in range(TILE_RANKS, tl.max(ranks, axis=0), TILE_RANKS):
        more = first + c
        h_mask = more[None, :] < ranks[:, None]
        h = tl.load(h_ptrs + first, mask=h_mask, other=0.0, cache_modifier=".cg")
        for s in tl.static_range(1, H_SPLITS):
            h += tl.load(h_ptrs + first + s * h_stride, mask=h_mask, other=0.0, cache_modifier=".cg")
        within = more.to(tl.int64)[:, None] * width + slice_columns[None, :]
        b = _load_b(arena_ptr + (blocks + b_blocks)[:, None, None] + within[None, :, :], h_mask[:, :, None])
        delta += tl.sum(h.to(DTYPE).to(tl.float32)[:, :, None] * b.to(tl.float32), axis=1)
    for r in tl.static_range(LORA_ROWS):
        row_delta = tl.sum(tl.where((lora_rows == r)[:, None], delta, 0.0), axis=0)
        row_adapted = tl.max(tl.where(lora_rows == r, is_adapted.to(tl.int32), 0), axis=0) > 0
        here = (rows == r)[:, None] & row_adapted
        y = tl.where(here, (y.to(tl.float32) + row_delta[None, :]).to(DTYPE), y)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    tl.store(y_ptrs, y, mask=(rows < num_rows)[:, None])
