"""What a captured step can apply to its rows, as plain data. Imports no torch.

A graph has the sizes of its launches baked in, but not the weights: it serves every step whose adapters need no more
than it was captured for.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

# Sizes that the ranks of captured steps are rounded up to; steps with larger ranks are not captured.
RANK_BUCKETS: Final = (16, 64, 256)


@dataclass(frozen=True, slots=True)
class LoraShape:
    """What some adapters, or the rows of a step, need.

    Attributes:
        rank: largest of a slice; 0: nothing has low-rank deltas.
        kinds: last names of the adapted sites, such as `qkv_proj`.
        affine: something has gains and offsets.
        weighted: something has a weight other than 1.
        one_slot: no two rows have different adapters; of rows.
    """

    rank: int = 0
    kinds: frozenset[str] = frozenset()
    affine: bool = False
    weighted: bool = False
    one_slot: bool = False

    def covers(self, other: "LoraShape") -> bool:
        """Whether what was captured for this shape computes a step of the other one right."""
        return (
            self.rank >= other.rank
            and self.affine >= other.affine
            and self.weighted >= other.weighted
            and self.one_slot <= other.one_slot
            and self.kinds >= other.kinds
        )

    @property
    def cost(self) -> tuple[int, int, bool, bool, bool]:
        """Orders shapes by what they launch, roughly; of several that cover a step the least is taken."""
        return len(self.kinds), self.rank, self.affine, self.weighted, not self.one_slot

    def rounded_up(self) -> "LoraShape | None":
        """With the rank of a bucket; None: it is larger than all of them."""
        if self.rank == 0:
            return self
        rank = next((bucket for bucket in RANK_BUCKETS if bucket >= self.rank), None)
        return None if rank is None else replace(self, rank=rank)


# Of steps that no adapter is part of.
NO_LORA: Final = LoraShape()


def union(shapes: Iterable[LoraShape], *, weighted: bool, one_slot: bool) -> LoraShape:
    """What all of them together need."""
    rank, kinds, affine = 0, NO_LORA.kinds, False
    for shape in shapes:
        rank = max(rank, shape.rank)
        affine = affine or shape.affine
        if not kinds >= shape.kinds:
            kinds |= shape.kinds
    return LoraShape(rank, kinds, affine, weighted, one_slot)
