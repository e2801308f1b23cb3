"""What was found in, and applied from, an adapter. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from .config import AdapterConfig, Method
from .scaling import Scaling


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """The effective shape of an adapter.

    Attributes:
        method: LoRA, rsLoRA or AdaLoRA.
        trained_for: the base that its config names; may be empty.
        max_rank: largest rank of a module.
        num_modules: adapted linears.
        slices: last part of the module path (`q_proj`) -> (rank, scaling) where all layers agree, else the full path of
            each module of that name.
        full_modules: paths of the modules that do more than add a low-rank delta: whole weights, biases, DoRA, token
            rows. Their effect cannot be multiplied by a weight.
        modules: paths of all modules that it changes, those included.
        vocab_size: token ids that it knows are below this; None: as many as the base has.
    """

    method: str
    trained_for: str
    max_rank: int
    num_modules: int
    slices: Mapping[str, Scaling]
    full_modules: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    vocab_size: int | None = None


def make_report(config: AdapterConfig, scalings: Mapping[str, Scaling]) -> AdapterReport:
    """The report of an adapter whose modules have these ranks and scalings (at least one)."""
    plain = "rsLoRA" if config.use_rslora else "LoRA"
    return AdapterReport(
        method="AdaLoRA" if config.method is Method.ADALORA else plain,
        trained_for=config.trained_for or "",
        max_rank=max(scaling.rank for scaling in scalings.values()),
        num_modules=len(scalings),
        slices=_summarize(scalings),
    )


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
