"""What an adapter's config and the headers of its weights files alone decide: where every tensor goes.

The adapters of one fleet have these bytes in common, so it is worked out once for all of them; what is left for each is
its payload. Whatever looks at values (`copies.py`, `packing.py`) is not here.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .config import AdapterConfig, parse_config
from .fingerprint import BaseFingerprint
from .layout import Layout, count_certain_elements, plan_layout
from .memo import Memo
from .modules import ModuleTable
from .report import AdapterReport, make_report
from .shards import OpenWeights
from .sites import SiteTable
from .tensor_map import Placement, group_tensors, place_tensors
from .weights_file import MAX_SHARED_BYTES, NUM_SHARED, WeightsHeader


@dataclass(frozen=True, slots=True, eq=False)
class LaidOut:
    """Where everything lies in the packed adapter. Shared: nothing of it is ever written to.

    Attributes:
        layout: element offsets.
        site_offsets, site_affines, site_ranks: as `packing.PackedAdapter` has them.
        report: what is applied.
    """

    layout: Layout
    site_offsets: Tensor
    site_affines: Tensor
    site_ranks: Tensor
    report: AdapterReport


class TensorPlan:
    """What all adapters with the same config and headers share. Thread-safe.

    Args:
        config: theirs.
        placement: where their tensors go.
        sites, modules: the base's.

    Attributes:
        config, placement, sites, modules: as given.
        num_certain: elements that each of them takes at least, whatever its payload says.
    """

    def __init__(self, config: AdapterConfig, placement: Placement, sites: SiteTable, modules: ModuleTable) -> None:
        self.config: Final = config
        self.placement: Final = placement
        self.sites: Final = sites
        self.modules: Final = modules
        self.num_certain: Final = count_certain_elements(placement, sites, modules)
        self._laid_out: dict[tuple[frozenset[str], bool], LaidOut] = {}

    def lay_out(self, dropped: frozenset[str], *, are_twins: bool) -> LaidOut:
        """The layout of one of these adapters.

        Args:
            dropped: modules whose own weights are left out, because they are the base's: of embedding and head.
            are_twins: the embedding's and the head's own weights are the same, so they are kept once.
        """
        key = (dropped, are_twins)
        if key not in self._laid_out:
            self._laid_out[key] = self._lay_out(dropped, are_twins=are_twins)
        return self._laid_out[key]

    def _lay_out(self, dropped: frozenset[str], *, are_twins: bool) -> LaidOut:
        layout = plan_layout(self.placement, self.sites, self.modules, dropped=dropped, are_twins=are_twins)
        num_sites = len(self.sites.sites)
        offsets = torch.full((num_sites,), -1, dtype=torch.int64)
        affines = torch.full((num_sites,), -1, dtype=torch.int64)
        ranks = torch.zeros((num_sites, self.sites.max_slices), dtype=torch.int32)
        for site, start, affine, blocks in layout.sites:
            offsets[site.index], affines[site.index] = start, affine
            own = [0 if block is None else block.lora.scaling.rank for block in blocks]
            ranks[site.index, : len(own)] = torch.tensor(own, dtype=torch.int32)
        return LaidOut(layout, offsets, affines, ranks, make_report(self.config, self.placement, dropped))


class TensorPlanner:
    """Works plans out, and remembers the last ones. Thread-safe.

    Args:
        sites, modules: the base's.
        base: its names, for messages.
    """

    def __init__(self, sites: SiteTable, modules: ModuleTable, base: BaseFingerprint) -> None:
        self._sites = sites
        self._modules = modules
        self._base = base
        self._configs: Memo[bytes, AdapterConfig] = Memo(NUM_SHARED)
        self._plans: Memo[tuple[bytes, tuple[WeightsHeader, ...]], TensorPlan] = Memo(NUM_SHARED)

    def parse(self, config_bytes: bytes) -> AdapterConfig:
        """As `config.parse_config`."""
        if len(config_bytes) > MAX_SHARED_BYTES:
            return parse_config(config_bytes)
        return self._configs.get(config_bytes, lambda: parse_config(config_bytes))

    def plan(self, config_bytes: bytes, config: AdapterConfig, weights: OpenWeights) -> TensorPlan:
        """The plan of an adapter.

        Args:
            config_bytes: of adapter_config.json.
            config: what they say.
            weights: its open files; only the headers are looked at.

        Raises:
            AdapterInvalidError, AdapterIncompatibleError: as `tensor_map.group_tensors` and `place_tensors`.
        """

        def make() -> TensorPlan:
            groups = group_tensors(weights.tensors, config)
            placement = place_tensors(groups, config, self._sites, self._modules, self._base)
            return TensorPlan(config, placement, self._sites, self._modules)

        headers = weights.headers
        if max(len(config_bytes), sum(len(header.raw) for header in headers)) > MAX_SHARED_BYTES:
            return make()
        return self._plans.get((config_bytes, headers), make)
