"""How large the numbers of tensors are; runs over every byte of every adapter, so it is worth a quick way."""

import math
from typing import Final

import torch
from torch import Tensor

from .priority import give_way

# Elements, which take some 100 us; of tensors of one dimension, as the large ones are.
_PIECE: Final = 1 << 19


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; True for an empty tensor. Any floating type, on the CPU."""
    return math.isfinite(largest_magnitude(tensor))


def largest_magnitude(tensor: Tensor) -> float:
    """The largest absolute value; NaN if any element is, 0 for an empty tensor. Any floating type, on the CPU.

    One pass for the extremes, which NaN propagates to, instead of a mask as long as the tensor: 84 MB in 448 tensors
    take 8.5 ms instead of 186 (bfloat16, one thread of an AMD EPYC, Zen 3; 2026-11-22).
    """
    if not tensor.numel():
        return 0.0
    largest = 0.0
    for piece in tensor.split(_PIECE) if tensor.dim() == 1 else (tensor,):
        lowest, highest = torch.aminmax(piece)
        for found in (abs(lowest.item()), abs(highest.item())):
            # Not max(): of NaN it may return the other.
            if found > largest or math.isnan(found):
                largest = found
        if math.isnan(largest):
            break
        give_way()
    return largest
