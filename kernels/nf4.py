"""NF4 linear: y = x . dequant(W)^T + bias.

Which implementation runs:
- CUDA: our matmul over the codes for few rows, our dequantization and `F.linear` for many, or `bitsandbytes::gemm_4bit`
  where that is faster and its contract fits (one second-level offset, so no stack): see `nf4_dispatch`.
- CPUs: a native kernel, on weights repacked once (`nf4_cpu`, `nf4_tiles`): in fp32, or, where the CPU multiplies
  bfloat16 (AVX512-BF16) and the model is computed in it, by those instructions.
- without the native library, or codes not repacked: bitsandbytes dequantizes this one weight, then `F.linear`.

The operators are registered as `torch.ops.lorikeet.nf4_linear` and `nf4_dequantize`; call them by the functions of this
module. The reference is `nf4_linear_reference`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .nf4_contract import check_linear, check_weight
from .nf4_cpu import prepare_for_cpu, tiled_linear
from .nf4_dispatch import ROW_BUCKETS, GemmTile, Way, choose_way
from .nf4_tiles import Layout
from .nf4_weight import BLOCK, NestedAbsmax, NF4Weight, dequantize_rows

# A weight: `absmax` is float32 with `code_map`, `scales` and `offsets` None, or the codes of nested constants.
_WEIGHT = "Tensor codes, Tensor absmax, Tensor? code_map, Tensor? scales, Tensor? offsets"
torch.library.define(
    "lorikeet::nf4_linear", f"(Tensor x, {_WEIGHT}, int out_features, bool one_offset, Tensor? bias=None) -> Tensor"
)
torch.library.define(
    "lorikeet::nf4_dequantize", f"({_WEIGHT}, int in_features, int first_row, int num_rows, ScalarType dtype) -> Tensor"
)


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Compute x . W^T + bias.

    Args:
        x: [T, in_features], compute dtype, same device as the weight.
        weight: out_features x in_features.
        bias: [out_features] in x's dtype, or None.

    Returns:
        [T, out_features] in x's dtype.

    Raises:
        RuntimeError: on CUDA, a tensor breaks this contract.
        ValueError: likewise on a CPU, where the weight was repacked.
    """
    if weight.layout is not Layout.CANONICAL:
        return tiled_linear(x, weight, bias)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.out_features)
    # On a CPU the dispatcher and the checks would take 15 us of a call.
    if x.is_cpu and not torch.compiler.is_compiling():
        return F.linear(x, weight.dequantize(x.dtype), bias)
    return torch.ops.lorikeet.nf4_linear.default(
        x, *tensors_of(weight), weight.out_features, has_one_offset(weight), bias
    )


def nf4_rows(weight: NF4Weight, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows [start, stop) dequantized, [stop - start, in_features]; for reading a weight piece by piece."""
    if weight.codes.is_cpu:
        return dequantize_rows(weight, start, stop, dtype)
    return torch.ops.lorikeet.nf4_dequantize.default(
        *tensors_of(weight), weight.in_features, start, stop - start, dtype
    )


def nf4_linear_reference(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """The same in fp32, from the canonical codes: [T, out_features] float32."""
    return F.linear(x.float(), weight.dequantize(torch.float32), None if bias is None else bias.float())


def prepare_for_device(weight: NF4Weight, compute_dtype: torch.dtype) -> NF4Weight:
    """The weight in the form that its device computes with: nested constants on CUDA, repacked codes on the CPU."""
    return prepare_for_cpu(weight, compute_dtype) if weight.codes.is_cpu else weight


def tensors_of(weight: NF4Weight) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The tensors of `_WEIGHT`."""
    absmax = weight.absmax
    if isinstance(absmax, NestedAbsmax):
        return weight.codes, absmax.codes, absmax.code_map, absmax.scales, absmax.offsets
    return weight.codes, absmax, None, None, None


def has_one_offset(weight: NF4Weight) -> bool:
    """Whether bitsandbytes can take its constants."""
    return not isinstance(weight.absmax, NestedAbsmax) or weight.absmax.one_offset


def _weight(
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    in_features: int,
) -> NF4Weight:
    if code_map is None or scales is None or offsets is None:
        return NF4Weight(codes, absmax, out_features, in_features)
    return NF4Weight(codes, NestedAbsmax(absmax, code_map, scales, offsets, False), out_features, in_features)


def _linear_cpu(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    one_offset: bool,
    bias: Tensor | None = None,
) -> Tensor:
    check_linear(x, codes, absmax, code_map, scales, offsets, out_features, bias)
    weight = _weight(codes, absmax, code_map, scales, offsets, out_features, x.shape[1])
    return F.linear(x, weight.dequantize(x.dtype), bias)


def way_of(x: Tensor, out_features: int, one_offset: bool) -> Way:
    """What `choose_way` says of x on CUDA."""
    device = torch.cuda.get_device_properties(x.device)
    num_rows = min(x.shape[0], ROW_BUCKETS[-1] + 1)  # beyond, all are the same: few entries in the function's cache
    return choose_way(
        (device.major, device.minor), device.multi_processor_count, num_rows, out_features, x.shape[1], one_offset,
        x.element_size() == 2,
    )  # fmt: skip


def _linear_cuda(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    one_offset: bool,
    bias: Tensor | None = None,
) -> Tensor:
    from . import nf4_triton  # a CPU-only installation has no Triton

    check_linear(x, codes, absmax, code_map, scales, offsets, out_features, bias)
    way = way_of(x, out_features, one_offset)
    weight = (codes, absmax, code_map, scales, offsets)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments are on
        if isinstance(way, GemmTile):
            return nf4_triton.nf4_gemm(x, *weight, out_features, bias, way)
        if way == "dequantize":
            return nf4_triton.nf4_dequantized_linear(x, *weight, out_features, bias)
    return bitsandbytes_gemm(x, *weight, out_features, bias)


def bitsandbytes_gemm(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """The same by bitsandbytes, for weights with one offset: of `offsets` it takes the first."""
    shape = (out_features, x.shape[1])
    if scales is None or offsets is None:
        return torch.ops.bitsandbytes.gemm_4bit.default(x, codes.view(-1, 1), shape, absmax, BLOCK, "nf4", bias)
    return torch.ops.bitsandbytes.gemm_4bit.default(
        x, codes.view(-1, 1), shape, scales, BLOCK, "nf4", bias, absmax, code_map, offsets[0]
    )


def _linear_fake(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    out_features: int,
    one_offset: bool,
    bias: Tensor | None = None,
) -> Tensor:
    check_linear(x, codes, absmax, code_map, scales, offsets, out_features, bias)
    return x.new_empty((x.shape[0], out_features))


def _dequantize_cpu(
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    in_features: int,
    first_row: int,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    check_weight(codes, absmax, code_map, scales, offsets, in_features)
    weight = _weight(codes, absmax, code_map, scales, offsets, 2 * codes.shape[0] // in_features, in_features)
    return dequantize_rows(weight, first_row, first_row + num_rows, dtype)


def _dequantize_cuda(
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    in_features: int,
    first_row: int,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    from . import nf4_triton

    check_weight(codes, absmax, code_map, scales, offsets, in_features)
    out = torch.empty((num_rows, in_features), dtype=dtype, device=codes.device)
    with torch.cuda.device_of(codes):
        nf4_triton.nf4_dequantize_(out, codes, absmax, code_map, scales, offsets, first_row)
    return out


def _dequantize_fake(
    codes: Tensor,
    absmax: Tensor,
    code_map: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    in_features: int,
    first_row: int,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    check_weight(codes, absmax, code_map, scales, offsets, in_features)
    return torch.empty((num_rows, in_features), dtype=dtype, device=codes.device)


torch.library.impl("lorikeet::nf4_linear", "CPU", _linear_cpu)
torch.library.impl("lorikeet::nf4_linear", "CUDA", _linear_cuda)
torch.library.register_fake("lorikeet::nf4_linear", _linear_fake)
torch.library.impl("lorikeet::nf4_dequantize", "CPU", _dequantize_cpu)
torch.library.impl("lorikeet::nf4_dequantize", "CUDA", _dequantize_cuda)
torch.library.register_fake("lorikeet::nf4_dequantize", _dequantize_fake)
