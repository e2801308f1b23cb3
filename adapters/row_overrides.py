"""Embeddings and norms with an adapter's own tensors, for the rows that have such an adapter.

Nothing is wrapped. Where transformers' forward runs, a step that has such rows hangs forward hooks on the modules
concerned, for the time of its forward pass only; the lean decoder asks for the same rows itself. A module's own code
runs again on those rows, with its parameters swapped, so that what is special about a family (scaled embeddings, norms
of 1 + w) needs no line here. Step thread only.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
        self._embedding_path = modules.embedding
        self._embedding = self._modules[modules.embedding]
        self._num_embeddings = modules.by_path[modules.embedding].shapes["weight"][0]
        self._batch = batch
        # Means something to gradients only, and F.embedding would ask that the weights it is given have such a row.
        self._embedding.padding_idx = None  # type: ignore[assignment]

    @property
    def active(self) -> bool:
        """Whether rows of the prepared step have an embedding or norm of their own."""
        own = self._batch.own
        return own.extends_input or not self._modules.keys().isdisjoint(own.by_module)

    def known_ids(self, ids: Tensor) -> Tensor:
        """The ids with any id of the base's in place of those that only an adapter has: `embed_` does their rows."""
        return ids.clamp(max=self._num_embeddings - 1) if self._batch.own.extends_input else ids

    def embed_(self, ids: Tensor, y: Tensor) -> None:
        """Put the rows that have an embedding of their own into y [T, dim], the base's embedding of ids (int64 [T])."""
        for each in self._batch.own.by_module.get(self._embedding_path, ()):
            _embed_(self._embedding, y[each.rows], ids[each.rows], each)

    def normalize_(self, path: str, x: Tensor, y: Tensor, dim: int = 0) -> None:
        """Put the rows that have the norm at `path` of their own into y, the base's norm of x; rows are along `dim`."""
        for each in self._batch.own.by_module.get(path, ()):
            start, count = each.rows.start, each.rows.stop - each.rows.start
            y.narrow(dim, start, count).copy_(_run(self._modules[path], each.tensors, x.narrow(dim, start, count)))

    def rows_of(self, *paths: str) -> list[slice]:
        """The rows that have one of these modules of their own, in order; no two overlap."""
        own = [each.rows for path in paths for each in self._batch.own.by_module.get(path, ())]
        # Slices of whole segments: equal or disjoint.
        return [slice(start, stop) for start, stop in sorted({(rows.start, rows.stop) for rows in own})]

    def mask_(self, logits: Tensor) -> None:
        """Set the logits [n, width] of ids that a row's vocabulary does not have to -inf."""
        for rows, size in self._batch.own.unknown:
            logits[rows, size:] = -torch.inf

    @contextmanager
    def applied(self, ids: Tensor) -> Iterator[None]:
        """Hooks for transformers' forward pass of the prepared step, whose flat batch are these ids (int64 [T])."""
        own = self._batch.own
        handles = []
        try:
            if own.extends_input:
                handles.append(self._embedding.register_forward_pre_hook(self._within_embedding))
            for path in own.by_module:
                if path in self._modules:
                    handles.append(self._modules[path].register_forward_hook(self._hook(path, ids)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _within_embedding(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.known_ids(args[0]), *args[1:])

    def _hook(self, path: str, ids: Tensor) -> Callable[..., None]:
        def embed(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            self.embed_(ids, y.view(-1, y.shape[-1]))

        def norm(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            x = cast(Tensor, args[0])
            self.normalize_(path, x, y, _row_dim(x, len(ids)))

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
