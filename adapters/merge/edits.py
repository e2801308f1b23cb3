"""What the packed adapters of a merge do to each module, gathered by module.

The tensors are those that a server would bring to its device (`packing.py`), so every format and every rule of serving
holds for merging too: scaling, AdaLoRA's singular values and DoRA's gains are in B already, own embeddings and heads
have their LoRA and token rows in them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..modules import ModuleTable
from ..packing import Override, OverrideKind, PackedAdapter, Region
from ..sites import Site, SiteTable
from .members import Member


class Delta(NamedTuple):
    """weight * b.t() @ a is added.

    Attributes:
        a: float32 [rank, in_features].
        b: float32 [rank, out_features].
    """

    a: Tensor
    b: Tensor
    weight: float


class Gain(NamedTuple):
    """The module's output y becomes y * gain + offset before deltas are added; float32 [out_features] each."""

    gain: Tensor
    offset: Tensor


@dataclass(slots=True)
class Edits:
    """What is done to one module, in this order: own weight, token rows, gain, deltas.

    Attributes:
        weight: in place of the base's, or None.
        bias: in place of the base's, or None.
        rows: (int64 [n] ascending token ids, float32 [n, dim]), or None.
        gain: or None.
        deltas: any number.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None
    gain: Gain | None = None
    deltas: list[Delta] = field(default_factory=list)


def gather_edits(members: Sequence[Member], sites: SiteTable, modules: ModuleTable) -> dict[str, Edits]:
    """Module -> what is done to it; modules of which nothing changes are left out.

    Args:
        members: checked to have a sum.
        sites, modules: the base's.
    """
    edits: dict[str, Edits] = {}
    for member in members:
        for site in sites.sites:
            _add_site(edits, member.packed, site, member.weight)
        for override in member.packed.overrides:
            _add_override(edits.setdefault(override.module, Edits()), member, override, modules)
    return edits


def _add_site(edits: dict[str, Edits], packed: PackedAdapter, site: Site, weight: float) -> None:
    """Walk one site's block as `packing.py` lays it out."""
    ranks: list[int] = packed.site_ranks[site.index].tolist()
    start_a = int(packed.site_offsets[site.index])
    start_b = start_a + sum(ranks) * site.in_features
    affine = int(packed.site_affines[site.index])
    for index, (piece, rank) in enumerate(zip(site.slices, ranks, strict=False)):
        if rank:
            a = _view(packed, start_a, (rank, site.in_features))
            b = _view(packed, start_b, (rank, piece.out_features))
            edits.setdefault(piece.module, Edits()).deltas.append(Delta(a, b, weight))
            start_a += a.numel()
            start_b += b.numel()
        if affine >= 0:
            first = sum(each.out_features for each in site.slices[:index])
            gains, offsets = _view(packed, affine, (2, site.out_features))[:, first : first + piece.out_features]
            if bool((gains != 1).any()) or bool(offsets.any()):
                edits.setdefault(piece.module, Edits()).gain = Gain(gains, offsets)


def _add_override(edits: Edits, member: Member, override: Override, modules: ModuleTable) -> None:
    regions = {name: _region(member.packed, region) for name, region in override.regions.items()}
    match override.kind:
        case OverrideKind.WEIGHT:
            edits.weight, edits.bias = regions.get("weight"), regions.get("bias")
        case OverrideKind.TOKENS:
            assert override.token_ids is not None
            edits.rows = override.token_ids, regions["rows"]
        case OverrideKind.EMBEDDING_LORA:
            # It lies there as it is added behind the module's own scale, which the merged rows still pass.
            weight = member.weight / modules.embedding_scale
            edits.deltas.append(Delta(regions["b"], regions["a"].t(), weight))


def _region(packed: PackedAdapter, region: Region) -> Tensor:
    return _view(packed, region.start, region.shape)


def _view(packed: PackedAdapter, start: int, shape: tuple[int, ...]) -> Tensor:
    assert packed.data.dtype == torch.float32, "merging computes in float32"
    return packed.data[start : start + math.prod(shape)].view(shape)
