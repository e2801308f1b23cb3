"""What a benchmark leaves behind that compares no sides: JSON, and a plot of bars beside each other."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measurement import Spread

FLAT_LABELS = 4
"""More groups than that have slanted names, which would overlap."""
UPRIGHT = 2
"""More bars than that beside each other have upright numbers."""
LETTERS_AN_INCH = 15
"""Of a title."""


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
            spread = {"yerr": errors, "capsize": 2} if any(map(any, errors)) else {}
            bars = axes.bar(at, medians, width, label=name, **spread)
            upright = 90 if len(panel.bars) > UPRIGHT else 0
            axes.bar_label(bars, [f"{m:.3g}" for m in medians], fontsize=7, padding=2, rotation=upright)
        if panel.limit is not None:
            axes.axhline(panel.limit, color="black", linewidth=0.8, linestyle="--")
        slanted = most > FLAT_LABELS
        slant = {"rotation": 25, "ha": "right"} if slanted else {}
        names = [group.replace("\n", " ") if slanted else group for group in panel.groups]
        axes.set_xticks(range(len(names)), names, **slant)
        axes.set_ylabel(panel.label)
        axes.margins(y=0.25)  # room for the legend above the bars
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.bars) > 1:
            axes.legend(frameon=False, fontsize=8, ncols=min(len(panel.bars), 4), loc="upper center")
    letters = int(LETTERS_AN_INCH * figure.get_figwidth())
    lines = (line for paragraph in title.split("\n") for line in textwrap.wrap(paragraph, letters))
    figure.suptitle("\n".join(lines), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
