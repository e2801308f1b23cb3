"""One NF4 weight as it lies in memory: 4-bit codes, and the constants of their blocks, nested or not.

Nested constants (double quantization) are kept as they are where weights live on a GPU: 4.13 instead of 4.5 bits a
weight are read at each step. A weight has one second-level offset, a stack of weights one for each part, so offsets lie
beside the second-level scales, one for each group of 256 constants. Source of the layout: QLoRA (arXiv 2305.14314),
bitsandbytes 0.50.2 `functional.quantize_4bit`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .nf4_tiles import TILE, Layout, from_tiles

BLOCK: Final = 64
GROUP: Final = 256  # constants


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """The block constants of a weight, quantized themselves.

    Constant i is code_map[codes[i]] * scales[i // 256] + offsets[i // 256].

    Attributes:
        codes: uint8 [out * in / 64].
        code_map: float32 [256].
        scales: float32 [groups], a group being 256 constants, the last one maybe fewer.
        offsets: float32 [groups].
        one_offset: all offsets are equal, as in a weight that is no stack.
    """

    codes: Tensor
    code_map: Tensor
    scales: Tensor
    offsets: Tensor
    one_offset: bool

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return self.codes.nbytes + self.code_map.nbytes + self.scales.nbytes + self.offsets.nbytes

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Constants [start, stop) as bitsandbytes computes them, each operation rounded: float32."""
        codes = self.codes[start:stop]
        groups = torch.arange(start, start + codes.numel(), device=codes.device) // GROUP
        constants: Tensor = self.code_map[codes.int()] * self.scales[groups] + self.offsets[groups]
        return constants


Absmax = Tensor | NestedAbsmax


def stack_absmax(parts: Sequence[Absmax]) -> Absmax:
    """The constants of weights whose rows are stacked: nested where all are, alike, and groups do not cross parts.

    Returns:
        The same values in either form; float32 [sum of the parts' blocks] where they cannot be nested.
    """
    if len(parts) == 1:
        return parts[0]
    nested = [part for part in parts if isinstance(part, NestedAbsmax)]
    if (
        len(nested) < len(parts)
        or any(part.codes.numel() % GROUP for part in nested[:-1])
        or any(not torch.equal(part.code_map, nested[0].code_map) for part in nested)
    ):
        return torch.cat([plain_absmax(part) for part in parts])
    return NestedAbsmax(
        torch.cat([part.codes for part in nested]),
        nested[0].code_map,
        torch.cat([part.scales for part in nested]),
        torch.cat([part.offsets for part in nested]),
        one_offset=False,
    )


def plain_absmax(absmax: Absmax) -> Tensor:
    """The constants un-nested: float32 [out * in / 64]."""
    return absmax.values() if isinstance(absmax, NestedAbsmax) else absmax


@dataclass(slots=True)
class NF4Weight:
    """One (possibly stacked) weight.

    Attributes:
        codes: uint8, two 4-bit codes a byte: [out * in / 2], or in tiles (`nf4_tiles`).
        absmax: float32 [out * in / 64], or nested, or in tiles.
        out_features: rows.
        in_features: columns, a multiple of 64.
        layout: canonical, or repacked for a native CPU kernel.
    """

    codes: Tensor
    absmax: Absmax
    out_features: int
    in_features: int
    layout: Layout = Layout.CANONICAL

    @property
    def nbytes(self) -> int:
        """Resident bytes of codes and constants."""
        return self.codes.nbytes + self.absmax.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The whole weight, [out, in] in `dtype`. Used per call on CPUs without a kernel, and by references."""
        return dequantize_rows(self, 0, self.out_features, dtype)


def dequantize_rows(weight: NF4Weight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows [start, stop) of a weight in any layout, by bitsandbytes: [stop - start, in_features]."""
    if weight.layout is not Layout.CANONICAL:
        return _dequantize_tiled(weight, start, stop, dtype)
    k = weight.in_features
    codes = weight.codes[start * k // 2 : stop * k // 2]
    blocks = (start * k // BLOCK, stop * k // BLOCK)
    absmax = weight.absmax
    constants = absmax.values(*blocks) if isinstance(absmax, NestedAbsmax) else absmax[slice(*blocks)]
    shape = (stop - start, k)
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, constants, BLOCK, "nf4", shape, dtype)
    return values


def _dequantize_tiled(weight: NF4Weight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    assert isinstance(weight.absmax, Tensor)
    tiles = slice(start // TILE, -(-stop // TILE))
    codes, absmax = from_tiles(weight.codes[tiles], weight.absmax[tiles], weight.layout)
    first = tiles.start * TILE
    some = NF4Weight(codes, absmax, weight.absmax[tiles].shape[0] * TILE, weight.in_features)
    return dequantize_rows(some, start - first, stop - first, dtype)
