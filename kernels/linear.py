"""Dense linear of a CPU: y = x . W^T + bias. For the output head, the largest weight there is, which is not quantized.

- x in fp32, over a weight in whatever 16- or 32-bit type it is stored. A 16-bit one is converted as it is read: the
  results are those of the same weight in fp32, for half of the memory that fp32 would take and a step would read.
- x and the weight in bfloat16, where the CPU has instructions for that (AVX512-BF16); products and sums are fp32.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .native.functions import ADDRESS, COUNT, NUMBER, TYPE_NUMBERS, function, multiplies_bf16

LANES: Final = 8
"""The native kernels take multiples of this many columns."""
# type of the weight; x, weight with their row strides; bias, out; rows, out_features, in_features, threads
_ARGUMENTS: Final = (
    NUMBER, ADDRESS, COUNT, ADDRESS, COUNT, ADDRESS, ADDRESS, COUNT, COUNT, COUNT, NUMBER,
)  # fmt: skip
_native_linear: Final = function("lorikeet_linear", *_ARGUMENTS)
_native_pair_linear: Final = function("lorikeet_pair_linear", *_ARGUMENTS[1:])


def has_kernel(x_dtype: torch.dtype) -> bool:
    """Whether `linear` is faster than torch for x of a type."""
    if x_dtype is torch.bfloat16:
        return multiplies_bf16()
    return x_dtype is torch.float32 and _native_linear is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x . W^T + bias.

    A row's results do not depend on the other rows where the native kernel runs.

    Args:
        x: float32 or bfloat16 [T, in_features] on the CPU.
        weight: [out_features, in_features], rows contiguous: float32, bfloat16 or float16; bfloat16 where x is.
        bias: [out_features] in x's dtype, or None.

    Returns:
        [T, out_features] in x's dtype.

    Raises:
        ValueError: a tensor breaks this contract.
    """
    n, k = weight.shape
    num_rows, width = x.shape
    in_pairs = x.dtype is torch.bfloat16
    if width != k or not (in_pairs or x.dtype is torch.float32) or not (x.is_cpu and weight.is_cpu):
        raise ValueError(
            f"x must be float32 or bfloat16 [T, {k}] on the CPU, got {x.dtype} {list(x.shape)} on {x.device}"
        )
    if bias is not None and (bias.dtype is not x.dtype or bias.shape != (n,) or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous {x.dtype} [{n}], got {bias.dtype} {list(bias.shape)}")
    number = TYPE_NUMBERS.get(weight.dtype)
    if number is None or weight.stride(1) != 1 or (in_pairs and weight.dtype is not torch.bfloat16):
        wanted = "bfloat16" if in_pairs else "of 16 or 32 bits"
        raise ValueError(f"weight must be {wanted} with contiguous rows, got {weight.dtype}")
    if not has_kernel(x.dtype) or k % LANES:
        return F.linear(x, weight.to(x.dtype), bias)
    if x.stride(1) != 1:
        x = x.contiguous()
    bias = None if bias is None else bias.float()
    out = torch.empty((num_rows, n), dtype=x.dtype)
    arguments = (
        x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        None if bias is None else bias.data_ptr(), out.data_ptr(), num_rows, n, k, torch.get_num_threads(),
    )  # fmt: skip
    if in_pairs:
        assert _native_pair_linear is not None
        _native_pair_linear(*arguments)
    else:
        assert _native_linear is not None
        _native_linear(number, *arguments)
    return out
