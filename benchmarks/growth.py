"""How something grows: measured at some sizes, with the exponent of the power that fits, as text, JSON and a plot."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from measurement import Spread


@dataclass(slots=True)
class Point:
    """What was measured at one size.

    Attributes:
        size: along the axis.
        step_us: of each round, the median of its steps.
        parts_us: part -> of each round, the mean of its steps.
        per: what a step handled, in units of the curve's.
    """

    size: int
    step_us: list[float] = field(default_factory=list)
    parts_us: dict[str, list[float]] = field(default_factory=dict)
    per: float = 1.0

    @property
    def spread(self) -> Spread:
        """Microseconds a step, over the rounds."""
        return Spread.of(self.step_us)

    @property
    def parts(self) -> dict[str, float]:
        """Medians over the rounds."""
        return {part: float(np.median(values)) for part, values in self.parts_us.items()}


@dataclass(slots=True)
class Curve:
    """One thing that grows.

    Attributes:
        name: of the curve.
        axis: what `size` counts.
        unit: what a step's time is divided by, such as `request`.
        points: by size.
    """

    name: str
    axis: str
    unit: str
    points: list[Point]

    @property
    def exponent(self) -> float:
        """Of the power of the size that fits the medians best; fixed costs make it smaller where sizes are small."""
        if len(self.points) < 2:
            return math.nan
        sizes, times = (np.log([f(p) for p in self.points]) for f in (lambda p: p.size, lambda p: p.spread.median))
        return float(np.polyfit(sizes, times, 1)[0])

    @property
    def last_exponent(self) -> float:
        """Between the two largest sizes: what grows faster than linearly would show here first."""
        if len(self.points) < 2:
            return math.nan
        before, last = self.points[-2:]
        return math.log(last.spread.median / before.spread.median) / math.log(last.size / before.size)

    def as_text(self) -> str:
        """The exponents, then a line for each size."""
        lines = [
            f"{self.name}: grows with exponent {self.exponent:.2f} (last two sizes {self.last_exponent:.2f})",
            f"  {self.axis:>18} {'us a step (min..max)':>30} {f'us a {self.unit}':>16}   of which",
        ]
        for point in self.points:
            parts = ", ".join(f"{part} {us:.0f}" for part, us in point.parts.items())
            per = point.spread.median / point.per
            lines.append(f"  {point.size:>18} {f'{point.spread:.0f}':>30} {per:>16.2f}   {parts}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Everything, each round included."""
        return {
            "axis": self.axis,
            "unit": self.unit,
            "exponent": self.exponent,
            "last_exponent": self.last_exponent,
            "points": [
                {
                    "size": point.size,
                    "step_us": asdict(point.spread),
                    "us_a_unit": point.spread.median / point.per,
                    "parts_us": point.parts,
                    "rounds_us": point.step_us,
                }
                for point in self.points
            ],
        }


def write_curves(folder: Path, name: str, result: dict[str, Any], curves: Sequence[Curve], title: str) -> list[Path]:
    """Write `name.json` and `name.png` into a folder, which is made if missing."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.png"]
    paths[0].write_text(json.dumps(result | {"curves": {c.name: c.as_json() for c in curves}}, indent=2) + "\n")
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.8 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, curve in zip(grid.flat, curves, strict=False):
        sizes = [point.size for point in curve.points]
        spreads = [point.spread for point in curve.points]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        axes.errorbar(sizes, [s.median for s in spreads], errors, marker="o", capsize=2, color="black", label="step")
        for part in curve.points[0].parts_us:
            axes.plot(sizes, [point.parts[part] for point in curve.points], marker=".", linewidth=1, label=part)
        first = spreads[0].median
        axes.plot(sizes, [first * size / sizes[0] for size in sizes], "k:", linewidth=0.8, label="linear")
        axes.set(xscale="log", yscale="log", xlabel=curve.axis, ylabel="us a step")
        axes.set_title(f"{curve.name}: exponent {curve.exponent:.2f}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(paths[1], dpi=120)
    plt.close(figure)
    return paths
