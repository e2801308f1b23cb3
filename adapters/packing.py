"""An adapter in host memory exactly as it will lie in the device arena, so that bringing it in is one copy.

Layout: site by site in site-index order, only the sites it adapts. Inside a site of input width K whose slices have
ranks r_0, r_1, ... and widths N_0, N_1, ...:

    [0, R*K)                  lora_A rows of all slices, [R, K] row-major, R = r_0 + r_1 + ...
    [R*K, R*K + r_0*N_0)      lora_B of slice 0 transposed, [r_0, N_0] row-major, scaling folded in
    ...                       the same for the further slices

A slice of rank 0 (not adapted) takes no element: nothing is padded. For example, rank 2 on q (N 8) and rank 1 on v
(N 4) of a qkv site with K = 8 is A [3, 8], then [2, 8], then [1, 4]: 24 + 16 + 4 elements, site_ranks row (2, 0, 1).

What adapters have beside low-rank deltas lies behind, aligned to REGION_ALIGNMENT (`layout.py`): affines of sites, then
the tensors of overrides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .arena import ALIGNMENT
from .checkpoint import Checkpoint, check_size
from .copies import are_twins, find_copies
from .dora import Affine, scaled_b, slice_affine
from .errors import AdapterIncompatibleError, AdapterInvalidError
from .finite import largest_magnitude
from .layout import Layout, LowRankBlock, SiteLayout
from .modules import BaseWeights, ModuleTable
from .own_weights import fill_region
from .priority import give_way
from .report import AdapterReport
from .tensor_names import about, refuse
from .weights_file import TensorInfo

# Elements; where tensors begin that matmuls read directly.
REGION_ALIGNMENT: Final = ALIGNMENT
# No trained weight comes near it; sums of products of larger ones would overflow in the computation itself.
MAX_WEIGHT: Final = 2.0**40


class Region(NamedTuple):
    """A tensor inside `PackedAdapter.data`: contiguous, from element `start` on, a multiple of REGION_ALIGNMENT."""

    start: int
    shape: tuple[int, ...]


class OverrideKind(StrEnum):
    """What an adapter does to a module beside adding low-rank deltas to sites.

    WEIGHT: the module runs with its own `weight` and `bias` regions (either may be missing) in place of the base's.
    EMBEDDING_LORA: adds `b` [r, dim] times row `a` [num_embeddings, r] of the token; scaling is folded into `b`.
    TOKENS: the embedding's rows of `token_ids` are those of `rows` [n, dim]; for the head: the logits of `token_ids`
        are the products with `rows`.
    """

    WEIGHT = "weight"
    EMBEDDING_LORA = "embedding_lora"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True, eq=False)
class Override:
    """One module's.

    Attributes:
        module: path in the base: of a `modules.Module`, or of a slice of a site (WEIGHT; TOKENS for the head).
        kind: what is done, and which regions there are.
        regions: by name.
        token_ids: int64 [n] on the CPU, ascending; TOKENS only.
    """

    module: str
    kind: OverrideKind
    regions: Mapping[str, Region]
    token_ids: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """One adapter version, ready to be copied into the arena. Adapters of one plan share all but `data`, `overrides`.

    Attributes:
        data: [elements], arena dtype, CPU (pinned when the arena is on CUDA).
        site_offsets: int64 [num_sites], element offset of each site's block in `data`; -1 = not adapted.
        site_ranks: int32 [num_sites, max_slices]; 0 = not adapted.
        report: what was applied.
        site_affines: int64 [num_sites], element offset in `data` of [2, out_features]: gains and offsets of the site,
            with y := y * gain + offset before the low-rank delta is added (DoRA, biases); -1 = none. A multiple of
            REGION_ALIGNMENT.
        overrides: see there; at most one of a kind for a module.
        vocab_size: token ids that it knows are below this; None: as many as the base has.
    """

    data: Tensor
    site_offsets: Tensor
    site_ranks: Tensor
    report: AdapterReport
    site_affines: Tensor
    overrides: tuple[Override, ...] = ()
    vocab_size: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, in host memory and on the device alike."""
        return self.data.numel() * self.data.element_size()


def pack_adapter(
    checkpoint: Checkpoint,
    weights: BaseWeights,
    *,
    dtype: torch.dtype,
    pin_memory: bool,
    allow_zero: bool = False,
    max_elements: int | None = None,
) -> PackedAdapter:
    """Lay an adapter out for the arena, folding its scaling (and AdaLoRA's singular values, DoRA's gains) into lora_B.

    That is computed in float32 and the result rounded to the arena's type once.

    Args:
        checkpoint: checked tensors, and where they go.
        weights: the base's.
        dtype: the arena's.
        pin_memory: whether copies go to a CUDA device.
        allow_zero: accept an adapter that changes nothing.
        max_elements: refuse an adapter of more elements.

    Raises:
        AdapterMemoryError: more than max_elements.
        AdapterIncompatibleError: a value is too large for `dtype`, or does not go with the base; names the tensor.
        AdapterInvalidError: it changes nothing and that is not allowed, or DoRA divides by zero.
    """
    plan = checkpoint.plan
    dropped = find_copies(checkpoint, plan.modules, weights)
    laid_out = plan.lay_out(dropped, are_twins=are_twins(checkpoint, plan.modules, dropped))
    layout = laid_out.layout
    check_size(layout.num_elements, max_elements)
    _check_head_bias(layout, plan.modules, weights)
    data = _host_memory(layout.num_elements, dtype, pin_memory=pin_memory)
    writer = _Writer(checkpoint, layout, weights, data)
    overrides = writer.write_all(plan.modules)
    if not (overrides or writer.is_effective or allow_zero):
        raise AdapterInvalidError(
            "The adapter's delta is zero everywhere: it would answer exactly like the base. Was it saved before "
            "training? Loading it must be allowed explicitly (allow_zero)."
        )
    return PackedAdapter(
        data,
        laid_out.site_offsets,
        laid_out.site_ranks,
        laid_out.report,
        laid_out.site_affines,
        overrides,
        checkpoint.placement.full.vocab_size,
    )


def _host_memory(count: int, dtype: torch.dtype, *, pin_memory: bool) -> Tensor:
    """Elements in host memory, not set.

    Memory that is not pinned comes from numpy, which asks for huge pages: giving 200 MB of small ones back holds the
    interpreter lock, and so the step thread, for 8 to 10 ms (AMD EPYC, Zen 3; 2026-11-22).
    """
    if pin_memory:
        return torch.empty(count, dtype=dtype, pin_memory=True)
    return torch.from_numpy(np.empty(count * dtype.itemsize, np.uint8)).view(dtype)


def _check_head_bias(layout: Layout, modules: ModuleTable, weights: BaseWeights) -> None:
    for override in layout.overrides:
        if (
            override.module == modules.head
            and override.kind == OverrideKind.TOKENS
            and weights.bias(modules.head) is not None
        ):
            raise refuse(
                override.regions[0].key,
                "the base's head has a bias, which PEFT drops when it has token rows; train it whole",
            )


# What was written of one tensor of the file: the values, its name, and its scaling where that is folded in.
_Written = tuple[Tensor, str, float | None]


class _Writer:
    """Fills the memory of one adapter.

    Args:
        checkpoint: the adapter.
        layout: where everything goes.
        weights: the base's.
        data: the memory, from the first element of its storage on.

    Attributes:
        is_effective: whether something of what was written changes an answer.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Layout, weights: BaseWeights, data: Tensor) -> None:
        self.is_effective = False
        self._checkpoint = checkpoint
        self._layout = layout
        self._weights = weights
        self._data = data
        self._written: list[_Written] = []  # in order
        starts = (site.affine for site in layout.sites if site.affine >= 0)
        for start in (*starts, *layout.regions.values()):
            data[max(0, start - ALIGNMENT) : start] = 0  # the gap, and what is written over it later

    def write_all(self, modules: ModuleTable) -> tuple[Override, ...]:
        """Write every element, and check that its magnitude is one to compute with; returns the overrides."""
        try:
            for planned in self._layout.sites:
                self._write_site(planned)
            overrides = self._write_overrides(modules)
        except Exception:
            self._check_written()  # of two faults, the one that was come by first is named
            raise
        # All at once: what a look at a tensor costs beside its elements counts where there are hundreds of small ones.
        if not largest_magnitude(self._data) <= MAX_WEIGHT:
            self._check_written()
            raise AssertionError("an element was not written")
        return overrides

    def _write_site(self, planned: SiteLayout) -> None:
        """Write one site's affine and low-rank blocks."""
        affines: Sequence[Affine | None] = (None,) * len(planned.blocks)
        if planned.affine >= 0:
            affines = self._write_affine(planned)
        for block, affine in zip(planned.blocks, affines, strict=True):
            if block is not None:
                self._write_low_rank(block, affine)

    def _write_low_rank(self, block: LowRankBlock, affine: Affine | None) -> None:
        lora, start_a, start_b, width, out = block
        rank = lora.scaling.rank
        rows_a = self._data.as_strided((rank, width), (width, 1), start_a)
        rows_b = self._data.as_strided((rank, out), (out, 1), start_b)
        tensors = self._checkpoint.tensors
        rows_a.copy_(tensors[lora.lora_a.name])
        if lora.lora_e is None and lora.magnitude is None:  # nearly all there are: what `scaled_b` gives, in one go
            torch.mul(tensors[lora.lora_b.name].float().t(), lora.scaling.factor, out=rows_b)
        else:
            scaled = scaled_b(self._checkpoint, lora)
            # A magnitude is what makes a gain differ from 1 here: where there is none, nothing is to be rounded.
            rows_b.copy_((scaled if affine is None or lora.magnitude is None else scaled * affine.gain[:, None]).t())
        self._written += ((rows_a, lora.lora_a.name, None), (rows_b, lora.lora_b.name, lora.scaling.factor))
        self.is_effective = self.is_effective or bool((rows_a.any(dim=1) & rows_b.any(dim=1)).any())
        give_way()

    def _write_affine(self, planned: SiteLayout) -> list[Affine | None]:
        """Write one site's affine; returns those of its slices."""
        site, _, start, blocks = planned
        affines = [
            slice_affine(self._checkpoint, piece.module, self._weights, is_adapted=block is not None)
            for piece, block in zip(site.slices, blocks, strict=True)
        ]
        gains, offsets = self._data[start : start + 2 * site.out_features].view(2, site.out_features)
        first = 0
        for piece, affine in zip(site.slices, affines, strict=True):
            columns = slice(first, first + piece.out_features)
            first += piece.out_features
            if affine is None:
                gains[columns], offsets[columns] = 1.0, 0.0
                continue
            gains[columns], offsets[columns] = affine.gain, affine.offset
            name = self._affine_tensor(piece.module)
            self._written += ((gains[columns], name, None), (offsets[columns], name, None))
            self.is_effective = self.is_effective or not affine.is_idle
        return affines

    def _write_overrides(self, modules: ModuleTable) -> tuple[Override, ...]:
        """Write the tensors of all overrides, those that are shared once."""
        written: set[str] = set()
        overrides: list[Override] = []
        for plan in self._layout.overrides:
            regions: dict[str, Region] = {}
            for each in plan.regions:
                region = Region(self._layout.regions[each.key], each.shape)
                regions[each.name] = region
                if each.key not in written:
                    target = self._data[region.start : region.start + math.prod(each.shape)].view(each.shape)
                    name = fill_region(self._checkpoint, plan, each, modules, target)
                    self._written.append((target, name, None))
                    written.add(each.key)
            ids = torch.tensor(plan.token_ids, dtype=torch.int64) if plan.token_ids else None
            overrides.append(Override(plan.module, OverrideKind(plan.kind), regions, ids))
        return tuple(overrides)

    def _affine_tensor(self, module: str) -> str:
        """A tensor that the affine of a slice comes from."""
        placement = self._checkpoint.placement
        lora = placement.lora.get(module)
        sources: list[TensorInfo | None] = [
            placement.full.biases.get(module),
            *((lora.magnitude, lora.b_bias) if lora is not None else ()),
        ]
        return next(info.name for info in sources if info is not None)

    def _check_written(self) -> None:
        """Raise AdapterIncompatibleError if values are infinite in the arena's type, or too large to compute with."""
        for values, name, factor in self._written:
            if not largest_magnitude(values) <= MAX_WEIGHT:
                how = "" if factor is None else f" times its scaling ({factor:g})"
                raise AdapterIncompatibleError(
                    f"Tensor {name[:256]!r}{how} has values that do not fit into {self._data.dtype}, or are larger "
                    f"than {MAX_WEIGHT:g}, which no trained weight is.",
                    about(name),
                )
