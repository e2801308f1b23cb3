"""LoRA shrink, expand and affine in Triton, for CUDA.

A program owns a tile of rows of one segment, so that an adapter's weights are read once a tile and rows of different
adapters never meet; the segment-wise scheme is Punica's SGMV (arXiv 2310.18547). What differs: ranks are exact (a
program reads its slot's ranks and masks or leaves), all slices of a site share a launch, and weights lie in one flat
arena instead of padded stacks.

Graph-safe: grids depend on shapes and Python ints alone, everything else is read on the device, nothing waits for it. A
graph captured with one adapter replays right with others as long as `max_rank` was large enough for all of them. Run
the captured shapes once before, so that no kernel is compiled and loaded during the capture.
Deterministic: the parts of a split input width are added in a fixed order, without atomics.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .lora_triton_kernels import affine_kernel, expand_kernel, shrink_kernel

# Steps up to this many rows are taken for decodes: tiles of few rows, since most segments have one.
_MAX_DECODE_ROWS = 128
# Programs that a split shrink should reach, about two for each of an H100's 132 multiprocessors.
_TARGET_PROGRAMS = 256
_MAX_SPLITS = 16


class _Tiles(NamedTuple):
    """Sizes of a program's tiles: no register spills for sm_90, at most 72 KiB of shared memory. Not tuned on a GPU.

    Attributes:
        rows: of the batch; at least tl.dot's 16.
        ranks: rank rows that a shrink program computes, or that an expand program takes at a time.
        shrink_bytes: of a row of x and of A that a shrink program takes at a time.
        expand_bytes: of a row of y that an expand program owns.
        num_stages: of the shrink loop.
    """

    rows: int
    ranks: int
    shrink_bytes: int
    expand_bytes: int
    num_stages: int


_DECODE_TILES = _Tiles(rows=16, ranks=16, shrink_bytes=512, expand_bytes=256, num_stages=3)
_PREFILL_TILES = _Tiles(rows=64, ranks=32, shrink_bytes=128, expand_bytes=256, num_stages=4)
# Affine needs no tl.dot: few rows, since segments are short, and more where they share the loads of gains and offsets.
_AFFINE_DECODE_ROWS = 4
_AFFINE_PREFILL_ROWS = 8
_AFFINE_BYTES = 2048  # of a row of y that a program owns


def lora_shrink(
    x: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    max_rank: int,
    seg_weights: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """See `lora.lora_shrink`.

    `num_splits` overrides into how many parts the input width is split.
    """
    num_tokens, in_features = x.shape
    num_segments = seg_slots.shape[0]
    h = torch.empty((num_tokens, max_rank), dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return h
    tiles = _tiles(num_tokens)
    tile_k = tiles.shrink_bytes // x.element_size()
    num_rank_tiles = triton.cdiv(max_rank, tiles.ranks)
    if num_splits is None:
        num_splits = _choose_splits(triton.cdiv(num_tokens, tiles.rows) * num_rank_tiles, in_features // (2 * tile_k))
    out = h if num_splits == 1 else h.new_empty((num_splits, num_tokens, max_rank))
    # One segment more than there are: the rows behind the last one, whose h is zero like that of base rows.
    num_row_tiles = num_tokens // tiles.rows + num_segments + 1
    shrink_kernel[(num_row_tiles, num_rank_tiles, num_splits)](
        out,
        x,
        arena,
        offsets,
        ranks,
        seg_starts,
        seg_slots,
        seg_weights,
        num_tokens,
        num_segments,
        in_features,
        max_rank,
        x.stride(0),
        ranks.stride(0),
        ranks.stride(1),
        NUM_SLICES=ranks.shape[1],
        TILE_ROWS=tiles.rows,
        TILE_RANKS=tiles.ranks,
        TILE_K=tile_k,
        SPLIT_K=triton.cdiv(triton.cdiv(in_features, num_splits), tile_k) * tile_k,
        PADDED_SEGMENTS=_padded(num_segments + 1),
        num_warps=4,
        num_stages=tiles.num_stages,
    )
    return h if num_splits == 1 else torch.sum(out, dim=0, out=h)


def lora_expand_(
    y: Tensor,
    h: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    slice_widths: Sequence[int],
    in_features: int,
) -> None:
    """See `lora.lora_expand_`. h is rounded to the arena's dtype, as PEFT's lora_A does."""
    num_tokens = y.shape[0]
    num_segments = seg_slots.shape[0]
    if num_tokens == 0 or num_segments == 0:
        return
    tiles = _tiles(num_tokens)
    tile_columns = tiles.expand_bytes // y.element_size()
    tile_ends = list(accumulate(triton.cdiv(width, tile_columns) for width in slice_widths))
    expand_kernel[(num_tokens // tiles.rows + num_segments, tile_ends[-1])](
        y,
        h,
        arena,
        offsets,
        ranks,
        seg_starts,
        seg_slots,
        num_segments,
        in_features,
        y.stride(0),
        h.stride(0),
        ranks.stride(0),
        ranks.stride(1),
        SLICE_WIDTHS=tuple(slice_widths),
        SLICE_COLUMNS=(0, *accumulate(slice_widths)),
        SLICE_TILES=(0, *tile_ends),
        NUM_SLICES=len(slice_widths),
        TILE_ROWS=tiles.rows,
        TILE_COLUMNS=tile_columns,
        TILE_RANKS=tiles.ranks,
        PADDED_SEGMENTS=_padded(num_segments),
        num_warps=4,
    )


def lora_affine_(y: Tensor, arena: Tensor, offsets: Tensor, seg_starts: Tensor, seg_slots: Tensor) -> None:
    """See `lora.lora_affine_`."""
    num_tokens, width = y.shape
    num_segments = seg_slots.shape[0]
    if num_tokens == 0 or num_segments == 0:
        return
    tile_rows = _AFFINE_DECODE_ROWS if num_tokens <= _MAX_DECODE_ROWS else _AFFINE_PREFILL_ROWS
    tile_columns = _AFFINE_BYTES // y.element_size()
    affine_kernel[(num_tokens // tile_rows + num_segments, triton.cdiv(width, tile_columns))](
        y,
        arena,
        offsets,
        seg_starts,
        seg_slots,
        num_segments,
        width,
        y.stride(0),
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        PADDED_SEGMENTS=_padded(num_segments),
        num_warps=4,
    )


def _tiles(num_tokens: int) -> _Tiles:
    return _DECODE_TILES if num_tokens <= _MAX_DECODE_ROWS else _PREFILL_TILES


def _padded(num_segments: int) -> int:
    """Few different values, since each compiles a kernel of its own."""
    return max(64, triton.next_power_of_2(num_segments))


def _choose_splits(num_programs: int, most: int) -> int:
    """Largest power of two that neither passes the limits nor the number of programs that fill the GPU."""
    splits = 1
    while splits < _MAX_SPLITS and 2 * splits <= most and splits * num_programs < _TARGET_PROGRAMS:
        splits *= 2
    return splits
