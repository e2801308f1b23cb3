"""The tensors of a merged model: what each is, and its values piece by piece.

A linear is W' = gain * W + sum of weight * B A and b' = gain * b + offset, computed in float32 and rounded by whoever
writes it. So the only difference from the unmerged adapter in exact arithmetic is that one rounding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import MergeBase, Piece, Rows, pieces
from .edits import Edits, gather_edits
from .members import Member


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the merged model.

    Attributes:
        name: as transformers names it.
        shape: its sizes.
        is_linear: NF4 where the model is served or saved in NF4.
    """

    name: str
    shape: tuple[int, ...]
    is_linear: bool

    @property
    def module(self) -> str:
        """Path of the module that it is a parameter of."""
        return self.name.rpartition(".")[0]

    @property
    def is_weight(self) -> bool:
        """Adapters may change it."""
        return self.name.endswith(".weight")

    @property
    def is_bias(self) -> bool:
        """Adapters may change it, or make it."""
        return self.name.endswith(".bias")


class MergedModel:
    """A base with adapters merged into it.

    Args:
        base: its tensors.
        members: the adapters, checked to have a sum.
        check: called for each piece; ends a cancelled merge by raising.

    Attributes:
        vocab_size: rows of embedding and head.
        is_tied: the head's weight is the embedding's, and is not written.
        new_biases: modules that have a bias now and had none.
    """

    def __init__(self, base: MergeBase, members: tuple[Member, ...], check: Callable[[], None]) -> None:
        self._base = base
        self._check = check
        self._edits = gather_edits(members, base.sites, base.modules)
        self._nothing = Edits()
        sizes = [member.packed.vocab_size for member in members if member.packed.vocab_size is not None]
        self.vocab_size = max(sizes, default=base.modules.vocab_size)
        self.new_biases = frozenset(
            module
            for module, edits in self._edits.items()
            if f"{module}.bias" not in base.shapes and self._adds_bias(edits)
        )
        self.is_tied = base.modules.is_tied and self._stays_tied()

    def parameters(self, biases: frozenset[str]) -> Iterator[Parameter]:
        """Every tensor to be written, in the order in which the base is read best.

        Args:
            biases: modules that are to have a bias and have none in the base; zero where no adapter gives one.
        """
        modules = self._base.modules
        for name, shape in self._base.shapes.items():
            parameter = Parameter(name, self._shape(name, shape), name in self._base.linears)
            yield parameter
            module = parameter.module
            if module in biases and parameter.is_weight:
                yield Parameter(f"{module}.bias", parameter.shape[:1], False)
            if module == modules.embedding and modules.is_tied and not self.is_tied:
                yield Parameter(f"{modules.head}.weight", parameter.shape, False)
                if modules.head in biases:
                    yield Parameter(f"{modules.head}.bias", parameter.shape[:1], False)

    def read(self, parameter: Parameter) -> Iterator[Tensor]:
        """The values of a parameter in rows from the first to the last: float32, not rounded."""
        module = parameter.module
        edits = self._edits.get(module, self._nothing)
        if parameter.is_bias:
            yield self._bias(module, edits, parameter.shape[0])
            return
        if not parameter.is_weight:  # of the architecture's own, such as DiffLlama's lambdas: no adapter changes it
            edits = self._nothing
        rows = None if edits.weight is not None else self._base.open(self._source(parameter.name))
        for piece in pieces(parameter.shape):
            self._check()
            yield self._weight(rows, edits, piece)

    def _weight(self, rows: Rows | None, edits: Edits, piece: Piece) -> Tensor:
        """Rows of a weight.

        Args:
            rows: the base's; None where the adapter has a weight of its own.
            edits: of the module.
            piece: which rows.
        """
        start, stop = piece
        if rows is None:
            assert edits.weight is not None
            values = edits.weight[start:stop].clone()
        else:
            values = _known_rows(rows, piece)
        if edits.rows is not None:
            ids, own = edits.rows
            first, last = torch.searchsorted(ids, torch.tensor([start, stop])).tolist()
            values[ids[first:last] - start] = own[first:last]
        # Of a head that has more rows than the base's, gains and deltas are those of the base's rows.
        if edits.gain is not None:
            gain = edits.gain.gain[start:stop, None]
            values[: gain.shape[0]] *= gain
        for a, b, weight in edits.deltas:
            part = b[:, start:stop].t()
            values[: part.shape[0]].addmm_(part, a, alpha=weight)
        return values

    def _bias(self, module: str, edits: Edits, size: int) -> Tensor:
        name = f"{module}.bias"
        if edits.bias is not None:
            values = edits.bias.clone()
        elif name in self._base.shapes:
            values = self._base.open(name).read(0, self._base.shapes[name][0])
        else:
            values = torch.zeros(size)
        if edits.gain is not None:
            known = values[: edits.gain.gain.shape[0]]
            known.mul_(edits.gain.gain).add_(edits.gain.offset)
        return values

    def _adds_bias(self, edits: Edits) -> bool:
        return edits.bias is not None or (edits.gain is not None and bool(edits.gain.offset.any()))

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The base's, but for the vocabulary's size."""
        module, _, leaf = name.rpartition(".")
        if module in (self._base.modules.embedding, self._base.modules.head) and leaf in ("weight", "bias"):
            return (self.vocab_size, *shape[1:])
        return shape

    def _source(self, name: str) -> str:
        """The base's parameter that a weight is made of."""
        modules = self._base.modules
        is_shared = modules.is_tied and name == f"{modules.head}.weight"
        return f"{modules.embedding}.weight" if is_shared else name

    def _stays_tied(self) -> bool:
        """Whether embedding and head, which the base ties, are the same after the merge, too."""
        modules = self._base.modules
        embedding, head = self._edits.get(modules.embedding), self._edits.get(modules.head)
        if embedding is None and head is None:
            return True
        if modules.head in self.new_biases:
            return False
        name = f"{modules.embedding}.weight"
        shape = self._shape(name, self._base.shapes[name])
        both = [Parameter(f"{module}.weight", shape, False) for module in (modules.embedding, modules.head)]
        return all(torch.equal(one, other) for one, other in zip(*map(self.read, both), strict=True))


def _known_rows(rows: Rows, piece: Piece) -> Tensor:
    """Rows of the base; those beyond its vocabulary, which an adapter sets, are zero."""
    start, stop = piece
    known = rows.shape[0]
    if stop <= known:
        return rows.read(start, stop)
    values = torch.zeros(stop - start, *rows.shape[1:])
    if start < known:
        values[: known - start] = rows.read(start, known)
    return values
