"""Embeddings and norms with an adapter's own tensors, for the rows that have such an adapter.

Nothing is wrapped: a step that has such rows hangs forward hooks on the modules concerned, for the time of its forward
pass only. A module's own code runs again on those rows, with its parameters swapped, so that what is special about a
family (scaled embeddings, norms of 1 + w) needs no line here. Step thread only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora_batch import LoraBatch
from .modules import ModuleKind, ModuleTable
from .packing import OverrideKind
from .step_overrides import OwnTensor


class RowOverrides:
    """Applies `LoraBatch.own` outside of the sites.

    Args:
        model: the base's module tree.
        modules: its embedding and norms.
        batch: prepared for the current step.
    """

    def __init__(self, model: nn.Module, modules: ModuleTable, batch: LoraBatch) -> None:
        self._modules = {path: model.get_submodule(path) for path in modules.by_path}
        self._kinds = {path: module.kind for path, module in modules.by_path.items()}
        self._embedding = self._modules[modules.embedding]
        self._num_embeddings = modules.by_path[modules.embedding].shapes["weight"][0]
        self._batch = batch
        # Means something to gradients only, and F.embedding would ask that the weights it is given have such a row.
        self._embedding.padding_idx = None  # type: ignore[assignment]

    def applied(self, ids: Tensor) -> AbstractContextManager[None]:
        """The overrides of the prepared step, for the forward pass of these ids (int64 [T], the flat batch)."""
        return self._hooked(ids) if self._batch.own.by_module else nullcontext()

    def mask_(self, logits: Tensor) -> None:
        """Set the logits [n, width] of ids that a row's vocabulary does not have to -inf."""
        for rows, size in self._batch.own.unknown:
            logits[rows, size:] = -torch.inf

    @contextmanager
    def _hooked(self, ids: Tensor) -> Iterator[None]:
        own = self._batch.own
        handles = []
        try:
            if own.extends_input:
                handles.append(self._embedding.register_forward_pre_hook(self._within_embedding))
            for path, each in own.by_module.items():
                if path in self._modules:
                    handles.append(self._modules[path].register_forward_hook(self._hook(path, each, ids)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _within_embedding(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Any id of the base's in place of those that only an adapter has: its rows are computed by the hook."""
        return (args[0].clamp(max=self._num_embeddings - 1), *args[1:])

    def _hook(self, path: str, own: Sequence[OwnTensor], ids: Tensor) -> Callable[..., None]:
        def embed(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            rows_y = y.view(-1, y.shape[-1])
            for each in own:
                _embed_(module, rows_y[each.rows], ids[each.rows], each)

        def norm(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            x = cast(Tensor, args[0])
            dim = _row_dim(x, len(ids))
            for each in own:
                start, count = each.rows.start, each.rows.stop - each.rows.start
                y.narrow(dim, start, count).copy_(_run(module, each.tensors, x.narrow(dim, start, count)))

        return embed if self._kinds[path] is ModuleKind.EMBEDDING else norm


def _embed_(module: nn.Module, y: Tensor, ids: Tensor, own: OwnTensor) -> None:
    """Embed ids [n] as an adapter does, into y [n, dim], which has the base's rows."""
    match own.kind:
        case OverrideKind.WEIGHT:
            y.copy_(_run(module, own.tensors, ids))
        case OverrideKind.TOKENS:
            assert own.token_ids is not None
            at = torch.searchsorted(own.token_ids, ids).clamp_(max=len(own.token_ids) - 1)
            is_own = own.token_ids[at] == ids
            y.copy_(torch.where(is_own[:, None], _run(module, {"weight": own.tensors["rows"]}, at), y))
        case OverrideKind.EMBEDDING_LORA:
            h = F.embedding(ids, own.tensors["a"]).float()
            y.copy_(torch.addmm(y.float(), h, own.tensors["b"].float(), alpha=own.weight))


def _run(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The module's forward with other parameters, without its hooks."""
    own = dict(module._parameters)
    try:
        module._parameters.update(cast(Mapping[str, nn.Parameter], parameters))
        return cast(Tensor, module.forward(x))
    finally:
        module._parameters.update(own)


def _row_dim(x: Tensor, num_rows: int) -> int:
    """Which dimension of a norm's input [1, ...] are the rows of the flat batch.

    Norms of queries and keys get [1, rows, heads, dim] or, transposed, [1, heads, rows, dim]. With as many heads as
    rows the strides tell: both are views of [rows, heads * dim].
    """
    candidates = [dim for dim in range(1, x.dim() - 1) if x.shape[dim] == num_rows]
    return max(candidates, key=x.stride)
