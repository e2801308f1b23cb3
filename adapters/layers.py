"""LoRA around the base's linears: y = W x, then y += B (A x) in place for the rows of adapted segments.

Used on the step thread only. What a step needs is prepared once in `LoraBatch` and shared by all sites; base rows are
never touched, and a batch or a site without adapted rows launches nothing at all.
"""

from collections.abc import Sequence
from typing import Final, cast

import torch
from torch import Tensor, nn

from ..kernels import lora
from .device_store import DeviceStore
from .sites import Site
from .staging import StagedInts

# Slot of rows that no adapter adapts.
BASE_SLOT: Final = -1


class LoraBatch:
    """Which rows of the step's flat batch belong to which slot.

    Running example: 3 base rows, then 5 rows of slot 4, then 2 of slot 0 ->
    seg_starts [0, 3, 8, 10], seg_slots [-1, 4, 0].

    Args:
        store: where the adapters are.
        max_tokens: rows of a step at most.
        max_segments: segments of a step at most.

    Attributes:
        active: whether any row is adapted.
        seg_starts: int32 [G + 1], view of a preallocated tensor on the store's device.
        seg_slots: int32 [G], likewise; -1 = base.
        max_ranks: for each site the largest sum of slice ranks among this batch's slots; 0 = no row adapts it.
    """

    def __init__(self, store: DeviceStore, max_tokens: int, max_segments: int) -> None:
        self.store = store
        self.active = False
        self.max_ranks: list[int] = [0] * store.rank_sums.shape[1]
        self._max_tokens = max_tokens
        self._max_segments = max_segments
        self._starts = StagedInts(max_segments + 1, torch.int32, store.device)
        self._slots = StagedInts(max_segments, torch.int32, store.device)
        self.seg_starts = self._starts.tensor[:1]
        self.seg_slots = self._slots.tensor[:0]

    def prepare(self, segments: Sequence[tuple[int, int]]) -> None:
        """Describe the next step. Costs O(segments) and does not wait for the device.

        Args:
            segments: (slot, number of rows) in row order; slot -1 is the base.
        """
        starts: list[int] = [0]
        slots: list[int] = []
        for slot, rows in segments:
            if slots and slots[-1] == slot:
                starts[-1] += rows
            elif rows:
                slots.append(slot)
                starts.append(starts[-1] + rows)
        assert len(slots) <= self._max_segments and starts[-1] <= self._max_tokens
        adapters = sorted({slot for slot in slots if slot != BASE_SLOT})
        self.active = bool(adapters)
        if not adapters:
            return
        self.max_ranks = cast(list[int], self.store.rank_sums[adapters].amax(dim=0).tolist())
        self.seg_starts = self._starts.fill(starts)
        self.seg_slots = self._slots.fill(slots)


class LoraLinear(nn.Module):
    """One site: the base's linear and the adapters' low-rank updates beside it.

    Args:
        base: maps [..., in_features] to a contiguous [..., out_features].
        site: which site it is.
        batch: the metadata of the current step, shared by all sites.
    """

    def __init__(self, base: nn.Module, site: Site, batch: LoraBatch) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self._batch = batch
        store = batch.store
        self._arena = store.arena
        self._offsets = store.site_offsets[site.index]  # [max_slots], a view: the store updates it in place
        self._ranks = store.site_ranks[site.index, :, : len(site.slices)]  # [max_slots, slices], likewise
        self._slice_widths = [piece.out_features for piece in site.slices]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] in the compute dtype -> [..., out_features]; rows are the flat batch in order."""
        y = cast(Tensor, self.base(x))
        batch = self._batch
        max_rank = batch.max_ranks[self.site.index] if batch.active else 0
        if max_rank == 0:
            return y
        rows_x = x.reshape(-1, self.site.in_features)
        rows_y = y.view(-1, self.site.out_features)
        segments = (batch.seg_starts, batch.seg_slots)
        h = lora.lora_shrink(rows_x, self._arena, self._offsets, self._ranks, *segments, max_rank)
        lora.lora_expand_(
            rows_y, h, self._arena, self._offsets, self._ranks, *segments, self._slice_widths, self.site.in_features
        )
        return y
