"""The resident base's own weights, for adapters that are defined by them (DoRA) or compared with them.

Rows are dequantized piece by piece, so a question costs some megabytes whatever the size of the weight. Asked by loader
threads while the step thread computes: on CUDA the work goes to a stream of its own. What is asked for is remembered
as tensors, not as modules: the step thread swaps parameters of modules during a forward pass (`row_overrides`).
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from ...adapters.modules import ModuleTable
from ...adapters.sites import SiteTable
from ...kernels.nf4 import nf4_rows
from ...kernels.nf4_weight import NF4Weight
from .linears import NF4Linear, StackedLinear

# Elements that are dequantized at once: 16 MiB in float32.
_PIECE: Final = 2**22


class _Slice(NamedTuple):
    """Rows [start, stop) of a weight."""

    weight: NF4Weight | Tensor
    bias: Tensor | None
    start: int
    stop: int


class ResidentWeights:
    """The `BaseWeights` of a loaded base; any thread.

    Args:
        model: filled, its sites installed and not yet wrapped.
        site_table: of the model.
        module_table: of the model.
        compute_dtype: in which weights are compared; one may be kept in a narrower type.
    """

    def __init__(
        self, model: nn.Module, site_table: SiteTable, module_table: ModuleTable, compute_dtype: torch.dtype
    ) -> None:
        self._compute_dtype = compute_dtype
        self._slices: dict[str, _Slice] = {}
        for site in site_table.sites:
            linear = model.get_submodule(site.name)
            linear = linear.linear if isinstance(linear, StackedLinear) else linear
            assert isinstance(linear, NF4Linear | nn.Linear)
            weight = linear.nf4 if isinstance(linear, NF4Linear) else linear.weight.data
            bias = None if linear.bias is None else linear.bias.data
            start = 0
            for piece in site.slices:
                stop = start + piece.out_features
                self._slices[piece.module] = _Slice(weight, bias, start, stop)
                start = stop
        dense = {path: model.get_submodule(path) for path in (module_table.embedding, module_table.head)}
        self._dense = {
            (path, name): parameter.data
            for path, module in dense.items()
            for name, parameter in module.named_parameters()
        }
        self._device = self._dense[module_table.embedding, "weight"].device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # which has filled the weights

    @torch.no_grad()
    def column_norms(self, module: str, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """See `BaseWeights.column_norms`."""
        weight, _, start, stop = self._slices[module]
        with self._on_stream():
            a, b = lora_a.to(self._device), lora_b.to(self._device)
            norms = torch.empty(stop - start, device=self._device)
            step = max(1, _PIECE // a.shape[1])
            for first in range(start, stop, step):
                last = min(first + step, stop)
                rows = _rows(weight, first, last)
                part = slice(first - start, last - start)
                norms[part] = torch.linalg.vector_norm(torch.addmm(rows, b[part], a), dim=1)
            return norms.cpu()

    @torch.no_grad()
    def bias(self, module: str) -> Tensor | None:
        """See `BaseWeights.bias`."""
        _, bias, start, stop = self._slices[module]
        with self._on_stream():
            return None if bias is None else bias[start:stop].to("cpu", torch.float32, copy=True)

    @torch.no_grad()
    def equals(self, module: str, parameter: str, tensor: Tensor) -> bool:
        """See `BaseWeights.equals`."""
        own = self._dense.get((module, parameter))
        if own is None or own.shape != tensor.shape:
            return False
        step = max(1, _PIECE // max(1, own[0].numel()))
        dtype = self._compute_dtype
        with self._on_stream():
            return all(
                torch.equal(mine.to(dtype), theirs.to(self._device).to(dtype))
                for mine, theirs in zip(own.split(step), tensor.split(step), strict=True)
            )

    def _on_stream(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _rows(weight: NF4Weight | Tensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop): float32."""
    return nf4_rows(weight, start, stop) if isinstance(weight, NF4Weight) else weight[start:stop].float()
