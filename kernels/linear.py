"""Dense linear of a CPU: y = x . W^T + bias in fp32, over a weight in whatever 16- or 32-bit type it is stored.

A 16-bit weight is converted as it is read: the results are those of the same weight in fp32, for half of the memory
that fp32 would take and a step would read. For the output head, the largest weight there is, which is not quantized.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .native.functions import ADDRESS, COUNT, NUMBER, TYPE_NUMBERS, function

LANES: Final = 8
"""The native kernel takes multiples of this many columns."""
# type of the weight; x, weight with their row strides; bias, out; rows, out_features, in_features, threads
_ARGUMENTS: Final = (
    NUMBER, ADDRESS, COUNT, ADDRESS, COUNT, ADDRESS, ADDRESS, COUNT, COUNT, COUNT, NUMBER,
)  # fmt: skip
_native_linear: Final = function("lorikeet_linear", *_ARGUMENTS)


def takes_16_bits() -> bool:
    """Whether a 16-bit weight costs nothing: there is a kernel that converts it as it is read."""
    return _native_linear is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x . W^T + bias.

    A row's results do not depend on the other rows where the native kernel runs.

    Args:
        x: float32 [T, in_features] on the CPU.
        weight: [out_features, in_features], float32, bfloat16 or float16, rows contiguous.
        bias: float32 [out_features] or None.

    Returns:
        float32 [T, out_features].

    Raises:
        ValueError: a tensor breaks this contract.
    """
    n, k = weight.shape
    num_rows, width = x.shape
    if width != k or x.dtype is not torch.float32 or not (x.is_cpu and weight.is_cpu):
        raise ValueError(f"x must be float32 [T, {k}] on the CPU, got {x.dtype} {list(x.shape)} on {x.device}")
    if bias is not None and (bias.dtype is not torch.float32 or bias.shape != (n,) or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous float32 [{n}], got {bias.dtype} {list(bias.shape)}")
    number = TYPE_NUMBERS.get(weight.dtype)
    if number is None or weight.stride(1) != 1:
        raise ValueError(f"weight must be of 16 or 32 bits with contiguous rows, got {weight.dtype}")
    if _native_linear is None or k % LANES:
        return F.linear(x, weight.float(), bias)
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((num_rows, n), dtype=torch.float32)
    _native_linear(
        number, x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        None if bias is None else bias.data_ptr(), out.data_ptr(), num_rows, n, k, torch.get_num_threads(),
    )  # fmt: skip
    return out
