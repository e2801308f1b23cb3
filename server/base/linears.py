"""The linears that replace transformers' own: NF4 weights, stacked where several read the same input.

`StackedLinear` holds q/k/v (or gate/up) as one weight and one matmul; the model's attributes `q_proj`, `k_proj` and
`v_proj` become `SliceLinear` views of it, so that transformers' forward runs unchanged.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ...kernels.nf4 import nf4_linear
from ...kernels.nf4_weight import NF4Weight


class NF4Linear(nn.Module):
    """y = x . dequant(W)^T + bias over a flat batch."""

    def __init__(self, weight: NF4Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.nf4 = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.nf4.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.nf4.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] in the compute dtype -> [..., out_features]."""
        if x.dim() == 2:  # the lean decoder's
            return nf4_linear(x, self.nf4, self.bias)
        y = nf4_linear(x.reshape(-1, x.shape[-1]), self.nf4, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


class StackedLinear(nn.Module):
    """Several linears of the same input as one; runs once per input and hands each slice its columns."""

    def __init__(self, linear: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self.linear = linear
        self._widths = list(widths)
        self._input: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def take(self, index: int, x: Tensor) -> Tensor:
        """Columns of slice `index` for input x; computes all slices when x was not the last input seen.

        Inputs are compared by identity: transformers hands the same tensor object to q, k and v. A family that does not
        only loses the saving, never the result. Nothing is kept once every slice has been taken.
        """
        if self._input is not x or self._parts[index] is None:
            self._parts = list(torch.split(self.linear(x), self._widths, dim=-1))
            self._input = x
        part = self._parts[index]
        assert part is not None
        self._parts[index] = None
        if not any(p is not None for p in self._parts):
            self._input, self._parts = None, []
        return part


class SliceLinear(nn.Module):
    """One original linear (say `k_proj`) inside a `StackedLinear`."""

    def __init__(self, stack: StackedLinear, index: int) -> None:
        super().__init__()
        # Kept out of the module tree: the stack is registered once, under its own name.
        object.__setattr__(self, "_stack", stack)
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., this slice's out_features], possibly a strided view."""
        return cast(StackedLinear, self._stack).take(self.index, x)
