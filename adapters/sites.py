"""Sites: the adapted linears of a base model, as plain data. Imports no torch.

A *site* is one linear that runs as one matmul on the device: `qkv_proj` (stacked q, k and v), `o_proj`,
`gate_up_proj` (stacked gate and up), `down_proj`, or whatever the family has. A *slice* is one original linear inside
it, the thing that PEFT names in `target_modules`. A base that is already fused (Phi-3's `qkv_proj`) has one slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slice:
    """One original linear inside a site.

    Attributes:
        module: full module path in the transformers model, e.g. `model.layers.0.self_attn.q_proj`.
        out_features: rows of its weight.
    """

    module: str
    out_features: int


@dataclass(frozen=True, slots=True)
class Site:
    """One linear as it runs.

    Attributes:
        index: position in the `SiteTable`, and row of every per-site table.
        name: full path of the stacked linear, e.g. `model.layers.0.self_attn.qkv_proj`.
        layer: decoder layer index; -1 for the head.
        in_features: columns of the weight.
        slices: in output order.
        is_head: the output head: 16 bit, and its rows are those that sample, not those of the flat batch.
    """

    index: int
    name: str
    layer: int
    in_features: int
    slices: tuple[Slice, ...]
    is_head: bool = False

    @property
    def out_features(self) -> int:
        """Rows of the stacked weight."""
        return sum(s.out_features for s in self.slices)

    @property
    def kind(self) -> str:
        """Last part of its name, which the same linears of all layers share, e.g. `qkv_proj`."""
        return self.name.rpartition(".")[2]


class SiteTable:
    """All sites of a base, and where each original module sits in them."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites: tuple[Site, ...] = tuple(sites)
        assert [s.index for s in self.sites] == list(range(len(self.sites)))
        self.by_module: dict[str, tuple[Site, int]] = {
            piece.module: (site, i) for site in self.sites for i, piece in enumerate(site.slices)
        }
        self.num_layers = 1 + max((s.layer for s in self.sites), default=-1)
        self.max_slices = max((len(s.slices) for s in self.sites), default=1)
