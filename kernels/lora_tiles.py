"""How the LoRA kernels divide their work: plain integers, so that whoever sizes tensors needs no Triton.

Everything depends on shapes and Python ints alone, never on how many adapters a batch has: a captured graph replays
with other adapters, and the same row always adds up in the same order.
"""

from typing import NamedTuple

# Steps up to this many rows are taken for decodes: tiles of few rows, since most segments have one.
MAX_DECODE_ROWS = 128
# Programs that a split prefill should reach, about two for each of an H100's 132 multiprocessors.
_TARGET_PROGRAMS = 256
_MAX_PREFILL_SPLITS = 4
_MAX_DECODE_SPLITS = 16


class ShrinkTiles(NamedTuple):
    """Sizes of a shrink program. Checked for sm_90: no spills, shared memory within 99 KiB. Not tuned on a GPU.

    Attributes:
        rows: of the batch; at least tl.dot's 16.
        ranks: rank rows.
        row_k: columns that a program takes at a time of the only row of its segment; 0: such rows are not told apart.
        dot_k: columns that a program takes at a time of several rows, through shared memory.
        split_k: columns of a program in all.
        num_splits: programs that share the columns.
        num_warps: of a program.
        num_stages: of the loop over `dot_k`.
    """

    rows: int
    ranks: int
    row_k: int
    dot_k: int
    split_k: int
    num_splits: int
    num_warps: int
    num_stages: int


class ExpandTiles(NamedTuple):
    """Sizes of an expand program; see `ShrinkTiles`.

    Attributes:
        rows: of the batch; at least tl.dot's 16.
        ranks: rank rows that it takes at a time.
        columns: of y.
        rows_apart: whether the only row of a segment takes a path of its own.
        num_warps: of a program.
    """

    rows: int
    ranks: int
    columns: int
    rows_apart: bool
    num_warps: int


def shrink_tiles(
    num_tokens: int, in_features: int, max_rank: int, itemsize: int, num_splits: int | None = None
) -> ShrinkTiles:
    """Divide a shrink.

    Args:
        num_tokens: rows of x.
        in_features: columns of x.
        max_rank: columns of h.
        itemsize: bytes of an element of x.
        num_splits: overrides into how many parts the columns are split, as far as there are so many tiles.
    """
    if num_tokens > MAX_DECODE_ROWS:
        rows, ranks, dot_k = 64, 32, 128 // itemsize
        if num_splits is None:
            num_splits = _fill(-(-num_tokens // rows) * -(-max_rank // ranks), in_features // (2 * dot_k))
        split_k = _share(in_features, num_splits, dot_k)
        return ShrinkTiles(rows, ranks, 0, dot_k, split_k, -(-in_features // split_k), 4, 4)
    # 16 KiB or 32 KiB of A a program, all of it loaded at once. Fewer splits where they would be very many, since each
    # expand program reads those of its rows.
    wide = in_features * itemsize > 16384
    row_k, num_warps = (2048 // itemsize, 8) if wide else (1024 // itemsize, 4)
    if num_splits is None:
        num_splits = min(_MAX_DECODE_SPLITS, -(-in_features // row_k))
    split_k = _share(in_features, num_splits, row_k)
    return ShrinkTiles(16, 16, row_k, 256 // itemsize, split_k, -(-in_features // split_k), num_warps, 4)


def expand_tiles(num_tokens: int, itemsize: int) -> ExpandTiles:
    """Divide an expand.

    Args:
        num_tokens: rows of y.
        itemsize: bytes of an element of y.
    """
    if num_tokens > MAX_DECODE_ROWS:
        return ExpandTiles(64, 32, 256 // itemsize, False, 8)
    return ExpandTiles(16, 16, 512 // itemsize, True, 4)


def num_splits(num_tokens: int, in_features: int, max_rank: int, itemsize: int) -> int:
    """Partial sums that h consists of on CUDA."""
    return shrink_tiles(num_tokens, in_features, max_rank, itemsize).num_splits


def _share(in_features: int, num_splits: int, tile_k: int) -> int:
    """Columns of a split: as many tiles as it takes."""
    tiles = -(-in_features // tile_k)
    return -(-tiles // num_splits) * tile_k


def _fill(num_programs: int, most: int) -> int:
    """Largest power of two that neither passes the limits nor the number of programs that fill the GPU."""
    splits = 1
    while splits < _MAX_PREFILL_SPLITS and 2 * splits <= most and splits * num_programs < _TARGET_PROGRAMS:
        splits *= 2
    return splits
