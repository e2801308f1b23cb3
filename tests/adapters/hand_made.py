"""Adapters made by hand: laid out for the arena, and the same changes on the modules of an ordinary torch model."""

from collections.abc import Callable, Sequence

import torch
from lorikeet.adapters.packing import REGION_ALIGNMENT, Override, OverrideKind, PackedAdapter, Region
from lorikeet.adapters.report import AdapterReport
from lorikeet.adapters.sites import SiteTable
from torch import Tensor, nn

REPORT = AdapterReport("LoRA", "", 1, 1, {})


class HandMade:
    """Add changes, then `pack` it for the store and `apply` it to a reference.

    Args:
        sites: of the base.
        seed: of the random weights.
        std: of lora_A and lora_B.
    """

    def __init__(self, sites: SiteTable, seed: int, std: float = 0.3) -> None:
        self.vocab_size: int | None = None
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}  # module -> A [r, in], B [out, r]
        self.affines: dict[str, tuple[Tensor, Tensor]] = {}  # module -> gain, offset
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.tokens: dict[str, tuple[Tensor, Tensor]] = {}
        self.embedding_loras: dict[str, tuple[Tensor, Tensor]] = {}
        self._embedding_scale = 1.0
        self._sites = sites
        self._std = std
        self._generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self._generator) * std

    def _out(self, module: str) -> int:
        site, index = self._sites.by_module[module]
        return site.slices[index].out_features

    def lora(self, rank: int, *modules: str) -> "HandMade":
        for module in modules:
            width = self._sites.by_module[module][0].in_features
            self.factors[module] = (
                self.randn(rank, width, std=self._std),
                self.randn(self._out(module), rank, std=self._std),
            )
        return self

    def affine(self, *modules: str) -> "HandMade":
        for module in modules:
            out = self._out(module)
            self.affines[module] = (1 + self.randn(out, std=0.2), self.randn(out, std=0.5))
        return self

    def weight(self, module: str, **parameters: Tensor) -> "HandMade":
        self.weights[module] = parameters
        return self

    def token_rows(self, ids: Sequence[int], dim: int, *modules: str, std: float = 0.3) -> "HandMade":
        rows = self.randn(len(ids), dim, std=std)
        for module in modules:
            self.tokens[module] = (torch.tensor(sorted(ids)), rows)
        return self

    def embedding_lora(self, module: str, rank: int, rows: int, dim: int, scale: float) -> "HandMade":
        self.embedding_loras[module] = (self.randn(rows, rank, std=self._std), self.randn(rank, dim, std=self._std))
        self._embedding_scale = scale
        return self

    def pack(self, dtype: torch.dtype = torch.float32) -> PackedAdapter:
        """As `pack_adapter` lays it out."""
        parts: list[Tensor] = []
        sites = self._sites.sites
        offsets = torch.full((len(sites),), -1, dtype=torch.int64)
        affines = torch.full((len(sites),), -1, dtype=torch.int64)
        ranks = torch.zeros((len(sites), self._sites.max_slices), dtype=torch.int32)

        def put(tensor: Tensor, align: bool) -> int:
            end = sum(part.numel() for part in parts)
            padding = -end % REGION_ALIGNMENT if align else 0
            parts.extend([torch.full((padding,), float("nan")), tensor.flatten()])
            return end + padding

        for site in sites:
            own = [self.factors.get(piece.module) for piece in site.slices]
            if any(own):
                a = torch.cat([factors[0] for factors in own if factors])
                offsets[site.index] = put(a, align=False)
                for i, factors in enumerate(own):
                    if factors:
                        put(factors[1].t().contiguous(), align=False)
                        ranks[site.index, i] = len(factors[0])
            if any(piece.module in self.affines for piece in site.slices):
                pairs = [
                    self.affines.get(p.module, (torch.ones(p.out_features), torch.zeros(p.out_features)))
                    for p in site.slices
                ]
                both = torch.stack([torch.cat([gain for gain, _ in pairs]), torch.cat([shift for _, shift in pairs])])
                affines[site.index] = put(both, align=True)
        overrides = self._overrides(lambda tensor: Region(put(tensor, align=True), tuple(tensor.shape)))
        data = torch.cat(parts).to(dtype) if parts else torch.empty(0, dtype=dtype)
        return PackedAdapter(data, offsets, ranks, REPORT, affines, overrides, self.vocab_size)

    def _overrides(self, region: Callable[[Tensor], Region]) -> tuple[Override, ...]:
        found = [
            Override(module, OverrideKind.WEIGHT, {name: region(tensor) for name, tensor in own.items()})
            for module, own in self.weights.items()
        ]
        for module, (ids, rows) in self.tokens.items():
            found.append(Override(module, OverrideKind.TOKENS, {"rows": region(rows)}, ids))
        for module, (a, b) in self.embedding_loras.items():
            regions = {"a": region(a), "b": region(b * self._embedding_scale)}
            found.append(Override(module, OverrideKind.EMBEDDING_LORA, regions))
        return tuple(found)

    @torch.no_grad()
    def apply(self, get: Callable[[str], nn.Module], weight: float = 1.0) -> None:
        """Change the modules that `get` finds by path; low-rank deltas are multiplied by `weight`."""
        for module, own in self.weights.items():
            for name, tensor in own.items():
                _set(get(module), name, tensor)
        for module, (ids, rows) in self.tokens.items():
            old = get(module).weight
            new = torch.zeros(max(len(old), int(ids[-1]) + 1), old.shape[1])
            new[: len(old)] = old
            new[ids] = rows
            _set(get(module), "weight", new)
        for module, (gain, offset) in self.affines.items():
            linear = get(module)
            bias = torch.zeros(len(gain)) if linear.bias is None else linear.bias
            _set(linear, "weight", linear.weight * gain[:, None])
            _set(linear, "bias", bias * gain + offset)
        for module, (a, b) in self.factors.items():
            _set(get(module), "weight", get(module).weight + weight * (b @ a))
        for module, (a, b) in self.embedding_loras.items():
            _set(get(module), "weight", get(module).weight + weight * (a @ b))


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value.clone(), requires_grad=False))
