"""What a comparison prints and leaves behind: ratios first, a table, JSON, a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comparison import find
from measurement import Series, Spread, agreement, ratio

AGREEMENT_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Ratio:
    """`one` over `other`, in tokens a second (more is better) or in step time (less is better)."""

    one: str
    other: str
    of_step_time: bool = False

    @property
    def title(self) -> str:
        """For a line of text."""
        return f"{self.one} / {self.other}, {'step time' if self.of_step_time else 'tokens/s'}"

    def at(self, series: Sequence[Series], streams: int) -> Spread:
        """At one stream count, round by round."""
        one, other = find(series, self.one, streams).runs, find(series, self.other, streams).runs
        if self.of_step_time:
            return ratio([r.step_ms for r in one], [r.step_ms for r in other])
        return ratio([r.tokens_per_s for r in one], [r.tokens_per_s for r in other])


@dataclass(frozen=True, slots=True)
class Extra:
    """What `one` adds to the step time of `base`, in units of what `unit` adds to it (less is better)."""

    one: str
    unit: str
    base: str

    @property
    def title(self) -> str:
        """For a line of text."""
        return f"{self.one} / {self.unit}, added to {self.base}"

    def at(self, series: Sequence[Series], streams: int) -> Spread:
        """At one stream count, round by round."""
        steps = ([r.step_ms for r in find(series, side, streams).runs] for side in (self.one, self.unit, self.base))
        added = [(one - base, unit - base) for one, unit, base in zip(*steps, strict=True)]
        return ratio([one for one, _ in added], [unit for _, unit in added])


def stream_counts(series: Sequence[Series]) -> list[int]:
    """In the order measured."""
    return list(dict.fromkeys(s.streams for s in series))


def plural(streams: int) -> str:
    """`1 stream`, `8 streams`."""
    return f"{streams} stream{'' if streams == 1 else 's'}"


def as_text(series: Sequence[Series], ratios: Sequence[Ratio | Extra]) -> str:
    """Ratios, then every side: medians with (smallest..largest) over the rounds, steps with (p20..p80)."""
    counts = stream_counts(series)
    width = max(len(r.title) for r in ratios) + 2
    lines = [f"{'':<{width}}" + "".join(f"{plural(n):>22}" for n in counts)]
    for one in ratios:
        lines.append(f"{one.title:<{width}}" + "".join(f"{one.at(series, n):.2f}".rjust(22) for n in counts))
    heads = " ".join(head.ljust(28) for head in ("tokens/s (min..max)", "ms/step (p20..p80)", "CPU ms/token"))
    longest = max(len("side"), *(len(s.side) for s in series))
    lines += ["", f"{'side':<{longest}} {'streams':>7}  {heads}".rstrip()]
    for s in series:
        cells = (f"{spread:.1f}".ljust(28) for spread in (s.tokens_per_s, s.step_ms, s.cpu_ms_per_token))
        lines.append(f"{s.side:<{longest}} {s.streams:>7}  {' '.join(cells)}".rstrip())
    return "\n".join(lines)


def as_json(
    series: Sequence[Series], ratios: Sequence[Ratio | Extra], machine: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything needed to judge or redraw the result, each run included; token ids are left out."""
    return {
        "machine": machine,
        "settings": settings,
        "ratios": {r.title: {n: asdict(r.at(series, n)) for n in stream_counts(series)} for r in ratios},
        "series": [
            {
                "side": s.side,
                "streams": s.streams,
                "tokens_per_s": asdict(s.tokens_per_s),
                "step_ms": asdict(s.step_ms),
                "cpu_ms_per_token": asdict(s.cpu_ms_per_token),
                "rounds": [
                    {
                        "wall_s": round(run.wall_s, 4),
                        "cpu_s": round(run.cpu_s, 4),
                        "output_tokens": run.output_tokens,
                        "tokens_per_s": round(run.tokens_per_s, 2),
                        "step_ms": round(run.step_ms, 3),
                    }
                    for run in s.runs
                ],
            }
            for s in series
        ],
    }


def agreement_line(series: Sequence[Series], one: str, other: str) -> str:
    """How often both sides began alike: random adapters leave near-ties, so a few streams may differ."""
    shares = [
        agreement(a, b, AGREEMENT_TOKENS)
        for n in stream_counts(series)
        for a, b in zip(find(series, one, n).runs, find(series, other, n).runs, strict=True)
    ]
    return f"first {AGREEMENT_TOKENS} tokens the same in {one} and {other}: {100 * sum(shares) / len(shares):.0f} %"


def write(folder: Path, name: str, result: dict[str, Any], series: Sequence[Series], title: str) -> list[Path]:
    """Write `name.json` and `name.png` into a folder, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.png"]
    paths[0].write_text(json.dumps(result, indent=2) + "\n")
    _plot(paths[1], series, title)
    return paths


def _plot(path: Path, series: Sequence[Series], title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    counts = stream_counts(series)
    sides = list(dict.fromkeys(s.side for s in series))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, label, pick in (
        (left, "tokens/s, all streams together (more is better)", lambda s: s.tokens_per_s),
        (right, "ms per decode step (less is better)", lambda s: s.step_ms),
    ):
        bar = 0.8 / len(sides)
        for i, side in enumerate(sides):
            spreads = [pick(find(series, side, n)) for n in counts]
            medians = [s.median for s in spreads]
            errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            at = [x + (i - (len(sides) - 1) / 2) * bar for x in range(len(counts))]
            bars = axes.bar(at, medians, bar, yerr=errors, capsize=2, label=side)
            axes.bar_label(bars, [f"{m:.0f}" for m in medians], fontsize=7, padding=2)
        axes.set_xticks(range(len(counts)), [plural(n) for n in counts])
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
