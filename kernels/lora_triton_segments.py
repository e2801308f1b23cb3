"""What the Triton kernels of LoRA share: which rows a program works on.

Tiles of rows are numbered without a prefix sum: segment g starts with tile `seg_starts[g] // TILE_ROWS + g`. That
leaves room for its ceil(length / TILE_ROWS) tiles, wastes at most one number a segment, and bounds the grid by
`num_tokens // TILE_ROWS + num_segments`. Running example with 16 rows a tile, segments of 3, 40 and 1 rows: they start
with tiles 0, 0 + 1 and 2 + 2, so tile 0 is segment 0, tiles 1 to 3 are segment 1 and tile 4 is segment 2.

A tile of one row, which is what a decode of distinct adapters consists of, takes a path without tl.dot: a tile of
weights goes from memory to registers in one go of 16-byte loads, is multiplied and added up. Tiles of more rows go
through shared memory and tensor cores.

DEPENDENT (see `overlap_triton`): tables and weights are read before the wait for what x, h and y come from.
"""
# ruff: noqa: ANN001, ANN201 -- triton.jit reads annotations, and has none for pointers
# mypy: ignore-errors

import triton
import triton.language as tl

# Elements in 16 bytes of a 16-bit dtype: what a block must be aligned to for the widest loads. The compiler can't know
# how a block is aligned, and would load 2 bytes at a time. Where `offset % ALIGNMENT == 0`, an address of the form
# `offset // ALIGNMENT * ALIGNMENT` tells it, without a promise that an arena could break.
ALIGNMENT = tl.constexpr(8)


@triton.jit
def find_segment(
    tile, seg_starts_ptr, seg_slots_ptr, num_segments, num_tokens, TILE_ROWS: tl.constexpr, PADDED: tl.constexpr
):
    """Returns the segment that the row tile belongs to, its slot, the tile's first row and the segment's end.

    The first row may lie behind the end. Segment `num_segments` is the rows behind the last one, up to `num_tokens`,
    of slot -1. PADDED: num_segments + 1, padded.
    """
    segments = tl.arange(0, PADDED)
    starts = tl.load(seg_starts_ptr + segments, mask=segments <= num_segments, other=0)
    # Loaded before it is known which one is needed: the loads of a program that only passes by take most of its time.
    slots = tl.load(seg_slots_ptr + segments, mask=segments < num_segments, other=-1)
    begun = (segments <= num_segments) & (starts // TILE_ROWS + segments <= tile)
    segment = tl.sum(begun.to(tl.int32), axis=0) - 1
    slot = tl.sum(tl.where(segments == segment, slots, 0), axis=0)
    start = tl.load(seg_starts_ptr + segment)
    end = num_tokens
    if segment < num_segments:
        end = tl.load(seg_starts_ptr + segment + 1)
    return segment, slot, start + (tile - start // TILE_ROWS - segment) * TILE_ROWS, end
