"""The adapted rows of a step by adapter, as the CPU's LoRA takes them: found once a step, and once for sites alike.

A decode step on a CPU has many segments of few rows, where calls cost more than arithmetic, and reading weights more
than both. So the rows of all segments, of all passes too, are put together by slot: each adapter is read once.
Segments of many rows stay as they are, since gathering those would cost more. `lora_batches` divides the rest.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .lora_batches import Batch, Group, make_batches, make_long_batch

# Longer segments fill a matmul of their own, and their rows are too many to be gathered.
_MAX_GATHERED_LENGTH = 16


class Piece(NamedTuple):
    """Rows [start, end), to which a slot's adapter is applied with a factor."""

    slot: int
    start: int
    end: int
    weight: float


class SiteBatches(NamedTuple):
    """What adapts the rows of one site.

    Attributes:
        first: element of the arena from which the positions count.
        batches: in the order in which they are computed.
    """

    first: int
    batches: list[Batch]


class _AdaptedSlots(NamedTuple):
    """The slots that adapt sites of the same ranks.

    Attributes:
        slots: int64, ascending.
        ranks: of each.
        by_spacing: distances of the blocks -> batches, in the order in which they are computed.
    """

    slots: NDArray[np.int64]
    ranks: list[tuple[int, ...]]
    by_spacing: dict[bytes, list[Batch]]


class AdaptedRows:
    """The rows that adapters change in one step.

    Args:
        pieces: of any slots in any order; pieces of different slots may overlap.
        dtype: of x, y and arena.
    """

    def __init__(self, pieces: Iterable[Piece], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._long: dict[int, list[Piece]] = {}
        self._short: dict[int, list[tuple[int, float]]] = {}
        slots = set()
        for piece in pieces:
            slot, start, end, weight = piece
            slots.add(slot)
            if end - start > _MAX_GATHERED_LENGTH:
                self._long.setdefault(slot, []).append(piece)
            else:
                self._short.setdefault(slot, []).extend((row, weight) for row in range(start, end))
        self._slots = np.array(sorted(slots), dtype=np.int64)
        self._by_ranks: dict[bytes, _AdaptedSlots] = {}

    def at_site(self, offsets: NDArray[np.int64], ranks: NDArray[np.int32]) -> SiteBatches | None:
        """Returns how to compute a site; None where no slot adapts it.

        Sites at which the blocks have the same ranks and distances, which is nearly all of them, share the answer.

        Args:
            offsets: [max_slots], as for `lora.lora_shrink`.
            ranks: [max_slots, num_slices], likewise.
        """
        slot_ranks = ranks[self._slots]
        key = slot_ranks.tobytes()
        adapted = self._by_ranks.get(key)
        if adapted is None:
            any_rank = slot_ranks.any(axis=1)
            used = [tuple(row) for row in slot_ranks[any_rank].tolist()]
            adapted = self._by_ranks[key] = _AdaptedSlots(self._slots[any_rank], used, {})
        if not adapted.ranks:
            return None
        starts = offsets[adapted.slots]
        first = starts[0]
        distances = starts - first
        key = distances.tobytes()
        batches = adapted.by_spacing.get(key)
        if batches is None:
            batches = self._batches(adapted.slots.tolist(), adapted.ranks, distances.tolist())
            adapted.by_spacing[key] = batches
        return SiteBatches(int(first), batches)

    def _batches(self, slots: Sequence[int], ranks: Sequence[tuple[int, ...]], positions: Sequence[int]) -> list[Batch]:
        batches: list[Batch] = []
        alike: dict[tuple[int, ...], list[Group]] = {}
        for slot, slot_ranks, position in zip(slots, ranks, positions, strict=True):
            for piece in self._long.get(slot, ()):
                batches.append(make_long_batch(slot_ranks, position, range(piece.start, piece.end), piece.weight))
            if slot in self._short:
                rows_weights = sorted(self._short[slot])
                group = Group(position, [row for row, _ in rows_weights], [weight for _, weight in rows_weights])
                alike.setdefault(slot_ranks, []).append(group)
        for slot_ranks, groups in alike.items():
            batches += make_batches(slot_ranks, groups, self._dtype)
        return batches
