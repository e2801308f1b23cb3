"""Where NF4 weights come from: 16-bit weights, quantized as QLoRA does it, and bitsandbytes' own checkpoints."""

from typing import Final

import torch
from torch import Tensor

from .bnb import functional as bnb
from .nf4_weight import BLOCK, GROUP, Absmax, NestedAbsmax

_QUANTIZE_ELEMENTS: Final = 2**20  # a multiple of BLOCK


def quantize_nf4(weight: Tensor) -> tuple[Tensor, NestedAbsmax]:
    """Quantize one 16-bit or fp32 weight as QLoRA does: NF4, blocks of 64, double-quantized constants.

    Args:
        weight: [out, in], float16, bfloat16 or float32, `out * in` a multiple of 64.

    Returns:
        codes uint8 [out * in / 2] and constants, which dequantize to exactly what bitsandbytes' nested state gives.
    """
    flat = weight.reshape(-1)
    codes = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(flat.numel() // BLOCK, dtype=torch.float32, device=weight.device)
    # In pieces: bitsandbytes' CPU quantizer needs about 6 bytes of temporaries for each element.
    for start in range(0, flat.numel(), _QUANTIZE_ELEMENTS):
        packed, largest = quantize_blocks(flat[start : start + _QUANTIZE_ELEMENTS])
        codes[start // 2 : start // 2 + packed.numel()] = packed
        absmax[start // BLOCK : start // BLOCK + largest.numel()] = largest
    return codes, nest_absmax(absmax)


def quantize_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """The first level alone, of a piece of a weight.

    Args:
        values: any shape, float16, bfloat16 or float32, a multiple of 64 of them from the beginning of a block on.

    Returns:
        codes uint8 [n / 2] and constants float32 [n / 64].
    """
    packed, state = bnb.quantize_4bit(values.reshape(-1), blocksize=BLOCK, quant_type="nf4")
    return packed.view(-1), state.absmax


def nest_absmax(absmax: Tensor) -> NestedAbsmax:
    """The second level, which is over a whole weight: as `compress_statistics=True`, mean off, 8 bit, blocks of 256.

    Args:
        absmax: float32 [n], one for each block of the weight.
    """
    offset = absmax.mean()
    quantized, second = bnb.quantize_blockwise(absmax - offset, blocksize=GROUP)
    return _nest(quantized, second, offset)


def read_absmax(state: bnb.QuantState) -> Absmax:
    """The block constants of a bitsandbytes state, nested where it nests them as QLoRA does, else float32."""
    if not state.nested:
        # A copy: a view would keep the checkpoint's whole file mapped.
        flat: Tensor = state.absmax.reshape(-1).to(torch.float32, copy=True)
        return flat
    second = state.state2
    if second.blocksize == GROUP and second.dtype == torch.float32 and second.code.numel() == GROUP:
        return _nest(state.absmax, second, state.offset)
    absmax: Tensor = bnb.dequantize_blockwise(state.absmax, second) + state.offset
    return absmax.reshape(-1).float()


def _nest(codes: Tensor, second: bnb.QuantState, offset: Tensor) -> NestedAbsmax:
    scales = second.absmax.reshape(-1).to(torch.float32, copy=True)
    code_map = second.code.to(codes.device, torch.float32, copy=True)
    return NestedAbsmax(
        codes.reshape(-1).clone(), code_map, scales, offset.float().expand_as(scales).contiguous(), True
    )
