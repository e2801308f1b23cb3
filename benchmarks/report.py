"""What a comparison prints and leaves behind: ratios first, with their goals, a table, JSON, a plot."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from comparison import find
from measurement import Run, Series, Spread, agreement, ratio

AGREEMENT_TOKENS = 4


class Measure(StrEnum):
    """What a ratio compares. Rates are better large, step times small."""

    WHOLE = "tokens/s of the whole run"
    DECODE = "decode tokens/s"
    STEP = "step time"

    def of(self, runs: Sequence[Run]) -> list[float]:
        """One number for each run."""
        if self is Measure.STEP:
            return [run.step_ms for run in runs]
        return [run.tokens_per_s if self is Measure.WHOLE else run.decode_tokens_per_s for run in runs]


@dataclass(frozen=True, slots=True)
class Ratio:
    """`one` over `other`."""

    one: str
    other: str
    measure: Measure = Measure.WHOLE

    @property
    def title(self) -> str:
        """For a line of text."""
        return f"{self.one} / {self.other}, {self.measure}"

    def at(self, series: Sequence[Series], streams: int) -> Spread | None:
        """At one stream count, round by round; None where a side did not run."""
        runs = _runs(series, (self.one, self.other), streams)
        return ratio(*(self.measure.of(each) for each in runs)) if runs else None


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

    def at(self, series: Sequence[Series], streams: int) -> Spread | None:
        """At one stream count, round by round; None where a side did not run."""
        runs = _runs(series, (self.one, self.unit, self.base), streams)
        if runs is None:
            return None
        added = [(one - base, unit - base) for one, unit, base in zip(*map(Measure.STEP.of, runs), strict=True)]
        return ratio([one for one, _ in added], [unit for _, unit in added])


@dataclass(frozen=True, slots=True)
class Headline:
    """A ratio at one stream count, with what is to be reached there, if anything.

    Attributes:
        ratio: of two sides.
        streams: where it is taken.
        goal: the least that a ratio of rates is to be, or the most for one of step times; None for no goal.
    """

    ratio: Ratio
    streams: int
    goal: float | None = None

    @property
    def goal_text(self) -> str:
        """`at least 5`, `at most 1.25`, or nothing."""
        if self.goal is None:
            return ""
        return f"at {'most' if self.ratio.measure is Measure.STEP else 'least'} {self.goal:g}"

    def reached(self, series: Sequence[Series]) -> bool | None:
        """Whether the median reaches the goal; None without a goal, or where a side did not run."""
        spread = self.ratio.at(series, self.streams)
        if spread is None or self.goal is None:
            return None
        return spread.median <= self.goal if self.ratio.measure is Measure.STEP else spread.median >= self.goal


@dataclass(frozen=True, slots=True)
class Report:
    """What is said about a comparison.

    Attributes:
        series: of all sides that ran.
        ratios: shown at every stream count.
        headlines: shown before them, one a line.
        missing: side -> why it did not run.
    """

    series: Sequence[Series]
    ratios: Sequence[Ratio | Extra]
    headlines: Sequence[Headline] = ()
    missing: Mapping[str, str] = field(default_factory=dict)


def stream_counts(series: Sequence[Series]) -> list[int]:
    """In the order measured."""
    return list(dict.fromkeys(s.streams for s in series))


def plural(streams: int) -> str:
    """`1 stream`, `8 streams`."""
    return f"{streams} stream{'' if streams == 1 else 's'}"


def as_text(report: Report) -> str:
    """Headlines, ratios, then every side: medians with (smallest..largest) over the rounds, steps with (p20..p80)."""
    series = report.series
    counts = stream_counts(series)
    width = max(len(r.title) for r in report.ratios) + 2
    lines = _headlines(report)
    lines.append(f"{'':<{width}}" + "".join(f"{plural(n):>22}" for n in counts))
    for one in report.ratios:
        lines.append(f"{one.title:<{width}}" + "".join(_cell(one.at(series, n), ".2f").rjust(22) for n in counts))
    heads = ("decode tokens/s (min..max)", "tokens/s (min..max)", "ms/step (p20..p80)", "CPU ms/token")
    longest = max(len("side"), *(len(s.side) for s in series), *map(len, report.missing))
    lines += ["", f"{'side':<{longest}} {'streams':>7}  {' '.join(head.ljust(28) for head in heads)}".rstrip()]
    for s in series:
        spreads = (s.decode_tokens_per_s, s.tokens_per_s, s.step_ms, s.cpu_ms_per_token)
        cells = (f"{spread:.1f}".ljust(28) for spread in spreads)
        lines.append(f"{s.side:<{longest}} {s.streams:>7}  {' '.join(cells)}".rstrip())
    lines += [f"{side:<{longest}} missing: {why}" for side, why in report.missing.items()]
    return "\n".join(lines)


def _headlines(report: Report) -> list[str]:
    """One line for each, those of a stream count together; none at a stream count that was not run."""
    lines: list[str] = []
    for streams in stream_counts(report.series):
        here = [h for h in report.headlines if h.streams == streams]
        if not here:
            continue
        width = max(len(h.ratio.title) for h in here) + 2
        lines.append(f"at {plural(streams)}")
        for headline in here:
            spread = headline.ratio.at(report.series, streams)
            verdict = {True: "reached", False: "not reached", None: "not measured"}[headline.reached(report.series)]
            goal = f"goal {headline.goal_text}: {verdict}" if headline.goal is not None else ""
            lines.append(f"  {headline.ratio.title:<{width}}{_cell(spread, '.2f'):<22}{goal}".rstrip())
        lines.append("")
    return lines


def as_json(report: Report, machine: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything needed to judge or redraw the result, each run included; token ids are left out."""
    series = report.series
    return {
        "machine": machine,
        "settings": settings,
        "headlines": [
            {
                "ratio": headline.ratio.title,
                "streams": headline.streams,
                **_as_dict(headline.ratio.at(series, headline.streams)),
                "goal": headline.goal_text or None,
                "reached": headline.reached(series),
            }
            for headline in report.headlines
        ],
        "missing": dict(report.missing),
        "ratios": {
            r.title: {n: asdict(spread) for n in stream_counts(series) if (spread := r.at(series, n)) is not None}
            for r in report.ratios
        },
        "series": [
            {
                "side": s.side,
                "streams": s.streams,
                "decode_tokens_per_s": asdict(s.decode_tokens_per_s),
                "tokens_per_s": asdict(s.tokens_per_s),
                "step_ms": asdict(s.step_ms),
                "cpu_ms_per_token": asdict(s.cpu_ms_per_token),
                "rounds": [
                    {
                        "wall_s": round(run.wall_s, 4),
                        "cpu_s": round(run.cpu_s, 4),
                        "output_tokens": run.output_tokens,
                        "decode_tokens_per_s": round(run.decode_tokens_per_s, 2),
                        "tokens_per_s": round(run.tokens_per_s, 2),
                        "step_ms": round(run.step_ms, 3),
                    }
                    for run in s.runs
                ],
            }
            for s in series
        ],
    }


def _runs(series: Sequence[Series], sides: Sequence[str], streams: int) -> list[list[Run]] | None:
    """The runs of each side at a stream count; None where one of them did not run."""
    found = [find(series, side, streams) for side in sides]
    return None if None in found else [s.runs for s in found if s is not None]


def _cell(spread: Spread | None, spec: str) -> str:
    return "-" if spread is None else f"{spread:{spec}}"


def _as_dict(spread: Spread | None) -> dict[str, float | None]:
    return {"median": None, "low": None, "high": None} if spread is None else asdict(spread)


def agreement_line(series: Sequence[Series], one: str, other: str) -> str:
    """How often both sides began alike: random adapters leave near-ties, so a few streams may differ."""
    both = [runs for n in stream_counts(series) if (runs := _runs(series, (one, other), n)) is not None]
    shares = [agreement(a, b, AGREEMENT_TOKENS) for runs in both for a, b in zip(*runs, strict=True)]
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    for axes, label, pick in (
        (left, "decode tokens/s, all streams together (more is better)", lambda s: s.decode_tokens_per_s),
        (right, "ms per decode step (less is better)", lambda s: s.step_ms),
    ):
        bar = 0.8 / len(sides)
        for i, side in enumerate(sides):
            ran = [(x, found) for x, n in enumerate(counts) if (found := find(series, side, n)) is not None]
            spreads = [pick(found) for _, found in ran]
            medians = [s.median for s in spreads]
            errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            at = [x + (i - (len(sides) - 1) / 2) * bar for x, _ in ran]
            bars = axes.bar(at, medians, bar, yerr=errors, capsize=2, label=side)
            axes.bar_label(bars, [f"{m:.0f}" for m in medians], fontsize=6, padding=2)
        axes.set_xticks(range(len(counts)), [plural(n) for n in counts])
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
