"""The base of a merge: its tensors one at a time, in float32, and what adapters ask of its weights."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from ..modules import ModuleTable
from ..sites import SiteTable

# Elements that are held in float32 at once: 4 MiB.
PIECE: Final = 2**20


class Rows(Protocol):
    """One parameter, read piece by piece."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes; a single number has one row."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """[start, stop) of its first dimension: float32 on the CPU, the caller's to change."""
        ...


class MergeBase(Protocol):
    """The weights that adapters are merged onto: the 16-bit ones, or the values of the NF4 ones."""

    @property
    def sites(self) -> SiteTable:
        """Its linears."""
        ...

    @property
    def modules(self) -> ModuleTable:
        """What it has beside them."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name of a parameter, as transformers names it -> its sizes, in the order in which they are read best.

        A tied head is not among them.
        """
        ...

    @property
    def linears(self) -> frozenset[str]:
        """Names of the weights that are NF4 where the base is served."""
        ...

    def open(self, name: str) -> Rows:
        """A parameter; hold one at a time."""
        ...


class Piece(NamedTuple):
    """Rows [start, stop) of a parameter."""

    start: int
    stop: int


def pieces(shape: Sequence[int]) -> Iterator[Piece]:
    """The rows of a parameter, a bounded number of elements at a time. A single number has one row."""
    rows = shape[0] if shape else 1
    step = max(1, PIECE // max(1, math.prod(shape[1:])))
    for start in range(0, rows, step):
        yield Piece(start, min(start + step, rows))


class MergeBaseWeights:
    """The `BaseWeights` of a base that is merged onto.

    Args:
        base: its tensors.
        check: called for each piece; ends a cancelled merge by raising.
    """

    def __init__(self, base: MergeBase, check: Callable[[], None]) -> None:
        self._base = base
        self._check = check

    def column_norms(self, module: str, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """See `BaseWeights.column_norms`."""
        rows = self._base.open(f"{module}.weight" if not self._is_tied(module) else self._embedding)
        norms = torch.empty(rows.shape[0])
        for start, stop in pieces(rows.shape):
            self._check()
            norms[start:stop] = torch.linalg.vector_norm(
                torch.addmm(rows.read(start, stop), lora_b[start:stop], lora_a), dim=1
            )
        return norms

    def bias(self, module: str) -> Tensor | None:
        """See `BaseWeights.bias`."""
        name = f"{module}.bias"
        if name not in self._base.shapes:
            return None
        return self._base.open(name).read(0, self._base.shapes[name][0])

    def equals(self, module: str, parameter: str, tensor: Tensor) -> bool:
        """See `BaseWeights.equals`; the compute type is bfloat16, in which QLoRA keeps what is not quantized."""
        name = self._embedding if self._is_tied(module) and parameter == "weight" else f"{module}.{parameter}"
        if name not in self._base.shapes or self._base.shapes[name] != tuple(tensor.shape):
            return False
        rows = self._base.open(name)
        return all(
            torch.equal(rows.read(start, stop).bfloat16(), tensor[start:stop].bfloat16())
            for start, stop in pieces(rows.shape)
        )

    @property
    def _embedding(self) -> str:
        return f"{self._base.modules.embedding}.weight"

    def _is_tied(self, module: str) -> bool:
        return module == self._base.modules.head and self._base.modules.is_tied
