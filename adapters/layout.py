"""Where every block of a packed adapter lies, and so how many elements it takes. Imports no torch.

Low-rank blocks come first, site by site and without gaps; then affines and the regions of overrides, each aligned.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .arena import aligned
from .modules import ModuleTable
from .sites import Site, SiteTable
from .tensor_map import LoraTensors, Placement


class LowRankBlock(NamedTuple):
    """Where the low-rank tensors of a slice go.

    Attributes:
        lora: the tensors.
        start_a: of lora_A, [rank, in_features].
        start_b: of lora_B transposed, [rank, out_features].
        in_features, out_features: of the slice.
    """

    lora: LoraTensors
    start_a: int
    start_b: int
    in_features: int
    out_features: int


class SiteLayout(NamedTuple):
    """What an adapter has of a site.

    Attributes:
        site: whose.
        start: its low-rank block; -1: none.
        affine: its [2, out_features]; -1: none.
        blocks: of each slice; None: it has no low-rank delta beside the base's weight.
    """

    site: Site
    start: int
    affine: int
    blocks: tuple[LowRankBlock | None, ...]


class RegionPlan(NamedTuple):
    """A tensor of an override: regions with the same key are one."""

    name: str
    shape: tuple[int, ...]
    key: str


class OverridePlan(NamedTuple):
    """One override.

    Attributes:
        module: whose.
        kind: value of `packing.OverrideKind`.
        regions: its tensors.
        token_ids: ascending; of token rows only.
    """

    module: str
    kind: str
    regions: tuple[RegionPlan, ...]
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """Element offsets.

    Attributes:
        sites: those that it adapts, by index.
        overrides: what there is of them.
        regions: key -> start.
        num_elements: of all.
    """

    sites: tuple[SiteLayout, ...]
    overrides: tuple[OverridePlan, ...]
    regions: Mapping[str, int]
    num_elements: int


def plan_layout(
    placement: Placement, sites: SiteTable, modules: ModuleTable, *, dropped: Collection[str], are_twins: bool
) -> Layout:
    """Lay an adapter out.

    Args:
        placement: its tensors.
        sites, modules: the base's.
        dropped: modules whose own weights are left out, because they are the base's.
        are_twins: the embedding's and the head's own weights are the same, so they are kept once.
    """
    low_rank: list[tuple[int, tuple[LowRankBlock | None, ...]]] = []
    affines: list[int] = []
    regions: dict[str, int] = {}
    end = 0
    for site in sites.sites:
        start = end
        blocks, end = _low_rank_blocks(placement, site, dropped, start)
        low_rank.append((start if end > start else -1, blocks))
    for site in sites.sites:
        affine = -1
        if any(has_affine(placement, piece.module, dropped) for piece in site.slices):
            affine = aligned(end)
            end = affine + 2 * site.out_features
        affines.append(affine)
    overrides = tuple(_overrides(placement, modules, dropped, are_twins=are_twins))
    for override in overrides:
        for region in override.regions:
            if region.key not in regions:
                regions[region.key] = end = aligned(end)
                end += _count(region.shape)
    adapted = tuple(
        SiteLayout(site, start, affine, blocks)
        for site, (start, blocks), affine in zip(sites.sites, low_rank, affines, strict=True)
        if start >= 0 or affine >= 0
    )
    return Layout(adapted, overrides, regions, end)


def count_certain_elements(placement: Placement, sites: SiteTable, modules: ModuleTable) -> int:
    """How many elements an adapter takes at least, whatever its payload says."""
    whole = placement.full.whole
    dropped = [
        module for module, own in whole.items() if own.may_be_base and is_base_shaped(placement, module, modules)
    ]
    both = modules.embedding in whole and modules.head in whole
    return plan_layout(placement, sites, modules, dropped=dropped, are_twins=both).num_elements


def is_base_shaped(placement: Placement, module: str, modules: ModuleTable) -> bool:
    """Whether the own weight of the embedding or head has as many rows as the base's."""
    return placement.full.rows(module, modules.vocab_size) == modules.vocab_size


def has_low_rank(placement: Placement, module: str, dropped: Collection[str]) -> bool:
    """Whether a slice of a site has a low-rank delta beside the base's weight (not merged into one of its own)."""
    return module in placement.lora and (module not in placement.full.whole or module in dropped)


def has_affine(placement: Placement, module: str, dropped: Collection[str]) -> bool:
    """Whether the base's output of a slice is scaled or shifted."""
    if module in placement.full.biases:
        return True
    if not has_low_rank(placement, module, dropped):
        return False
    return placement.lora[module].magnitude is not None or placement.lora[module].b_bias is not None


def _low_rank_blocks(
    placement: Placement, site: Site, dropped: Collection[str], start: int
) -> tuple[tuple[LowRankBlock | None, ...], int]:
    """The blocks of a site's slices, and where the last ends."""
    loras = [
        placement.lora[piece.module] if has_low_rank(placement, piece.module, dropped) else None
        for piece in site.slices
    ]
    start_b = start + sum(lora.scaling.rank for lora in loras if lora is not None) * site.in_features
    blocks: list[LowRankBlock | None] = []
    for piece, lora in zip(site.slices, loras, strict=True):
        if lora is None:
            blocks.append(None)
            continue
        blocks.append(LowRankBlock(lora, start, start_b, site.in_features, piece.out_features))
        start += lora.scaling.rank * site.in_features
        start_b += lora.scaling.rank * piece.out_features
    return tuple(blocks), start_b


def _overrides(
    placement: Placement, modules: ModuleTable, dropped: Collection[str], *, are_twins: bool
) -> Iterator[OverridePlan]:
    full = placement.full
    whole = {module: own for module, own in full.whole.items() if module not in dropped}
    for module, own in whole.items():
        owner = modules.embedding if are_twins and module == modules.head else module
        tensors = (("weight", own.weight), ("bias", own.bias))
        yield OverridePlan(
            module,
            "weight",
            tuple(
                RegionPlan(name, info.shape, f"{owner if name == 'weight' else module}.{name}")
                for name, info in tensors
                if info is not None
            ),
        )
    for module, trained in full.tokens.items():
        if module not in whole:
            rows = RegionPlan("rows", trained.rows.shape, trained.rows.name)
            yield OverridePlan(module, "tokens", (rows,), tuple(sorted(trained.ids)))
    embedding = placement.embedding_lora
    if embedding is not None and embedding.module not in whole:
        rank, rows_a, dim = embedding.scaling.rank, embedding.lora_a.shape[1], embedding.lora_b.shape[0]
        pair = (
            RegionPlan("a", (rows_a, rank), embedding.lora_a.name),
            RegionPlan("b", (rank, dim), embedding.lora_b.name),
        )
        yield OverridePlan(embedding.module, "embedding_lora", pair)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
