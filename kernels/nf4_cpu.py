"""NF4 on CPUs: weights repacked once, and the two native kernels that multiply by them."""

from typing import Final

import torch
from torch import Tensor

from .native.functions import ADDRESS, COUNT, NUMBER, function, multiplies_bf16
from .nf4_tiles import Layout, to_tiles
from .nf4_weight import NF4Weight, plain_absmax

# x and its row stride; codes, constants, bias, out; rows, out_features, in_features, threads
_ARGUMENTS: Final = (ADDRESS, COUNT, ADDRESS, ADDRESS, ADDRESS, ADDRESS, COUNT, COUNT, COUNT, NUMBER)
_native_linear: Final = function("lorikeet_nf4_linear", *_ARGUMENTS)
_native_pair_linear: Final = function("lorikeet_nf4_pair_linear", *_ARGUMENTS)


def prepare_for_cpu(weight: NF4Weight, compute_dtype: torch.dtype) -> NF4Weight:
    """The weight as CPUs run it: constants un-nested, and repacked for the kernel that suits the dtype.

    Without the native library codes stay canonical.
    """
    absmax = plain_absmax(weight.absmax)
    n, k = weight.out_features, weight.in_features
    if _native_linear is None:
        return NF4Weight(weight.codes, absmax, n, k)
    layout = Layout.PAIRS if compute_dtype is torch.bfloat16 and multiplies_bf16() else Layout.TILES
    return NF4Weight(*to_tiles(weight.codes, absmax, n, k, layout), n, k, layout)


def tiled_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    """Compute x . W^T + bias by the native kernel; see `nf4.nf4_linear`.

    With TILES values and sums are fp32. With PAIRS x and the 16 values that codes stand for are rounded to bfloat16;
    products, a block's constants and sums are fp32. Each result is one sum in the order of the columns: a row's do not
    depend on the other rows.

    Args:
        x: [T, in_features], converted where it is not of the kernel's type: float32 or, with PAIRS, bfloat16.
        weight: in tiles.
        bias: [out_features] in x's dtype, or None.

    Raises:
        ValueError: a tensor breaks this contract.
    """
    in_pairs = weight.layout is Layout.PAIRS
    dtype = torch.bfloat16 if in_pairs else torch.float32
    if x.dtype is not dtype:
        return tiled_linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)
    n, k = weight.out_features, weight.in_features
    num_rows, width = x.shape
    if width != k or not x.is_cpu:
        raise ValueError(f"x must be [T, {k}] on the CPU, got {list(x.shape)} on {x.device}")
    if bias is not None:
        if bias.dtype is not dtype or bias.shape != (n,) or not bias.is_contiguous():
            raise ValueError(f"bias must be contiguous {x.dtype} [{n}], got {bias.dtype} {list(bias.shape)}")
        bias = bias.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((num_rows, n), dtype=dtype)
    run = _native_pair_linear if in_pairs else _native_linear
    assert run is not None and isinstance(weight.absmax, Tensor)
    run(
        x.data_ptr(), x.stride(0), weight.codes.data_ptr(), weight.absmax.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(), num_rows, n, k, torch.get_num_threads(),
    )  # fmt: skip
    return out
