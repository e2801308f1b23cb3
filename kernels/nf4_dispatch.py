"""Which way an NF4 matmul takes on a GPU, by (compute capability, shape of the weight, number of rows).

`MEASURED` holds what benchmarks/nf4_kernels.py found best; it prints lines of exactly this form. Shapes that nobody has
measured take the tiles of `_reason`, which follow from registers and shared memory of the compiled kernels: as many
programs as an H100 can hold at once, so that all bytes are asked for at the start.
"""

from functools import cache
from math import log2
from typing import Final, Literal, NamedTuple

Lookup = Literal["prmt", "gather"]


class GemmTile(NamedTuple):
    """How our matmul divides its work.

    Attributes:
        rows: of x that a program takes: 8, 16, 32 or 64.
        columns: of y, which are rows of the weight.
        splits: programs that share the weight's columns.
        warps: of a program.
        stages: of its loop over 256 columns each.
        lookup: how codes become weights (`nf4_lookup`).
    """

    rows: int
    columns: int
    splits: int
    warps: int
    stages: int
    lookup: Lookup = "prmt"


# "bitsandbytes" is its gemm_4bit, "dequantize" our dequantization and F.linear.
Way = GemmTile | Literal["bitsandbytes", "dequantize"]

# Largest number of rows of each bucket; beyond the last one the weight is dequantized.
ROW_BUCKETS: Final = (1, 8, 16, 32, 64, 128, 256)

# (major, minor) of the capability -> (out_features, in_features) -> the way for each of ROW_BUCKETS; None: not measured
MEASURED: Final[dict[tuple[int, int], dict[tuple[int, int], tuple[Way | None, ...]]]] = {}

# Columns of the weight that a step of the kernel's loop takes.
_STEP: Final = 256


@cache
def choose_way(
    capability: tuple[int, int],
    num_multiprocessors: int,
    num_rows: int,
    out_features: int,
    in_features: int,
    one_offset: bool,
    half_precision: bool,
) -> Way:
    """The way for x [num_rows, in_features] and a weight [out_features, in_features].

    Args:
        capability: (major, minor) of the device.
        num_multiprocessors: of the device.
        num_rows: rows of x.
        out_features: of the weight.
        in_features: of the weight.
        one_offset: its constants are plain or have a single second-level offset, as bitsandbytes takes them.
        half_precision: x is 16-bit. fp32 is for exact comparisons, not for speed, and is dequantized.
    """
    if num_rows > ROW_BUCKETS[-1] or not half_precision or capability < (8, 0):
        return "dequantize"
    bucket = next(i for i, most in enumerate(ROW_BUCKETS) if num_rows <= most)
    ways = _measured(capability, out_features, in_features)
    way = ways[bucket] if ways else None
    if way is None or (way == "bitsandbytes" and not one_offset):
        return _reason(num_multiprocessors, num_rows, out_features, in_features)
    if isinstance(way, GemmTile):
        return way._replace(splits=min(way.splits, _most_splits(in_features)))
    return way


def _measured(capability: tuple[int, int], out_features: int, in_features: int) -> tuple[Way | None, ...] | None:
    """The entry of the nearest measured shape, at most a factor of two away in both sizes together."""
    shapes = MEASURED.get(capability, {})
    distances = {shape: abs(log2(out_features / shape[0])) + abs(log2(in_features / shape[1])) for shape in shapes}
    nearest = min(distances, key=distances.__getitem__, default=None)
    return shapes[nearest] if nearest is not None and distances[nearest] <= 1 else None


def _reason(num_multiprocessors: int, num_rows: int, out_features: int, in_features: int) -> Way:
    """Not measured: splits up to as many programs as fit at once by registers and shared memory of sm_90.

    A multiprocessor holds 5, 3, 2 and 2 of the four tiles; of the smallest, 4 are asked for.
    """
    if num_rows <= 8:
        tile, resident = GemmTile(8, 64, 1, 4, 4), 4
    elif num_rows <= 16:
        tile, resident = GemmTile(16, 128, 1, 4, 3), 3
    elif num_rows <= 32:
        tile, resident = GemmTile(32, 128, 1, 4, 3), 2
    else:
        tile, resident = GemmTile(64, 64, 1, 4, 3), 2
    programs = -(-num_rows // tile.rows) * -(-out_features // tile.columns)
    splits = 1
    while 2 * splits * programs <= resident * num_multiprocessors and 2 * splits <= _most_splits(in_features):
        splits *= 2
    return tile._replace(splits=splits)


def _most_splits(in_features: int) -> int:
    """Two steps for each: fewer would be all start and end."""
    return max(1, min(16, in_features // (2 * _STEP)))
