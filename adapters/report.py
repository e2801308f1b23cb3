"""What was found in, and applied from, an adapter. Imports no torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from .config import AdapterConfig, Method
from .scaling import Scaling
from .tensor_map import Placement

_NAMES: Final = {
    Method.ADALORA: "AdaLoRA",
    Method.TRAINABLE_TOKENS: "trainable tokens",
    Method.LN_TUNING: "LayerNorm tuning",
}


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """The effective shape of an adapter.

    Attributes:
        method: LoRA, rsLoRA, DoRA, AdaLoRA, ...
        trained_for: the base that its config names; may be empty.
        max_rank: largest rank of a module.
        num_modules: those with a low-rank delta.
        slices: last part of the module path (`q_proj`) -> (rank, scaling) where all layers agree, else the full path of
            each module of that name.
        full_modules: paths of the modules that do more than add a low-rank delta: whole weights, biases, DoRA, token
            rows. Their effect cannot be multiplied by a weight.
        modules: paths of all modules that it changes, those included.
        vocab_size: token ids that it knows are below this; None: as many as the base has.
        copies: paths of the modules whose weights are in its files and are just the base's, so they were left out.
    """

    method: str
    trained_for: str
    max_rank: int
    num_modules: int
    slices: Mapping[str, Scaling]
    full_modules: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    vocab_size: int | None = None
    copies: frozenset[str] = frozenset()


def make_report(config: AdapterConfig, placement: Placement, dropped: Collection[str] = ()) -> AdapterReport:
    """The report of an adapter.

    Args:
        config: its config.
        placement: its tensors.
        dropped: modules whose own weights are just the base's.
    """
    full = placement.full
    gained = {
        module for module, lora in placement.lora.items() if lora.magnitude is not None or lora.b_bias is not None
    }
    own = (full.whole.keys() - set(dropped)) | full.biases.keys() | full.tokens.keys() | gained
    return AdapterReport(
        method=describe_method(config),
        trained_for=config.trained_for or "",
        max_rank=max((scaling.rank for scaling in placement.scalings.values()), default=0),
        num_modules=len(placement.scalings),
        slices=_summarize(placement.scalings),
        full_modules=frozenset(own),
        modules=frozenset(own | placement.scalings.keys()),
        vocab_size=full.vocab_size,
        copies=frozenset(dropped),
    )


def describe_method(config: AdapterConfig) -> str:
    """The method by its usual name."""
    if config.method in _NAMES:
        return _NAMES[config.method]
    plain = "rsLoRA" if config.use_rslora else "LoRA"
    if not config.use_dora:
        return plain
    return "DoRA, rsLoRA" if config.use_rslora else "DoRA"


def _summarize(scalings: Mapping[str, Scaling]) -> dict[str, Scaling]:
    """Merge modules of the same last name whose rank and scaling agree."""
    by_name: dict[str, dict[str, Scaling]] = {}
    for module, scaling in scalings.items():
        by_name.setdefault(module.rpartition(".")[2], {})[module] = scaling
    summary: dict[str, Scaling] = {}
    for name, modules in sorted(by_name.items()):
        distinct = set(modules.values())
        summary.update({name: distinct.pop()} if len(distinct) == 1 else modules)
    return summary
