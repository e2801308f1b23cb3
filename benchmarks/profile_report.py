"""What `step_profile.py` measured: tables, JSON and the plot of stacked bars."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measurement import Spread

SERVED, ONE_BY_ONE = "as served", "operators one by one"
LAYERS = "all layers in one call"
SMALL = "norms, rotation, activation"
OPERATORS = (LAYERS, "linears", "head", "LoRA", "attention", SMALL, "sampling")
ENGINE = ("decoder between operators", "schedule", "inputs", "detokenize, deliver, metrics, loop")


@dataclass(slots=True)
class Profile:
    """One number of streams of one kind, one way of calling operators.

    Attributes:
        name: as printed.
        plain_ms: of each round, the median step without clocks.
        clocked_ms: of each round, the mean step with clocks.
        parts_ms: part -> of each round, the mean over its steps.
    """

    name: str
    plain_ms: list[float] = field(default_factory=list)
    clocked_ms: list[float] = field(default_factory=list)
    parts_ms: dict[str, list[float]] = field(default_factory=dict)

    def part(self, name: str) -> float:
        """Milliseconds of a part, median over the rounds."""
        return statistics.median(self.parts_ms[name])

    @property
    def python_ms(self) -> Spread:
        """What is outside of operators, over the rounds."""
        return Spread.of([sum(times) for times in zip(*(self.parts_ms[part] for part in ENGINE), strict=True)])

    @property
    def python_percent(self) -> Spread:
        """The same as a share of the clocked step."""
        outside = zip(*(self.parts_ms[part] for part in ENGINE), strict=True)
        return Spread.of([100 * sum(times) / whole for times, whole in zip(outside, self.clocked_ms, strict=True)])


def table(way: str, profiles: Sequence[Profile]) -> list[str]:
    """The lines of one way."""

    def line(title: str, cells: Sequence[str]) -> str:
        return f"{title:<36}" + "".join(f"{cell:>17}" for cell in cells)

    lines = [line(way, [each.name for each in profiles])]
    lines.append(line("Python overhead, ms (median)", [f"{each.python_ms.median:.2f}" for each in profiles]))
    lines.append(line("Python overhead, % of the step", [f"{each.python_percent.median:.1f}" for each in profiles]))
    lines += ["", "ms a step (% of it)"]
    for part in OPERATORS + ENGINE:
        cells = [(each.part(part), 100 * each.part(part) / statistics.median(each.clocked_ms)) for each in profiles]
        if any(milliseconds for milliseconds, _ in cells):
            lines.append(line(part, [f"{milliseconds:.2f} ({percent:.1f})" for milliseconds, percent in cells]))
    for title, pick in (("step with clocks", "clocked_ms"), ("step without", "plain_ms")):
        lines.append(line(title, [f"{statistics.median(getattr(each, pick)):.2f}" for each in profiles]))
    return lines


def as_json(each: Profile) -> dict[str, Any]:
    """What is written of a profile."""
    return {
        "python_ms": asdict(each.python_ms),
        "python_percent": asdict(each.python_percent),
        "step_ms": asdict(Spread.of(each.plain_ms)),
        "clocked_step_ms": asdict(Spread.of(each.clocked_ms)),
        "parts_ms": {part: asdict(Spread.of(times)) for part, times in each.parts_ms.items()},
    }


def draw(path: Path, by_way: dict[str, list[Profile]], title: str) -> None:
    """A stacked bar for each, in percent of its step; beside it that of the other way."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    pairs = zip(by_way[SERVED], by_way[ONE_BY_ONE], strict=True)
    profiles = [each for pair in pairs for each in pair]
    names = [f"{each.name}\n{note}" for each, note in zip(profiles, ["served", "1 by 1"] * len(profiles), strict=False)]
    figure, axes = plt.subplots(figsize=(12, 4.4), layout="constrained")
    below = [0.0] * len(profiles)
    for part in OPERATORS + ENGINE:
        heights = [100 * p.part(part) / statistics.median(p.clocked_ms) for p in profiles]
        hatch = "//" if part in ENGINE else ""
        axes.bar(names, heights, 0.7, below, label=part, hatch=hatch)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.tick_params(axis="x", labelsize=8)
    for i, each in enumerate(profiles):
        axes.text(i, 101, f"{statistics.median(each.plain_ms):.1f} ms", ha="center", fontsize=8)
    axes.set_ylabel("% of a decode step; hatched: outside of operators")
    axes.set_ylim(0, 108)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
