"""NF4 on CPUs: bitsandbytes' fused kernel (AVX512-BF16), on weights that it repacks once."""

from typing import Final

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from .nf4_weight import BLOCK, NF4Weight, plain_absmax

_ROWS_PER_TILE: Final = 32


def prepare_for_cpu(weight: NF4Weight, compute_dtype: torch.dtype) -> NF4Weight:
    """The weight as CPUs run it: constants un-nested, and repacked where bitsandbytes has its fused kernel."""
    absmax = plain_absmax(weight.absmax)
    n, k = weight.out_features, weight.in_features
    if compute_dtype != torch.bfloat16 or n % _ROWS_PER_TILE or not bnb.has_avx512bf16():
        return NF4Weight(weight.codes, absmax, n, k)
    state = bnb.QuantState(
        absmax=absmax,
        shape=torch.Size((n, k)),
        code=bnb.get_4bit_type("nf4", device="cpu"),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    codes, state = bnb._convert_weight_packed_for_cpu(weight.codes, state)
    return NF4Weight(codes, torch.empty(0), n, k, state)


def unpack_rows(weight: NF4Weight, start: int, stop: int) -> Tensor:
    """Rows of a weight that bitsandbytes repacked, with the constants that its kernel multiplies by (rounded to bf16).

    The codes lie in tiles of 32 rows x in_features, whose codes go down a pair of columns before they go to the next;
    of 64 codes in that order, the first 32 are the low halves of 32 bytes, the others the high halves.

    Returns:
        float32 [stop - start, in_features].
    """
    state = weight.cpu_state
    assert state is not None
    tiles = slice(start // _ROWS_PER_TILE, -(-stop // _ROWS_PER_TILE))
    packed = weight.codes.view(-1, weight.in_features // 2, _ROWS_PER_TILE)[tiles]
    codes = torch.cat([packed & 0xF, packed >> 4], dim=-1)
    codes = codes.view(-1, weight.in_features // 2, _ROWS_PER_TILE, 2).transpose(1, 2)
    first = tiles.start * _ROWS_PER_TILE
    rows = codes.reshape(-1, weight.in_features)[start - first : stop - first]
    absmax = state.absmax[:, start:stop].t().float()  # [in_features / 64, out_features], bf16
    values: Tensor = state.code[rows.int()] * absmax.repeat_interleave(BLOCK, dim=1)
    return values
