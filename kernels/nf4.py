"""NF4 linear: y = x . dequant(W)^T + bias, on bitsandbytes' kernels.

The weight is held un-nested: 4-bit codes and one fp32 absmax per block of 64. Double quantization has been applied to
the absmax values (they are what a QLoRA base has, value for value), but its constants are stored expanded, because each
weight has its own second-level offset and stacked weights (q/k/v) must share one launch. Cost: 4.5 instead of 4.127
bits a weight.

Which implementation runs:
- CUDA: `bitsandbytes::gemm_4bit` (fused for few rows, dequantize + matmul for many; bitsandbytes >= 0.50).
- CPU with AVX512-BF16, bf16 compute, rows a multiple of 32: bitsandbytes' fused CPU kernel, on weights repacked once.
- otherwise: dequantize this one weight, then `F.linear`.

The reference is `nf4_linear_reference`. Source of the layout: QLoRA (arXiv 2305.14314), bitsandbytes 0.50.2
`functional.quantize_4bit`.
"""

from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
_ROWS_PER_CPU_TILE = 32
_QUANTIZE_ELEMENTS = 2**20  # a multiple of BLOCK


@dataclass(slots=True)
class NF4Weight:
    """One (possibly stacked) weight.

    Attributes:
        codes: uint8, two 4-bit codes a byte. Canonical [out * in / 2]; with `cpu_state` set, bitsandbytes' CPU tiles.
        absmax: float32 [out * in / 64]; empty with `cpu_state` set.
        out_features: rows.
        in_features: columns.
        cpu_state: bitsandbytes' state of the repacked weight, or None.
    """

    codes: Tensor
    absmax: Tensor
    out_features: int
    in_features: int
    cpu_state: bnb.QuantState | None = None

    @property
    def nbytes(self) -> int:
        """Resident bytes of codes and constants."""
        absmax = self.absmax if self.cpu_state is None else self.cpu_state.absmax
        return self.codes.nbytes + int(absmax.nbytes)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The whole weight, [out, in] in `dtype`. Used per call on CPUs without the fused kernel, and by references."""
        if self.cpu_state is not None:
            raise ValueError("this weight was repacked for the fused CPU kernel and has no canonical codes any more")
        shape = (self.out_features, self.in_features)
        values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(self.codes, self.absmax, BLOCK, "nf4", shape, dtype)
        return values

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) dequantized: float32 [stop - start, in_features]; for reading a weight piece by piece."""
        if self.cpu_state is not None:
            return _unpack_rows(self, self.cpu_state, start, stop)
        k = self.in_features
        codes, absmax = self.codes[start * k // 2 : stop * k // 2], self.absmax[start * k // BLOCK : stop * k // BLOCK]
        shape, dtype = (stop - start, k), torch.float32
        values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, BLOCK, "nf4", shape, dtype)
        return values


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize one 16-bit or fp32 weight as QLoRA does: NF4, blocks of 64, double-quantized constants.

    Args:
        weight: [out, in], float16, bfloat16 or float32, `out * in` a multiple of 64.

    Returns:
        codes uint8 [out * in / 2] and absmax float32 [out * in / 64], where absmax already went through double
        quantization, so that dequantizing gives exactly what bitsandbytes' nested state gives.
    """
    flat = weight.reshape(-1)
    codes = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(flat.numel() // BLOCK, dtype=torch.float32, device=weight.device)
    # In pieces: bitsandbytes' CPU quantizer needs about 6 bytes of temporaries for each element.
    for start in range(0, flat.numel(), _QUANTIZE_ELEMENTS):
        piece = flat[start : start + _QUANTIZE_ELEMENTS]
        packed, state = bnb.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4")
        codes[start // 2 : start // 2 + packed.numel()] = packed.view(-1)
        absmax[start // BLOCK : start // BLOCK + state.absmax.numel()] = state.absmax
    # The second level is over the whole weight, as `compress_statistics=True` does it: mean off, 8 bit, blocks of 256.
    offset = absmax.mean()
    quantized, second = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    constants: Tensor = bnb.dequantize_blockwise(quantized, second) + offset
    return codes, constants


def unnest_absmax(state: bnb.QuantState) -> Tensor:
    """The fp32 absmax of a bitsandbytes state, nested or not: [number of blocks]."""
    if not state.nested:
        flat: Tensor = state.absmax.reshape(-1).float()
        return flat
    absmax: Tensor = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return absmax.reshape(-1).float()


def prepare_for_device(weight: NF4Weight, compute_dtype: torch.dtype) -> NF4Weight:
    """Repack for bitsandbytes' fused CPU kernel where it exists; otherwise return the weight as it is."""
    fused = (
        weight.codes.device.type == "cpu"
        and compute_dtype == torch.bfloat16
        and weight.out_features % _ROWS_PER_CPU_TILE == 0
        and weight.cpu_state is None
        and bnb.has_avx512bf16()
    )
    if not fused:
        return weight
    state = bnb.QuantState(
        absmax=weight.absmax,
        shape=torch.Size((weight.out_features, weight.in_features)),
        code=bnb.get_4bit_type("nf4", device="cpu"),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    codes, state = bnb._convert_weight_packed_for_cpu(weight.codes, state)
    return NF4Weight(codes, torch.empty(0), weight.out_features, weight.in_features, state)


def _unpack_rows(weight: NF4Weight, state: bnb.QuantState, start: int, stop: int) -> Tensor:
    """Rows of a weight that bitsandbytes repacked, with the constants that its kernel multiplies by (rounded to bf16).

    The codes lie in tiles of 32 rows x in_features, whose codes go down a pair of columns before they go to the next;
    of 64 codes in that order, the first 32 are the low halves of 32 bytes, the others the high halves.
    """
    tiles = slice(start // _ROWS_PER_CPU_TILE, -(-stop // _ROWS_PER_CPU_TILE))
    packed = weight.codes.view(-1, weight.in_features // 2, _ROWS_PER_CPU_TILE)[tiles]
    codes = torch.cat([packed & 0xF, packed >> 4], dim=-1)
    codes = codes.view(-1, weight.in_features // 2, _ROWS_PER_CPU_TILE, 2).transpose(1, 2)
    first = tiles.start * _ROWS_PER_CPU_TILE
    rows = codes.reshape(-1, weight.in_features)[start - first : stop - first]
    absmax = state.absmax[:, start:stop].t().float()  # [in_features / 64, out_features], bf16
    values: Tensor = state.code[rows.int()] * absmax.repeat_interleave(BLOCK, dim=1)
    return values


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Compute x . W^T + bias.

    Args:
        x: [T, in_features], compute dtype, same device as the weight.
        weight: out_features x in_features.
        bias: [out_features] or None.

    Returns:
        [T, out_features] in x's dtype.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.out_features)
    if weight.cpu_state is not None:
        y: Tensor = bnb.gemv_4bit(x, weight.codes, state=weight.cpu_state)
        return y if bias is None else y.add_(bias)
    if x.device.type == "cuda":
        shape = (weight.out_features, weight.in_features)
        out: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
            x, weight.codes.view(-1, 1), shape, weight.absmax, BLOCK, "nf4", bias=bias
        )
        return out
    return F.linear(x, weight.dequantize(x.dtype), bias)


def nf4_linear_reference(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """The same in fp32, from the canonical codes: [T, out_features] float32."""
    return F.linear(x.float(), weight.dequantize(torch.float32), None if bias is None else bias.float())
