"""What a base has beside its sites, and what can be asked of its weights. Imports no torch.

A *site* is a linear that runs as one NF4 matmul (`sites.py`); the output head is one, too, though it is 16 bit. What is
left are embeddings and norms: their rows can be computed with an adapter's own tensors in place of the base's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class ModuleKind(StrEnum):
    """What a module of the base that is no site does."""

    EMBEDDING = "embedding"  # the input embedding: token id -> row of its weight
    NORM = "norm"  # row by row


@dataclass(frozen=True, slots=True)
class Module:
    """One module of the base that has parameters of its own and is no site.

    Attributes:
        path: as PEFT names it, e.g. `model.embed_tokens`, `model.layers.0.input_layernorm`, `model.norm`.
        kind: what it does.
        shapes: parameter name (`weight`, `bias`) -> its shape.
    """

    path: str
    kind: ModuleKind
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ModuleTable:
    """The modules of a base that are no sites.

    Attributes:
        by_path: every one of them.
        embedding: path of the input embedding.
        head: path of the output head, which is a slice of the last site.
        is_tied: whether the head's weight is the embedding's.
        vocab_size: rows of the embedding and of the head.
        embedding_scale: the embedding module multiplies its rows by this (Gemma 3); a LoRA on it is scaled likewise.
    """

    by_path: Mapping[str, Module]
    embedding: str
    head: str
    is_tied: bool
    vocab_size: int
    embedding_scale: float = 1.0


class BaseWeights(Protocol):
    """The base's own weights, for what an adapter must be compared or computed with. Any loader thread; streams."""

    def column_norms(self, module: str, lora_a: "Tensor", lora_b: "Tensor") -> "Tensor":
        """L2 norm of each row of W + B A, as DoRA needs it: float32 [out_features] on the CPU.

        Args:
            module: path of a slice of a site.
            lora_a: float32 [rank, in_features] on the CPU.
            lora_b: float32 [out_features, rank] on the CPU, scaling folded in.
        """
        ...

    def bias(self, module: str) -> "Tensor | None":
        """The bias of a slice of a site: float32 [out_features] on the CPU; None if it has none."""
        ...

    def equals(self, module: str, parameter: str, tensor: "Tensor") -> bool:
        """Whether a CPU tensor is, in the compute type, just what the base has there. For embedding and head."""
        ...
