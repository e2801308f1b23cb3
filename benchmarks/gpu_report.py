"""What the numbers of `make bench-gpu` come to: goals, tables and plots, all made from its JSON alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bar_panels import Panel
from measurement import Spread

OVERHEAD_GOALS = {("one shared", None): 0.04, ("all distinct", 16): 0.25, ("all distinct", 64): 0.50}
"""(side, batch; None: every batch) -> most that adapters may add to the time of the base's step."""
BASE_OF_LIMIT = 0.5
PREFILL_RATIO = 1.10
P99_OF_P50 = 2.0
FALLBACK_RATIO = 1.5
NF4_OF_COPY = 0.5
LARGE_SITES = ("gate_up", "down")
CHUNK_BUDGET = 512
"""Tokens a step of the server's default settings, which the goal is about."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One of the numbers that the benchmark decides.

    Attributes:
        what: is measured.
        value: that was.
        bound: to be reached.
        at_least: whether more is better.
        percent: how it is printed.
    """

    what: str
    value: float
    bound: float
    at_least: bool = False
    percent: bool = True

    @property
    def reached(self) -> bool:
        """Whether the value is on the right side of the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        """One line."""
        sign = ">=" if self.at_least else "<="
        value, bound = (f"{100 * v:.1f} %" if self.percent else f"{v:.2f}" for v in (self.value, self.bound))
        return f"{self.what:<58}{value:>10}   {sign} {bound:<9}{'reached' if self.reached else 'NOT reached'}"


def goals(sections: Mapping[str, Any]) -> list[Goal]:
    """Of what was measured; goals of sections that are missing are left out."""
    found: list[Goal] = []
    for row in sections.get("decode", ()):
        bound = OVERHEAD_GOALS.get((row["side"], row["batch"]), OVERHEAD_GOALS.get((row["side"], None)))
        if bound is not None:
            found.append(Goal(f"step time over base, batch {row['batch']}, {row['side']}", row["overhead"], bound))
    for row in sections.get("engine", ()):
        if row["side"] == "base":
            what = f"end to end, base, batch {row['batch']}, of the limit"
            found.append(Goal(what, row["of_limit"], BASE_OF_LIMIT, at_least=True))
    if "prefill" in sections:
        prefill = sections["prefill"]
        what = f"prefill of {prefill['tokens']} tokens, 16 adapters / base"
        found.append(Goal(what, prefill["ratio"], PREFILL_RATIO, percent=False))
    for row in sections.get("chunks", ()):
        if row["step_tokens"] == CHUNK_BUDGET:
            what = f"p99 / p50 between tokens, {_chunk_way(row)}"
            found.append(Goal(what, row["p99_of_p50"], P99_OF_P50, percent=False))
    return found + _nf4_goals(sections.get("nf4", {}).get("rows", ()))


def _nf4_goals(rows: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """The worst of all shapes and numbers of rows decides."""
    faster = {
        (row["site"], row["rows"]): row["each"]["bitsandbytes"]["median_us"] / row["us"]["median_us"]
        for row in rows
        if "bitsandbytes" in row["each"]
    }
    fallback = {key: ratio for key, ratio in faster.items() if _falls_back(*key)}
    large = {
        (row["site"], row["rows"]): row["fraction_of_copy"]
        for row in rows
        if row["site"] in LARGE_SITES and row["rows"] in (1, 16)
    }
    found = []
    for what, values, bound, percent in (
        ("bitsandbytes / ours, worst", faster, 1.0, False),
        ("bitsandbytes / ours where it falls back, worst", fallback, FALLBACK_RATIO, False),
        ("NF4 matmul, of copy bandwidth, worst", large, NF4_OF_COPY, True),
    ):
        if values:
            site, num_rows = min(values, key=values.__getitem__)
            worst = f"{what} ({site}, M {num_rows})"
            found.append(Goal(worst, values[site, num_rows], bound, at_least=True, percent=percent))
    return found


def _falls_back(site: str, num_rows: int) -> bool:
    """Where bitsandbytes dequantizes the whole weight on an H100, up to the 64 rows that the goal is about."""
    return num_rows <= 64 and num_rows >= {"qkv": 17, "o": 8, "down": 8}.get(site, 65)


def as_text(result: Mapping[str, Any]) -> str:
    """The tables, the goals last."""
    sections = result["sections"]
    parts = [
        *_kernels(sections),
        *_bandwidth(sections),
        *_decode(sections),
        *_engine(sections),
        *_switches(sections),
        *_prefill(sections),
        *_chunks(sections),
        *_missing(result),
        *_goals(goals(sections)),
    ]
    return "\n\n".join(parts)


def panels(sections: Mapping[str, Any]) -> list[Panel]:
    """Step time beside its limit, a panel for each batch; and tokens a second of the engine."""
    found = []
    rows = sections.get("decode", ())
    for batch in dict.fromkeys(row["batch"] for row in rows):
        mine = [row for row in rows if row["batch"] == batch]
        bars = {
            "device": [_spread(row["device_us"], 1e-3) for row in mine],
            "step thread": [_spread(row["wall_us"], 1e-3) for row in mine],
            "limit at copy bandwidth": [_exactly(row["limit_us"] / 1e3) for row in mine],
        }
        found.append(Panel(f"ms a decode step, batch {batch}", [row["side"] for row in mine], bars))
    engine = [row for row in sections.get("engine", ()) if row["side"] == "base"]
    if engine:
        rates = {
            "end to end": [_exactly(row["tokens_per_s"]) for row in engine],
            "limit at copy bandwidth": [_exactly(row["limit_tokens_per_s"]) for row in engine],
        }
        found.append(Panel("tokens/s, base only", [f"batch {row['batch']}" for row in engine], rates))
    return found


def _kernels(sections: Mapping[str, Any]) -> Iterator[str]:
    for found in sections.values():
        if isinstance(found, dict) and "text" in found:
            yield "\n".join(found["text"])


def _bandwidth(sections: Mapping[str, Any]) -> Iterator[str]:
    if "bandwidth" in sections:
        found = sections["bandwidth"]
        yield (
            f"copy {found['copy'] / 1e12:.2f} TB/s (bytes read and written), read {found['read'] / 1e12:.2f} TB/s, "
            f"shortest kernel {found['shortest_us']:.1f} us"
        )


def _decode(sections: Mapping[str, Any]) -> Iterator[str]:
    if "decode" in sections:
        rows = [("decode step", "device us", "wall us", "tokens/s", "limit us", "of it", "over base", "limit")]
        for row in sections["decode"]:
            is_base = row["side"] == "base"
            rows.append(
                (
                    f"{row['batch']:>3} {row['side']}{'' if row['replayed'] > 0.9 else ' (not in graphs)'}",
                    f"{_spread(row['device_us'], 1):.0f}",
                    f"{row['wall_us']['median_us']:.0f}",
                    f"{row['tokens_per_s']:.0f}",
                    f"{row['limit_us']:.0f}",
                    f"{100 * row['of_limit']:.0f} %",
                    "" if is_base else f"{100 * row['overhead']:+.1f} %",
                    "" if is_base else f"{100 * row['overhead_limit']:+.1f} %",
                )
            )
        yield table(rows)


def _engine(sections: Mapping[str, Any]) -> Iterator[str]:
    if "engine" in sections:
        rows = [("engine, end to end", "ms a step", "tokens/s", "limit", "of it", "limit at 3.35 TB/s")]
        rows += [
            (
                f"{row['batch']:>3} {row['side']}",
                f"{Spread(**row['step_ms']):.2f}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['limit_tokens_per_s']:.0f}",
                f"{100 * row['of_limit']:.0f} %",
                f"{row['limit_tokens_per_s_datasheet']:.0f}",
            )
            for row in sections["engine"]
        ]
        yield table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the first is flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = (f"  {cell.rjust(width)}" for cell, width in zip(others, widths[1:], strict=True))
        lines.append(first.ljust(widths[0]) + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def _switches(sections: Mapping[str, Any]) -> Iterator[str]:
    for found in sections.get("switches", ()):
        rows = [(f"batch {found['batch']}, different adapters: {found['adapters']}", "device us", "wall us")]
        for name, device in found["device_us"].items():
            rows.append((name, f"{_spread(device, 1):.0f}", f"{_spread(found['wall_us'][name], 1):.0f}"))
        yield table(rows)
    if "launches" in sections:
        found = sections["launches"]
        rows = [(f"batch {found['batch']}, one step", "kernels", "copies and fills", "host's launches", "device us")]
        for side, counts in found["sides"].items():
            keys = ("kernels", "copies_and_fills", "host_launches", "device_us")
            rows.append((side, *(f"{counts[key]:.0f}" for key in keys)))
        yield table(rows)


def _prefill(sections: Mapping[str, Any]) -> Iterator[str]:
    if "prefill" in sections:
        found = sections["prefill"]
        rows = [(f"prefill of {found['tokens']} tokens", "device ms", "tokens/s")]
        for side, device in found["device_us"].items():
            rate = 1e6 * found["tokens"] / device["median_us"]
            rows.append((side, f"{_spread(device, 1e-3):.1f}", f"{rate:.0f}"))
        yield table(rows)


def _chunks(sections: Mapping[str, Any]) -> Iterator[str]:
    if "chunks" in sections:
        rows = [("between tokens, beside prompts", "p50 ms", "p99 ms", "p99 / p50", "with a chunk", "replayed")]
        rows += [
            (
                _chunk_way(row),
                f"{row['p50_ms']:.2f}",
                f"{row['p99_ms']:.2f}",
                f"{row['p99_of_p50']:.2f}",
                f"{100 * row['with_chunk']:.0f} % of {row['steps']}",
                f"{100 * row['replayed']:.0f} %",
            )
            for row in sections["chunks"]
        ]
        yield table(rows)


def _chunk_way(row: Mapping[str, Any]) -> str:
    bound = f", --max-slowdown {row['max_slowdown']:g}" if row["max_slowdown"] else ""
    return f"{row['step_tokens']} tokens a step{bound}"


def _missing(result: Mapping[str, Any]) -> Iterator[str]:
    if result["skipped"]:
        yield "\n".join(f"{name}: skipped, {why}" for name, why in result["skipped"].items())


def _goals(found: Sequence[Goal]) -> Iterator[str]:
    if found:
        yield "\n".join(map(str, found))


def _spread(timing: Mapping[str, float], factor: float) -> Spread:
    return Spread(*(factor * timing[key] for key in ("median_us", "low_us", "high_us")))


def _exactly(value: float) -> Spread:
    return Spread(value, value, value)
