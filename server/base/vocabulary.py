"""Embedding and output head on a CPU: they stay in 16 bits where that loses nothing, and the head has its own kernel.

A step reads the whole head, the largest weight there is. Checkpoints hold it in 16 bits, mostly; the native kernel
(`kernels.linear`) reads it like that and computes in fp32, so that nothing but time and memory is different.
"""

from typing import Final

import torch
from torch import Tensor, nn

from ...kernels.linear import LANES, has_kernel, linear
from .site_plan import find_head

# Elements that are compared at once.
_PIECE: Final = 2**22


class CpuLinear(nn.Linear):
    """A linear over a weight of any storage type, by `kernels.linear`.

    Args:
        original: the linear whose parameters it takes.
    """

    def __init__(self, original: nn.Linear) -> None:
        super().__init__(original.in_features, original.out_features, original.bias is not None, device="meta")
        self.weight, self.bias = original.weight, original.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        y = linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


def keep_vocabulary_narrow(model: nn.Module, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Put the head's kernel in; in fp32 its weight and the embedding's go back into 16 bits where each value allows it.

    Args:
        model: filled, tied weights tied.
        device: where it lives.
        compute_dtype: the type of its parameters.
    """
    if device.type != "cpu" or not has_kernel(compute_dtype):
        return
    path, head = find_head(model)
    if type(head) is not nn.Linear or head.in_features % LANES:
        return  # another class computes something else; other widths would be converted whole at every step
    if compute_dtype is torch.float32:
        _narrow_vocabulary(model, head, compute_dtype)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, CpuLinear(head))


def _narrow_vocabulary(model: nn.Module, head: nn.Linear, compute_dtype: torch.dtype) -> None:
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    is_tied = embedding.weight is head.weight
    # Other classes compute with the weight's type what nn.Embedding leaves alone (Gemma's scale its rows).
    if not is_tied or type(embedding) is nn.Embedding:
        head.weight = nn.Parameter(_narrow(head.weight.data), requires_grad=False)
        if is_tied:
            embedding.weight = head.weight
            embedding.register_forward_hook(lambda module, args, y: y.to(compute_dtype))


def _narrow(weight: Tensor) -> Tensor:
    """The same values in a 16-bit type, or the weight itself where neither holds them all."""
    pieces = weight.split(max(1, _PIECE // weight.shape[1]))
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(piece.to(dtype).to(weight.dtype), piece) for piece in pieces):
            return weight.to(dtype)
    return weight
