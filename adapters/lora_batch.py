"""Which rows of a step belong to which adapters: prepared once a step, shared by all sites, on the step thread only.

The rows of a step come sorted by *batch slot*: a device slot, or a number from `max_slots` on that stands for a
composition of several. A composition runs in *passes*: pass 0 applies the first member of every adapted row, pass 1 the
second of the rows that have one, and so on. Running example with 2 slots: 3 base rows, 2 rows of slot 1, then 4 of
batch slot 2, which is 0.7 of slot 0 and 0.3 of slot 1 ->

    pass 0   starts [0, 3, 5, 9]   slots [-1, 1, 0]   weights [1, 1, 0.7]
    pass 1   starts [0, 5, 9]      slots [-1, 1]      weights [1, 0.3]

A batch of plain adapters has one pass and no weights, a batch of base rows no pass at all.

On a CPU the layers take the low-rank deltas of all passes together instead, by adapter (`AdaptedRows`); a step of the
same rows as the one before it has the same.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, cast

import torch
from torch import Tensor

from ..kernels.lora_rows import AdaptedRows, Piece
from ..kernels.overlap import SideStream
from .adaptation import MAX_MEMBERS
from .device_store import DeviceStore
from .staging import StagedValues
from .step_overrides import NOTHING, SlotRows, collect_tensors

# Slot of rows that no adapter adapts.
BASE_SLOT: Final = -1

# A batch slot -> its (device slot, weight), one or several.
Expand = Callable[[int], Sequence[tuple[int, float]]]
# The same of one step's batch slots that are no device slots.
_Members = Mapping[int, Sequence[tuple[int, float]]]


def _no_compositions(slot: int) -> Sequence[tuple[int, float]]:
    raise AssertionError(f"batch slot {slot} is no device slot")


class Segments(NamedTuple):
    """Rows in order, run by run, as the kernels take them; views of preallocated tensors on the device.

    Attributes:
        starts: int32 [G + 1].
        slots: int32 [G]; -1 = base.
        weights: float32 [G]; None: all 1.
    """

    starts: Tensor
    slots: Tensor
    weights: Tensor | None


class _Runs(NamedTuple):
    """Rows that are beside each other and have the same device slot and weight, run by run.

    Attributes:
        slots: of each run; -1 = base.
        rows: how many.
        weights: of each run; 1 for the base.
    """

    slots: list[int]
    rows: list[int]
    weights: list[float]


class _StagedSegments:
    """The tensors of one `Segments`."""

    def __init__(self, max_segments: int, device: torch.device) -> None:
        self.starts = StagedValues(max_segments + 1, torch.int32, device)
        self.slots = StagedValues(max_segments, torch.int32, device)
        self.weights = StagedValues(max_segments, torch.float32, device)
        self.empty = Segments(self.starts.tensor[:1], self.slots.tensor[:0], None)

    def fill(self, runs: _Runs) -> Segments:
        starts = [0, *itertools.accumulate(runs.rows)]
        is_weighted = any(weight != 1.0 for weight in runs.weights)
        return Segments(
            self.starts.fill(starts),
            self.slots.fill(runs.slots),
            self.weights.fill(runs.weights) if is_weighted else None,
        )


class Pass:
    """One member of every row that has so many.

    Attributes:
        max_ranks: for each site the largest sum of slice ranks among the pass's slots; 0 = no row adapts it.
        affines: for each site whether one of the slots has an affine there; None: none has one anywhere.
        has_one_slot: all rows that it adapts have the same device slot.
        flat: segments of the flat batch.
        sampled: of the rows that the head computes; set where the pass changes the head.
    """

    def __init__(self, store: DeviceStore, max_segments: int) -> None:
        self._store = store
        self._rank_sums = store.rank_sums.numpy()
        self._has_affine = store.has_affine.numpy()
        self._flat = _StagedSegments(max_segments, store.device)
        self._sampled = _StagedSegments(max_segments, store.device)
        self.max_ranks: list[int] = []
        self.affines: list[bool] | None = None
        self.has_one_slot = False
        self.flat = self._flat.empty
        self.sampled = self._sampled.empty

    @property
    def changes_head(self) -> bool:
        """Whether `sampled` has to be filled."""
        return self.max_ranks[-1] > 0 or (self.affines is not None and self.affines[-1])  # the head is the last site

    def fill(self, flat: _Runs) -> None:
        """Describe the pass in the next step; some row is adapted."""
        slots = set(flat.slots)
        slots.discard(BASE_SLOT)
        self.max_ranks = self._rank_sums[list(slots)].max(axis=0).tolist()
        self.has_one_slot = len(slots) == 1
        self.affines = None
        if not self._store.affine_slots.isdisjoint(slots):
            self.affines = cast(list[bool], self._has_affine[list(slots)].any(axis=0).tolist())
        self.flat = self._flat.fill(flat)

    def fill_sampled(self, sampled: _Runs) -> None:
        """Describe the rows that the head computes."""
        self.sampled = self._sampled.fill(sampled)


class _Grouping:
    """Rows by adapter of the last step's runs, which the next step mostly has too."""

    def __init__(self) -> None:
        self._runs: list[_Runs] = []
        self._rows = AdaptedRows(())

    def group(self, passes: list[_Runs]) -> AdaptedRows:
        """The rows that the passes adapt."""
        if passes != self._runs:
            self._runs, self._rows = passes, AdaptedRows(_pieces(passes))
        return self._rows


class LoraBatch:
    """What the LoRA layers and `RowOverrides` do in the current step.

    Args:
        store: where the adapters are.
        max_tokens: rows of a step at most.
        max_segments: segments of a step at most.

    Attributes:
        passes: none where no row is adapted.
        flat_rows: on a CPU, what the passes adapt of the flat batch, by adapter; None: the passes are to be taken.
        sampled_rows: the same of the rows that the head computes, where a pass changes it.
        is_adapted: for each site whether a pass has a rank there; goes with flat_rows.
        own: what rows of this step compute with tensors of their adapter in place of the base's; mostly empty.
        side_stream: where LoRA may run beside the base's matmuls; None on a CPU.
    """

    def __init__(self, store: DeviceStore, max_tokens: int, max_segments: int) -> None:
        self.store = store
        self.passes: tuple[Pass, ...] = ()
        self.is_adapted: list[bool] = []
        self.own = NOTHING
        self.flat_rows: AdaptedRows | None = None
        self.sampled_rows: AdaptedRows | None = None
        self._all_passes = tuple(Pass(store, max_segments) for _ in range(MAX_MEMBERS))
        self.side_stream = SideStream(store.device) if store.device.type == "cuda" else None
        self._groupings: tuple[_Grouping, _Grouping] | None = None
        if store.device.type == "cpu":
            self._groupings = _Grouping(), _Grouping()
        self._max_tokens = max_tokens
        self._max_segments = max_segments

    def prepare(
        self,
        segments: Sequence[tuple[int, int]],
        sampled: Sequence[tuple[int, int]] | None = None,
        expand: Expand = _no_compositions,
    ) -> None:
        """Describe the next step. Costs O(segments) and does not wait for the device.

        Args:
            segments: (batch slot, number of rows) in row order; -1 is the base.
            sampled: the same of the rows that the head computes; None: all rows.
            expand: members of batch slots from `max_slots` on; left out: there are none.
        """
        flat = _join(segments)
        assert len(flat) <= self._max_segments and sum(rows for _, rows in flat) <= self._max_tokens
        slots = {slot for slot, _ in flat if slot != BASE_SLOT}
        if not slots:
            self.passes, self.own = (), NOTHING
            return
        members: _Members = {slot: expand(slot) for slot in slots if slot >= self.store.max_slots}
        sampled = segments if sampled is None else sampled
        self.passes = self._all_passes[: max(map(len, members.values()), default=1)]
        flat_runs = [_runs(flat, members, number) for number in range(len(self.passes))]
        for each, runs in zip(self.passes, flat_runs, strict=True):
            each.fill(runs)
        if self._groupings is not None:
            self.flat_rows = self._groupings[0].group(flat_runs)
            self.is_adapted = [any(ranks) for ranks in zip(*(each.max_ranks for each in self.passes), strict=True)]
        if any(each.changes_head for each in self.passes):
            self._fill_sampled(_join(sampled), members)
        used = slots.union(slot for each in members.values() for slot, _ in each)
        self.own = NOTHING
        if not used.isdisjoint(self.store.overrides):
            self.own = collect_tensors(self.store, _slot_rows(flat, members), _slot_rows(_join(sampled), members))

    def _fill_sampled(self, sampled: Sequence[tuple[int, int]], members: _Members) -> None:
        sampled_runs = [_runs(sampled, members, number) for number in range(len(self.passes))]
        for each, runs in zip(self.passes, sampled_runs, strict=True):
            if each.changes_head:
                each.fill_sampled(runs)
        if self._groupings is not None:
            self.sampled_rows = self._groupings[1].group(sampled_runs)


def _pieces(passes: list[_Runs]) -> list[Piece]:
    """Adapted rows of all passes."""
    pieces: list[Piece] = []
    for runs in passes:
        end = 0
        for slot, rows, weight in zip(*runs, strict=True):
            start, end = end, end + rows
            if slot != BASE_SLOT:
                pieces.append(Piece(slot, start, end, weight))
    return pieces


def _join(segments: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without empty segments, neighbours of the same batch slot in one."""
    joined: list[tuple[int, int]] = []
    for slot, rows in segments:
        if joined and joined[-1][0] == slot:
            joined[-1] = (slot, joined[-1][1] + rows)
        elif rows:
            joined.append((slot, rows))
    return joined


def _runs(segments: Sequence[tuple[int, int]], members: _Members, number: int) -> _Runs:
    """Member `number` of each segment; base where there is none."""
    runs = _Runs([], [], [])
    for batch_slot, rows in segments:
        own = members.get(batch_slot, ((batch_slot, 1.0),))
        slot, weight = own[number] if number < len(own) else (BASE_SLOT, 1.0)
        if runs.slots and runs.slots[-1] == slot and runs.weights[-1] == weight:
            runs.rows[-1] += rows
        else:
            runs.slots.append(slot)
            runs.rows.append(rows)
            runs.weights.append(weight)
    return runs


def _slot_rows(segments: Sequence[tuple[int, int]], members: _Members) -> list[SlotRows]:
    """The rows of each segment with their members, base rows included."""
    found: list[SlotRows] = []
    start = 0
    for batch_slot, rows in segments:
        own = () if batch_slot == BASE_SLOT else members.get(batch_slot, ((batch_slot, 1.0),))
        found.append(SlotRows(slice(start, start + rows), tuple(own)))
        start += rows
    return found
