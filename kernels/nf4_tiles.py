"""The layouts of NF4 weights that the native CPU kernels read, and the way there and back.

Sixteen rows are a tile; those that the last one lacks are zeros. Of four columns of a tile the 64 codes are 32 bytes:
columns 0 and 1 in the low halves, 2 and 3 in the high ones. The constants of a block of 64 columns are 16 floats, in
the order of the rows. What a byte's place says differs:

- TILES: byte b is of row 8 * (b // 4 % 2) + 4 * (b // 16) + b % 4 and of the first or second of its columns by
  b // 8 % 2, which is the order that interleaving bytes in 16-byte lanes undoes (kernels/native/nf4.cpp).
- PAIRS: bytes 2 r and 2 r + 1 are of row r and of the first and second of its columns (kernels/native/nf4_pairs.cpp).
"""

from enum import Enum
from typing import Final

import torch
from torch import Tensor

from .native.functions import ADDRESS, COUNT, NUMBER, function

TILE: Final = 16
"""Rows."""
_GROUP: Final = 4  # columns
_BLOCK: Final = 64  # columns of a constant
# canonical codes and constants, tiled codes and constants; out_features, in_features, in pairs, threads
_ARGUMENTS: Final = (ADDRESS, ADDRESS, ADDRESS, ADDRESS, COUNT, COUNT, NUMBER, NUMBER)
_native_tile: Final = function("lorikeet_nf4_tile", *_ARGUMENTS)


class Layout(Enum):
    """How a weight's codes and constants lie in memory."""

    CANONICAL = "canonical"
    """As bitsandbytes has them: row by row, the even column in the high half of a byte."""
    TILES = "tiles"
    """For the kernel that computes in fp32."""
    PAIRS = "pairs"
    """For the kernel that multiplies pairs of bfloat16."""


def to_tiles(
    codes: Tensor, absmax: Tensor, out_features: int, in_features: int, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Repack a canonical weight.

    Args:
        codes: uint8 [out * in / 2], the even column in the high half.
        absmax: float32 [out * in / 64].
        out_features: rows.
        in_features: columns, a multiple of 64.
        layout: TILES or PAIRS.

    Returns:
        codes uint8 [tiles, in / 4, 32], constants float32 [tiles, in / 64, 16].
    """
    assert _native_tile is not None  # nothing else reads tiles
    if codes.shape != (out_features * in_features // 2,) or absmax.shape != (out_features * in_features // _BLOCK,):
        raise ValueError(f"{codes.numel()} codes and {absmax.numel()} constants are not {out_features} x {in_features}")
    codes, absmax = codes.contiguous(), absmax.contiguous()
    num_tiles = -(-out_features // TILE)
    tiled = torch.zeros((num_tiles, in_features // _GROUP, 32), dtype=torch.uint8)
    constants = torch.zeros((num_tiles, in_features // _BLOCK, TILE), dtype=torch.float32)
    _native_tile(
        codes.data_ptr(), absmax.data_ptr(), tiled.data_ptr(), constants.data_ptr(), out_features, in_features,
        layout is Layout.PAIRS, torch.get_num_threads(),
    )  # fmt: skip
    return tiled, constants


def from_tiles(codes: Tensor, constants: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The inverse of `to_tiles`, of any number of tiles; rows that were added stay.

    Returns:
        Canonical codes uint8 [tiles * 16 * in / 2] and constants float32 [tiles * 16 * in / 64].
    """
    apart = torch.stack([codes & 0xF, codes >> 4], dim=2)  # [tiles, groups, first or second two columns, bytes]
    if layout is Layout.PAIRS:
        rows_first = apart.view(*codes.shape[:2], 2, TILE, 2).permute(0, 3, 1, 2, 4)
    else:
        rows_first = apart.view(*codes.shape[:2], 2, 2, 2, 2, 4).permute(0, 5, 3, 6, 1, 2, 4)
    even, odd = rows_first.reshape(-1, 2).unbind(1)
    return (even << 4) | odd, constants.transpose(1, 2).reshape(-1)
