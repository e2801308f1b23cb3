"""The layout of NF4 weights that the native CPU kernel reads, and the way there and back.

Sixteen rows are a tile; those that the last one lacks are zeros. Of four columns of a tile the 64 codes are 32 bytes:
columns 0 and 1 in the low halves, 2 and 3 in the high ones. Byte b is of row 8 * (b // 4 % 2) + 4 * (b // 16) + b % 4
and of the first or second of its columns by b // 8 % 2, which is the order that interleaving bytes in 16-byte lanes
undoes (kernels/native/nf4.cpp). The constants of a block of 64 columns are 16 floats, in the order of the rows.
"""

from typing import Final

import torch
from torch import Tensor

from .native.functions import ADDRESS, COUNT, NUMBER, function

TILE: Final = 16
"""Rows."""
_GROUP: Final = 4  # columns
_BLOCK: Final = 64  # columns of a constant
# canonical codes and constants, tiled codes and constants; out_features, in_features, threads
_ARGUMENTS: Final = (ADDRESS, ADDRESS, ADDRESS, ADDRESS, COUNT, COUNT, NUMBER)
_native_tile: Final = function("lorikeet_nf4_tile", *_ARGUMENTS)


def to_tiles(codes: Tensor, absmax: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Repack a canonical weight.

    Args:
        codes: uint8 [out * in / 2], the even column in the high half.
        absmax: float32 [out * in / 64].
        out_features: rows.
        in_features: columns, a multiple of 64.

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
        torch.get_num_threads(),
    )  # fmt: skip
    return tiled, constants


def from_tiles(codes: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `to_tiles`, of any number of tiles; rows that were added stay.

    Returns:
        Canonical codes uint8 [tiles * 16 * in / 2] and constants float32 [tiles * 16 * in / 64].
    """
    apart = torch.stack([codes & 0xF, codes >> 4], dim=2).view(*codes.shape[:2], 2, 2, 2, 2, 4)
    even, odd = apart.permute(0, 5, 3, 6, 1, 2, 4).reshape(-1, 2).unbind(1)
    return (even << 4) | odd, constants.transpose(1, 2).reshape(-1)
