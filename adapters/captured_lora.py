"""The LoRA part of steps that a captured graph computes: tables padded to the graph's number of requests.

A graph was captured for a `LoraShape` and a size; everything else is in tensors that it reads on the device: which rows
have which adapter, run by run. The rows of a prompt are one run, however many they are. In a step of decodes all rows
sample, so the head computes the same rows; in others it has runs of its own. Step thread only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .lora_batch import BASE_SLOT, Expand, LoraBatch, Pass, Segments
from .lora_shape import NO_LORA, LoraShape, union
from .step_overrides import NOTHING


@dataclass(frozen=True, slots=True)
class CapturedRuns:
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


# Of a step that is all padding.
_NO_RUNS = CapturedRuns(NO_LORA, [0], [], [])


class CapturedLora:
    """Describes padded steps to the LoRA layers.

    Args:
        batch: what the layers read.
        max_requests: of the largest captured step, at most the segments of `batch`.

    Attributes:
        full_shape: the linears of all layers, of rank 0.
    """

    def __init__(self, batch: LoraBatch, max_requests: int) -> None:
        self._batch = batch
        self._store = batch.store
        self._pass = _PaddedPass(batch, max_requests)
        self.full_shape = LoraShape(
            0, frozenset(site.kind for site in self._store.site_table.sites if not site.is_head)
        )

    def runs(self, batch_slots: Sequence[int], num_rows: Sequence[int], expand: Expand) -> CapturedRuns | None:
        """Describe the rows of a step, None where no captured step computes them.

        That is where a row has several adapters, or one with tensors of its own in place of the base's.

        Args:
            batch_slots: of each request, ascending; -1 is the base.
            num_rows: of each request, at least 1.
            expand: members of batch slots from `max_slots` on.
        """
        store = self._store
        end = 0
        starts = [0]
        slots: list[int] = []
        weights: list[float] = []
        weighted = False
        for batch_slot, count in zip(batch_slots, num_rows, strict=True):
            slot, weight = batch_slot, 1.0
            if batch_slot >= store.max_slots:
                members = expand(batch_slot)
                if len(members) != 1:
                    return None
                slot, weight = members[0]
                weighted = weighted or weight != 1.0
            end += count
            if slots and slots[-1] == slot and weights[-1] == weight:
                starts[-1] = end
            else:
                slots.append(slot)
                weights.append(weight)
                starts.append(end)
        used = {slot for slot in slots if slot != BASE_SLOT}
        if not used.isdisjoint(store.overrides):
            return None
        shape = NO_LORA
        if used:
            shape = union((store.shapes[slot] for slot in used), weighted=weighted, one_slot=len(used) == 1)
        return CapturedRuns(shape, starts, slots, weights)

    def adapts_head(self, shape: LoraShape) -> bool:
        """Whether a graph of this shape adapts the rows that the head computes."""
        return self._store.site_table.sites[-1].kind in shape.kinds

    def stage(self, shape: LoraShape, num_requests: int, flat: CapturedRuns, sampled: CapturedRuns | None) -> None:
        """Fill what a graph captured for `shape` and `num_requests` reads.

        Args:
            shape: covers that of `flat`.
            num_requests: to which the step is padded.
            flat: all rows.
            sampled: those that the head computes, in its order; None: all, or the graph adapts none of them.
        """
        if shape.kinds:
            self._pass.stage(flat, sampled, num_requests, shape.weighted)

    def blank(self, shape: LoraShape, num_requests: int) -> None:
        """As `stage`, with rows that are all padding."""
        self.stage(shape, num_requests, _NO_RUNS, _NO_RUNS)

    def assume(self, shape: LoraShape, num_requests: int, *, samples_all: bool) -> None:
        """Make the layers compute a step of this shape, from what is staged. Called where a graph is captured.

        Args:
            shape: of the graph.
            num_requests: of the graph.
            samples_all: the head computes all rows.
        """
        self._batch.own = NOTHING
        self._batch.passes = ()
        self._batch.flat_rows = None  # on a CPU too: passes are what graphs are captured of
        if shape.kinds:
            self._pass.assume(shape, num_requests, samples_all)
            self._batch.passes = (self._pass,)


class _PaddedPass(Pass):
    """A pass whose tables are padded, and whose sizes are those of a shape instead of the step's own."""

    def __init__(self, batch: LoraBatch, max_requests: int) -> None:
        super().__init__(batch.store, max_requests)
        self._staged: tuple[CapturedRuns, CapturedRuns | None, int, bool] | None = None

    def stage(self, flat: CapturedRuns, sampled: CapturedRuns | None, num_requests: int, weighted: bool) -> None:
        # A step of decodes mostly has the rows of the one before it.
        staged = flat, sampled, num_requests, weighted
        if staged == self._staged:
            return
        self._staged = staged
        for runs, tables in ((flat, self._flat), (sampled, self._sampled)):
            if runs is None:
                continue
            missing = num_requests - len(runs.slots)
            # Rows behind the last start belong to nobody.
            tables.starts.fill(runs.starts + [runs.starts[-1]] * missing)
            tables.slots.fill(runs.slots + [BASE_SLOT] * missing)
            if weighted:
                tables.weights.fill(runs.weights + [1.0] * missing)

    def assume(self, shape: LoraShape, num_requests: int, samples_all: bool) -> None:
        sites = self._store.site_table.sites
        adapted = [site.kind in shape.kinds for site in sites]
        self.max_ranks = [
            shape.rank * len(site.slices) if is_adapted else 0 for site, is_adapted in zip(sites, adapted, strict=True)
        ]
        self.affines = adapted if shape.affine else None
        self.has_one_slot = shape.one_slot
        views = [
            Segments(
                tables.starts.tensor[: num_requests + 1],
                tables.slots.tensor[:num_requests],
                tables.weights.tensor[:num_requests] if shape.weighted else None,
            )
            for tables in (self._flat, self._sampled)
        ]
        self.flat, self.sampled = views[0], views[0] if samples_all else views[1]
