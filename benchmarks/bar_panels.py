"""What a benchmark leaves behind that compares no sides: JSON, and a plot of bars beside each other."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measurement import Spread

FLAT_LABELS = 6
"""More groups than that have slanted names, which would overlap."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram.

    Attributes:
        label: of the value axis.
        groups: along the other axis.
        bars: name -> one value with its spread for each group.
        limit: a line to stay below, or None.
    """

    label: str
    groups: Sequence[str]
    bars: Mapping[str, Sequence[Spread]]
    limit: float | None = None


def write_result(folder: Path, name: str, result: dict[str, Any], panels: Sequence[Panel], title: str) -> list[Path]:
    """Write `name.json` and `name.png` into a folder, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.png"]
    paths[0].write_text(json.dumps(result, indent=2) + "\n")
    draw(paths[1], panels, title)
    return paths


def draw(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Write a plot of one or more panels beside each other."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    most = max(len(panel.groups) for panel in panels)
    wide = max(5.5, 0.9 * most)
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(wide * len(panels), 4.2), layout="constrained", squeeze=False
    )
    for axes, panel in zip(all_axes[0], panels, strict=True):
        width = 0.8 / len(panel.bars)
        for i, (name, spreads) in enumerate(panel.bars.items()):
            medians = [s.median for s in spreads]
            errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            at = [x + (i - (len(panel.bars) - 1) / 2) * width for x in range(len(panel.groups))]
            bars = axes.bar(at, medians, width, yerr=errors, capsize=2, label=name)
            axes.bar_label(bars, [f"{m:.3g}" for m in medians], fontsize=7, padding=2)
        if panel.limit is not None:
            axes.axhline(panel.limit, color="black", linewidth=0.8, linestyle="--")
        slant = {"rotation": 20, "ha": "right"} if most > FLAT_LABELS else {}
        axes.set_xticks(range(len(panel.groups)), panel.groups, **slant)
        axes.set_ylabel(panel.label)
        axes.margins(y=0.25)  # room for the legend above the bars
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.bars) > 1:
            axes.legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
