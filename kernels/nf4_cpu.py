"""NF4 on CPUs: weights repacked once, for our native kernel or for bitsandbytes' own (AVX512-BF16)."""

from typing import Final

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from .native.functions import ADDRESS, COUNT, NUMBER, function
from .nf4_tiles import to_tiles
from .nf4_weight import BLOCK, NF4Weight, plain_absmax

_ROWS_PER_TILE: Final = 32  # bitsandbytes'
# x and its row stride; codes, constants, bias, out; rows, out_features, in_features, threads
_ARGUMENTS: Final = (ADDRESS, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS, COUNT, COUNT, COUNT, NUMBER)
_native_linear: Final = function("lorikeet_nf4_linear", *_ARGUMENTS)


def prepare_for_cpu(weight: NF4Weight, compute_dtype: torch.dtype) -> NF4Weight:
    """The weight as CPUs run it: constants un-nested, and repacked for the kernel that there is.

    bitsandbytes has a fused one for bf16 where the CPU has AVX512-BF16 and rows are a multiple of 32; ours takes all
    else. Without either, codes stay canonical.
    """
    absmax = plain_absmax(weight.absmax)
    n, k = weight.out_features, weight.in_features
    if compute_dtype == torch.bfloat16 and n % _ROWS_PER_TILE == 0 and bnb.has_avx512bf16():
        return _for_bitsandbytes(weight.codes, absmax, n, k)
    if _native_linear is None:
        return NF4Weight(weight.codes, absmax, n, k)
    return NF4Weight(*to_tiles(weight.codes, absmax, n, k), n, k, is_tiled=True)


def tiled_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    """Compute x . W^T + bias by the native kernel, in fp32; see `nf4.nf4_linear`.

    Each result is one sum in the order of the columns: a row's do not depend on the other rows.

    Args:
        x: [T, in_features].
        weight: tiled.
        bias: [out_features] in x's dtype, or None.

    Raises:
        ValueError: a tensor breaks this contract.
    """
    if x.dtype is not torch.float32:
        return tiled_linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
    n, k = weight.out_features, weight.in_features
    num_rows, width = x.shape
    if width != k or not x.is_cpu:
        raise ValueError(f"x must be [T, {k}] on the CPU, got {list(x.shape)} on {x.device}")
    if bias is not None and (bias.dtype is not torch.float32 or bias.shape != (n,) or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous {x.dtype} [{n}], got {bias.dtype} {list(bias.shape)}")
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((num_rows, n), dtype=torch.float32)
    assert _native_linear is not None and isinstance(weight.absmax, Tensor)
    _native_linear(
        x.data_ptr(), x.stride(0), weight.codes.data_ptr(), weight.absmax.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(), num_rows, n, k, torch.get_num_threads(),
    )  # fmt: skip
    return out


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


def _for_bitsandbytes(codes: Tensor, absmax: Tensor, n: int, k: int) -> NF4Weight:
    state = bnb.QuantState(
        absmax=absmax,
        shape=torch.Size((n, k)),
        code=bnb.get_4bit_type("nf4", device="cpu"),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    codes, state = bnb._convert_weight_packed_for_cpu(codes, state)
    return NF4Weight(codes, torch.empty(0), n, k, state)
