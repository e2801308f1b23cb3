"""Device memory of adapters: the arena, and the tables that tell the kernels where each slot's blocks lie.

What few adapters have is kept by slot beside the tables, so that one look tells whether a step needs it: affines,
overrides, another vocabulary.

`reserve`, `remove` and `plan_compaction` change bookkeeping only; the adapter manager calls them under its lock.
`write` is called by the thread that copies adapters in, `move` by the step thread between steps; neither needs the
lock, because a slot is written before anyone is told of it, and nothing is written while extents move.
"""

import dataclasses
import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ..kernels.blank import blank
from .arena import ExtentAllocator, Move, aligned
from .lora_shape import LoraShape
from .packing import Override, PackedAdapter, Region
from .priority import yield_core
from .sites import SiteTable

# Overlapping extents are moved through a buffer of this size.
MOVE_BUFFER_BYTES = 8 * 2**20
# Elements that are copied on a CPU without giving way: some 600 us of one thread.
_TURN: Final = 2**21


class Placement(NamedTuple):
    """Where an adapter lies: its slot, and the first element of its extent in the arena."""

    slot: int
    start: int


class DeviceStore:
    """Adapters resident on one device.

    Args:
        site_table: the base's sites.
        dtype: of the arena, the compute type.
        device: where it lies.
        budget_bytes: size of the arena; allocated at once.
        max_slots: how many adapters can be resident.

    Attributes:
        site_table: as given.
        arena: [elements], dtype.
        site_offsets: int64 [num_sites, max_slots], element of the arena where the slot's block of the site starts; -1 =
            not adapted. Columns of free slots are stale: no batch refers to them, and `write` sets every entry.
        site_ranks: int32 [num_sites, max_slots, max_slices]; 0 = slice not adapted.
        site_affines: int64 [num_sites, max_slots], element of the arena where the slot's gains and offsets of the site
            start; -1 = none. Free slots: as site_offsets.
        rank_sums: int32 [max_slots, num_sites] on the CPU: sum of the slice ranks, what `LoraBatch` needs on the host.
        has_affine: bool [max_slots, num_sites] on the CPU: whether site_affines is not -1, for the same.
        affine_slots: slots that have an affine at any site.
        overrides: slot -> what it puts in place of the base's own; their token ids are on the device.
        vocab_sizes: slot -> the token ids that it knows are below this; only those that differ from the base.
        shapes: slot -> what its low-rank deltas and affines need of a captured step.
    """

    def __init__(
        self, site_table: SiteTable, dtype: torch.dtype, device: torch.device, budget_bytes: int, max_slots: int
    ) -> None:
        num_sites, max_slices = len(site_table.sites), site_table.max_slices
        self.site_table = site_table
        self.device = device
        self.max_slots = max_slots
        self._allocator = ExtentAllocator(budget_bytes // dtype.itemsize)
        self.arena = blank([self._allocator.capacity], dtype, device)
        self.site_offsets = torch.full((num_sites, max_slots), -1, dtype=torch.int64, device=device)
        self.site_ranks = torch.zeros((num_sites, max_slots, max_slices), dtype=torch.int32, device=device)
        self.site_affines = torch.full((num_sites, max_slots), -1, dtype=torch.int64, device=device)
        self.rank_sums = torch.zeros((max_slots, num_sites), dtype=torch.int32)
        self.has_affine = torch.zeros((max_slots, num_sites), dtype=torch.bool)
        self.affine_slots: set[int] = set()
        self.overrides: dict[int, tuple[Override, ...]] = {}
        self.vocab_sizes: dict[int, int] = {}
        self.shapes: dict[int, LoraShape] = {}
        # Allocated with the rest: compaction, which makes room, must not fail for want of it.
        self._move_buffer = torch.empty(MOVE_BUFFER_BYTES // dtype.itemsize, dtype=dtype, device=device)
        self._kinds = [site.kind for site in site_table.sites]
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._starts: dict[int, int] = {}  # slot -> start of its extent

    @property
    def capacity_bytes(self) -> int:
        """Bytes that extents can take together."""
        return self._allocator.capacity * self.arena.element_size()

    @property
    def used_bytes(self) -> int:
        """Bytes that extents take."""
        return self._allocator.used_elements * self.arena.element_size()

    def extent_bytes(self, packed: PackedAdapter) -> int:
        """Bytes of the extent that an adapter takes."""
        return aligned(max(packed.data.numel(), 1)) * self.arena.element_size()

    def reserve(self, packed: PackedAdapter) -> Placement | None:
        """Take a slot and an extent; None when no slot is free or no extent large enough (compaction may make one)."""
        if not self._free_slots:
            return None
        # An adapter may have no element at all (AdaLoRA that kept no rank, loaded with allow_zero).
        start = self._allocator.alloc(max(packed.data.numel(), 1))
        if start is None:
            return None
        slot = self._free_slots.pop()
        self._starts[slot] = start
        return Placement(slot, start)

    def write(self, placement: Placement, packed: PackedAdapter, in_turns: bool = False) -> None:
        """Copy weights and table columns into a reserved place, on the current stream.

        The columns are written whole, so nothing of the slot's previous adapter stays.

        Args:
            placement: the place.
            packed: the adapter.
            in_turns: on a CPU, give the core back to whoever waits for it every now and then.
        """
        slot, start = placement
        extent = self.arena[start : start + packed.data.numel()]
        if in_turns:
            _copy_in_turns(packed.data, extent)
        else:
            extent.copy_(packed.data, non_blocking=True)
        self.site_offsets[:, slot] = _absolute(packed.site_offsets, start).to(self.device)
        self.site_ranks[:, slot] = packed.site_ranks.to(self.device)
        self.site_affines[:, slot] = _absolute(packed.site_affines, start).to(self.device)
        self.rank_sums[slot] = packed.site_ranks.sum(dim=1, dtype=torch.int32)
        self.has_affine[slot] = packed.site_affines >= 0
        if self.has_affine[slot].any():
            self.affine_slots.add(slot)
        self.shapes[slot] = self._shape_of(packed)
        if packed.overrides:
            self.overrides[slot] = tuple(self._with_device_ids(override) for override in packed.overrides)
        if packed.vocab_size is not None:
            self.vocab_sizes[slot] = packed.vocab_size

    def install(self, packed: PackedAdapter) -> int | None:
        """Reserve and write in one: the slot, or None when there is no room."""
        placement = self.reserve(packed)
        if placement is None:
            return None
        self.write(placement, packed)
        return placement.slot

    def remove(self, slot: int) -> None:
        """Free a slot and its extent. Nothing is written: only kernels already launched may still read them.

        Raises:
            KeyError: the slot is free.
        """
        self._allocator.free(self._starts.pop(slot))
        self.affine_slots.discard(slot)
        self.overrides.pop(slot, None)
        self.vocab_sizes.pop(slot, None)
        self.shapes.pop(slot, None)  # never written where the copy failed
        self._free_slots.append(slot)

    def override_tensor(self, slot: int, region: Region) -> Tensor:
        """The tensor of a region of a slot's adapter: a view of the arena, right until extents move."""
        start = self._starts[slot] + region.start
        return self.arena[start : start + math.prod(region.shape)].view(region.shape)

    def compact(self) -> int:
        """Remove all gaps between extents; the number of extents moved. For a store that only one thread uses."""
        moves = self.plan_compaction()
        self.move(moves)
        return len(moves)

    def plan_compaction(self) -> list[tuple[int, Move]]:
        """Lay the extents out without gaps; (slot, move) of each that has to move, in the order `move` makes them."""
        slots = {start: slot for slot, start in self._starts.items()}
        moves = [(slots[move.source], move) for move in self._allocator.compact()]
        for slot, move in moves:
            self._starts[slot] = move.target
        return moves

    def move(self, moves: list[tuple[int, Move]]) -> None:
        """Move extents on the device and point their slots' tables to them, on the current stream."""
        for slot, (source, target, size) in moves:
            self._slide(source, target, size, self._move_buffer)
            for table in (self.site_offsets, self.site_affines):
                offsets = table[:, slot]
                offsets += torch.where(offsets >= 0, target - source, 0)

    def check_integrity(self) -> None:
        """Assert that slots and extents are each owned exactly once."""
        self._allocator.check_integrity()
        assert sorted([*self._free_slots, *self._starts]) == list(range(self.max_slots))
        assert len(set(self._starts.values())) == len(self._starts)
        assert self.affine_slots | self.overrides.keys() | self.vocab_sizes.keys() <= self._starts.keys()

    def _shape_of(self, packed: PackedAdapter) -> LoraShape:
        is_adapted = (packed.site_ranks > 0).any(dim=1) | (packed.site_affines >= 0)
        kinds = frozenset(kind for kind, adapted in zip(self._kinds, is_adapted.tolist(), strict=True) if adapted)
        return LoraShape(int(packed.site_ranks.max()), kinds, bool((packed.site_affines >= 0).any()))

    def _with_device_ids(self, override: Override) -> Override:
        if override.token_ids is None:
            return override
        return dataclasses.replace(override, token_ids=override.token_ids.to(self.device))

    def _slide(self, source: int, target: int, size: int, buffer: Tensor) -> None:
        """Copy [source, source + size) to [target, ...), target < source, in ascending chunks.

        A chunk no longer than the distance cannot overlap its target. Shorter distances go through the buffer: a chunk
        is read whole before its target is written, and the target ends below all that is still to be read.
        """
        direct = source - target >= min(buffer.numel(), size)
        step = source - target if direct else buffer.numel()
        for i in range(0, size, step):
            n = min(step, size - i)
            chunk = self.arena[source + i : source + i + n]
            if not direct:
                chunk = buffer[:n].copy_(chunk)
            self.arena[target + i : target + i + n].copy_(chunk)


def _copy_in_turns(source: Tensor, target: Tensor) -> None:
    """Copy on the CPU, whose cores the step thread's team may want meanwhile."""
    for start in range(0, source.numel(), _TURN):
        target[start : start + _TURN].copy_(source[start : start + _TURN])
        yield_core()


def _absolute(relative: Tensor, start: int) -> Tensor:
    """Offsets in the arena of an extent that starts at `start`: int64 [num_sites], -1 stays -1."""
    return torch.where(relative >= 0, relative + start, relative)
