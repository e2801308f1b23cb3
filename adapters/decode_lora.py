"""The LoRA part of decode steps that a captured graph computes: tables padded to the graph's number of rows.

Every request of such a step has one row, and every row samples, so the flat batch and what the head computes are the
same rows. What a graph was captured for is a `LoraShape` and a number of rows; everything else is in tensors that it
reads on the device. Step thread only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .lora_batch import BASE_SLOT, Expand, LoraBatch, Pass, Segments
from .lora_shape import NO_LORA, LoraShape, union
from .step_overrides import NOTHING


@dataclass(frozen=True, slots=True)
class DecodeRuns:
    """The rows of a step, run by run of the same device slot and weight.

    Attributes:
        shape: what they need, the rank as it is.
        starts: first row of each run, and the number of rows.
        slots: device slot of each run; -1 = base.
        weights: of each run.
    """

    shape: LoraShape
    starts: list[int]
    slots: list[int]
    weights: list[float]


class DecodeLora:
    """Describes padded decode steps to the LoRA layers.

    Args:
        batch: what the layers read.
        max_rows: of the largest captured step, at most the segments of `batch`.

    Attributes:
        full_shape: the linears of all layers, of rank 0.
    """

    def __init__(self, batch: LoraBatch, max_rows: int) -> None:
        self._batch = batch
        self._store = batch.store
        self._pass = _PaddedPass(batch, max_rows)
        self.full_shape = LoraShape(
            0, frozenset(site.kind for site in self._store.site_table.sites if not site.is_head)
        )

    def runs(self, batch_slots: Sequence[int], expand: Expand) -> DecodeRuns | None:
        """Describe the rows of a step, None where no captured step computes them.

        That is where a row has several adapters, or one with tensors of its own in place of the base's.

        Args:
            batch_slots: of each row, ascending; -1 is the base.
            expand: members of batch slots from `max_slots` on.
        """
        store = self._store
        starts = [0]
        slots: list[int] = []
        weights: list[float] = []
        weighted = False
        for row, batch_slot in enumerate(batch_slots):
            slot, weight = batch_slot, 1.0
            if batch_slot >= store.max_slots:
                members = expand(batch_slot)
                if len(members) != 1:
                    return None
                slot, weight = members[0]
                weighted = weighted or weight != 1.0
            if slots and slots[-1] == slot and weights[-1] == weight:
                starts[-1] = row + 1
            else:
                slots.append(slot)
                weights.append(weight)
                starts.append(row + 1)
        used = {slot for slot in slots if slot != BASE_SLOT}
        if not used.isdisjoint(store.overrides):
            return None
        shape = union((store.shapes[slot] for slot in used), weighted=weighted) if used else NO_LORA
        return DecodeRuns(shape, starts, slots, weights)

    def stage(self, shape: LoraShape, runs: DecodeRuns, num_rows: int) -> None:
        """Fill what a graph captured for `shape` and `num_rows` reads; `shape` covers that of `runs`."""
        if shape.kinds:
            self._pass.stage(runs, num_rows, shape.weighted)

    def blank(self, shape: LoraShape, num_rows: int) -> None:
        """As `stage`, with rows that are all padding."""
        self.stage(shape, DecodeRuns(NO_LORA, [0], [], []), num_rows)

    def assume(self, shape: LoraShape, num_rows: int) -> None:
        """Make the layers compute a step of this shape, from what is staged. Called where a graph is captured."""
        self._batch.own = NOTHING
        self._batch.passes = ()
        self._batch.flat_rows = None  # on a CPU too: passes are what graphs are captured of
        if shape.kinds:
            self._pass.assume(shape, num_rows)
            self._batch.passes = (self._pass,)


class _PaddedPass(Pass):
    """A pass whose tables are padded, and whose sizes are those of a shape instead of the step's own."""

    def __init__(self, batch: LoraBatch, max_rows: int) -> None:
        super().__init__(batch.store, max_rows)
        self._staged: tuple[list[int], list[int], list[float], int, bool] | None = None

    def stage(self, runs: DecodeRuns, num_rows: int, weighted: bool) -> None:
        # A step of decodes mostly has the rows of the one before it.
        staged = runs.starts, runs.slots, runs.weights, num_rows, weighted
        if staged == self._staged:
            return
        self._staged = staged
        missing = num_rows - len(runs.slots)
        # Rows behind the last start belong to nobody.
        self._flat.starts.fill(runs.starts + [runs.starts[-1]] * missing)
        self._flat.slots.fill(runs.slots + [BASE_SLOT] * missing)
        if weighted:
            self._flat.weights.fill(runs.weights + [1.0] * missing)

    def assume(self, shape: LoraShape, num_rows: int) -> None:
        sites = self._store.site_table.sites
        adapted = [site.kind in shape.kinds for site in sites]
        self.max_ranks = [
            shape.rank * len(site.slices) if is_adapted else 0 for site, is_adapted in zip(sites, adapted, strict=True)
        ]
        self.affines = adapted if shape.affine else None
        staged = self._flat
        self.flat = self.sampled = Segments(
            staged.starts.tensor[: num_rows + 1],
            staged.slots.tensor[:num_rows],
            staged.weights.tensor[:num_rows] if shape.weighted else None,
        )
