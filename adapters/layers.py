"""LoRA around the base's linears: what adapters do to y = W x, for the rows of a step that they adapt.

In this order: slices whose adapter has its own weight are computed with that; rows are scaled and shifted (DoRA,
biases); then y += B (A x) for each pass, on a CPU for all passes together. A batch of one pass has it all in two
launches, of which the first, A x, may run beside the base's matmul where a CUDA graph is captured; of few rows on CUDA,
or of more that share an adapter, in none of its own: the matmul does it (`overlap` has the switches). Used on the step
thread only. What a step needs is prepared once in `LoraBatch`; base rows are never touched, and a batch or a site
without adapted rows launches nothing at all.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import lora, overlap
from ..kernels.lora_nf4 import is_one_launch, nf4_lora_linear
from ..kernels.lora_site import LoraSite
from ..kernels.nf4_weight import NF4Weight
from .lora_batch import LoraBatch, Pass
from .packing import OverrideKind
from .sites import Site


class LoraLinear(nn.Module):
    """One site: the base's linear and what adapters do beside it.

    Args:
        base: maps [..., in_features] to a contiguous [..., out_features].
        site: which site it is.
        batch: the metadata of the current step, shared by all sites.

    Attributes:
        affines: int64 [max_slots], where its slots' gains and offsets are in the arena.
        on_cpu: its low-rank deltas on a CPU; None elsewhere.
    """

    def __init__(self, base: nn.Module, site: Site, batch: LoraBatch) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.batch = batch
        store = batch.store
        self._arena = store.arena
        self._offsets = store.site_offsets[site.index]  # [max_slots], a view: the store updates it in place
        self.affines = store.site_affines[site.index]  # likewise
        self._ranks = store.site_ranks[site.index, :, : len(site.slices)]  # [max_slots, slices], likewise
        self._slice_widths = [piece.out_features for piece in site.slices]
        self.on_cpu: LoraSite | None = None
        # Of a base whose matmul can do LoRA, too: on CUDA, in NF4.
        weight = getattr(base, "nf4", None)
        self._nf4 = weight if isinstance(weight, NF4Weight) and store.device.type == "cuda" else None
        if store.device.type == "cpu":
            tables = self._arena, self._offsets, self._ranks
            self.on_cpu = LoraSite(*tables, self._slice_widths, site.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] in the compute dtype -> [..., out_features].

        Rows are the flat batch in order; of the head those that it computes, and its result is as wide as the largest
        vocabulary among them (`OwnTensors.logits_width`): base rows have zeros beyond the base's ids.
        """
        batch = self.batch
        if not batch.passes:
            return cast(Tensor, self.base(x))
        if batch.flat_rows is None and len(batch.passes) == 1:
            return self._with_one_pass(x, batch.passes[0])
        y = cast(Tensor, self.base(x))
        if batch.own.by_module:
            y = self._with_own_tensors(x, y)
        for each in batch.passes:
            if each.affines is not None and each.affines[self.site.index]:
                self._affine_(y, each)
        if batch.flat_rows is None:
            for each in batch.passes:
                if each.max_ranks[self.site.index]:
                    self._expand_(y, self._shrink(x, each), each, None)
        elif batch.is_adapted[self.site.index]:
            rows = batch.sampled_rows if self.site.is_head else batch.flat_rows
            assert rows is not None and self.on_cpu is not None
            self.on_cpu.add_(self._rows_of(y), x.reshape(-1, self.site.in_features), rows)
        return y

    def _with_one_pass(self, x: Tensor, only: Pass) -> Tensor:
        """The base's y with the deltas of a batch that has one pass."""
        side = self.batch.side_stream
        max_rank = only.max_ranks[self.site.index]
        has_affine = only.affines is not None and only.affines[self.site.index]
        num_rows = x.numel() // self.site.in_features
        h = None
        is_plain = max_rank > 0 and not has_affine and not self.batch.own.by_module
        if self._nf4 is not None and is_plain and overlap.lora_runs_in_matmul(num_rows, only.has_one_slot):
            rows_x = x.reshape(-1, self.site.in_features)
            if is_one_launch(rows_x, self._nf4, self._slice_widths):
                return self._in_matmul(rows_x, self._nf4, only).view(*x.shape[:-1], self.site.out_features)
        if side is not None and max_rank and overlap.lora_runs_beside(num_rows):
            with side.beside():
                h = self._shrink(x, only)
            try:
                y = cast(Tensor, self.base(x))
            finally:
                side.join()
        else:
            y = cast(Tensor, self.base(x))
        if self.batch.own.by_module:
            y = self._with_own_tensors(x, y)
        if max_rank:
            h = self._shrink(x, only) if h is None else h
            self._expand_(y, h, only, self.affines if has_affine else None)
        elif has_affine:
            self._affine_(y, only)
        return y

    def _in_matmul(self, x: Tensor, weight: NF4Weight, only: Pass) -> Tensor:
        """The base's y [rows, out_features] with low-rank deltas, which are all that the pass does here."""
        bias = cast(Tensor | None, self.base.bias)
        starts, slots, weights = only.sampled if self.site.is_head else only.flat
        tables = (self._arena, self._offsets, self._ranks, starts, slots)
        max_rank = only.max_ranks[self.site.index]
        widths = self._slice_widths
        return nf4_lora_linear(x, weight, bias, *tables, max_rank, widths, weights, only.has_one_slot)

    def _affine_(self, y: Tensor, each: Pass) -> None:
        starts, slots, _ = each.sampled if self.site.is_head else each.flat
        lora.lora_affine_(self._rows_of(y), self._arena, self.affines, starts, slots)

    def _shrink(self, x: Tensor, each: Pass) -> Tensor:
        starts, slots, weights = each.sampled if self.site.is_head else each.flat
        rows_x = x.reshape(-1, self.site.in_features)
        tables = (self._arena, self._offsets, self._ranks, starts, slots)
        return lora.lora_shrink(rows_x, *tables, each.max_ranks[self.site.index], weights)

    def _expand_(self, y: Tensor, h: Tensor, each: Pass, affines: Tensor | None) -> None:
        starts, slots, _ = each.sampled if self.site.is_head else each.flat
        tables = (self._arena, self._offsets, self._ranks, starts, slots)
        lora.lora_expand_(self._rows_of(y), h, *tables, self._slice_widths, self.site.in_features, affines)

    def _rows_of(self, y: Tensor) -> Tensor:
        """The columns that the base has: [rows, out_features]."""
        return y.view(-1, y.shape[-1])[:, : self.site.out_features]

    def _with_own_tensors(self, x: Tensor, y: Tensor) -> Tensor:
        """Put in what rows compute with their adapter's own tensors: y, or for a larger vocabulary a wider one."""
        own = self.batch.own
        if self.site.is_head and own.logits_width > self.site.out_features:
            y = F.pad(y, (0, own.logits_width - self.site.out_features))
        rows_x = x.reshape(-1, self.site.in_features)
        rows_y = y.view(-1, y.shape[-1])
        column = 0
        for piece in self.site.slices:
            for each in own.by_module.get(piece.module, ()):
                weight = each.tensors.get("weight")
                if each.kind is OverrideKind.TOKENS:
                    assert each.token_ids is not None
                    logits = F.linear(rows_x[each.rows], each.tensors["rows"])
                    rows_y[each.rows].index_copy_(1, each.token_ids, logits)
                elif weight is not None:
                    bias = each.tensors.get("bias", self._base_bias(column, piece.out_features))
                    rows_y[each.rows, column : column + weight.shape[0]] = F.linear(rows_x[each.rows], weight, bias)
            column += piece.out_features
        return y

    def _base_bias(self, column: int, width: int) -> Tensor | None:
        bias = cast(Tensor | None, self.base.bias)
        return None if bias is None else bias[column : column + width]
