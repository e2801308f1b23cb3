"""What a format costs: decode steps of a mixed batch with it beside the same batch with plain LoRA.

Each batch has rows of four adapters and of the base. Sides take turns within a round of one run, and ratios are taken
round by round, so that what the machine does meanwhile meets all of them; rsLoRA, which differs from LoRA in nothing
that takes time, shows how much of it is left.

A composition of two adapters is held against two things. One is an adapter of twice the rank, which does the same
arithmetic and is what PEFT's `add_weighted_adapter(combination_type="cat")` makes of the two. The other is what two
adapters cost: twice the time that plain LoRA adds to a step of the base. A strength is held against the same.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bar_panels import Panel, write_result
from comparison import Side, compare
from format_adapters import DOUBLE, PLAIN, write_format_adapters
from lorikeet_side import Adapted, LorikeetSide
from machine import one_line
from measurement import Series
from report import Extra, Measure, Ratio, Report, as_json, as_text, plural
from transformers import AutoConfig
from workload import Size, Workload, in_turn

BASE, STRENGTH, TWO = "base only", "strength 0.5", "two adapters"
WEIGHTS = (0.7, 0.3)
# Room for every adapter of every format at once, four heads of full size among them.
ADAPTER_BYTES = "4GiB"
GOALS = f"goals: DoRA / {PLAIN} at most 1.2; {STRENGTH} and {TWO} at most twice what {PLAIN} adds to the base"


def measure_formats(
    base: Path, size: Size, *, rank: int, threads: int, seed: int, machine: dict[str, Any], out: Path
) -> None:
    """Run all formats, print the table, and write JSON and plot.

    Args:
        base: the base model's directory, in 16 bit.
        size: streams, tokens, adapters of each format, rounds.
        rank: of every adapter.
        threads: CPU threads.
        seed: of the adapters.
        machine: see describe_machine.
        out: where to write.
    """
    with tempfile.TemporaryDirectory() as scratch:
        sys.stderr.write("  writing adapters of every format\n")
        ids = write_format_adapters(base, Path(scratch), count=size.adapters, rank=rank, seed=seed)
        lorikeet = LorikeetSide(
            base,
            Path(scratch),
            [name for names in ids.values() for name in names],
            threads=threads,
            adapter_device_bytes=ADAPTER_BYTES,
            adapter_host_bytes=ADAPTER_BYTES,
        )
        try:
            series = compare(
                [_side(lorikeet, name, adapted) for name, adapted in _adapted(ids).items()],
                [Workload(n, size.prompt, size.tokens) for n in size.streams],
                rounds=size.rounds,
                vocab_size=AutoConfig.from_pretrained(base).vocab_size,
            )
        finally:
            lorikeet.close()
    names = [name for name in _adapted(ids) if name not in (BASE, PLAIN, DOUBLE)]
    steps = [Ratio(name, PLAIN, Measure.STEP) for name in names]
    extras = [Extra(name, PLAIN, BASE) for name in names]
    ratios = [*steps, Ratio(TWO, DOUBLE, Measure.STEP), *extras]
    report = Report(series, ratios)
    settings = {
        "command": 'make bench ARGS="--only formats"',
        "adapters": f"{size.adapters} adapters of rank {rank} on all linears, and base rows",
        "prompt_tokens": size.prompt,
        "new_tokens": size.tokens,
        "rounds": size.rounds,
        "compute_dtype": str(lorikeet.dtype).removeprefix("torch."),
        "composition": f"each row the sum of two neighbours, weights {WEIGHTS[0]} and {WEIGHTS[1]}",
    }
    what = f"{settings['adapters']}, prompt {size.prompt}, {size.tokens} new tokens, {settings['compute_dtype']}"
    sys.stdout.write(f"\n{as_text(report)}\n\n{what}\n{GOALS}\n{one_line(machine)}\n")
    panels = [
        _panel(f"step time / {PLAIN}'s (line: DoRA's goal)", steps, series, size, 1.2),
        _panel(f"added to the base / added by {PLAIN} (line: {STRENGTH}, {TWO})", extras, series, size, 2.0),
    ]
    result = as_json(report, machine, settings)
    for path in write_result(out, "format_cost", result, panels, f"{what}\n{one_line(machine)}"):
        sys.stdout.write(f"wrote {path}\n")


def _adapted(ids: dict[str, list[str]]) -> dict[str, list[Adapted]]:
    """Side -> what adapts its rows, in turn."""
    plain = ids[PLAIN]
    one, other = WEIGHTS
    neighbours = zip(plain, [*plain[1:], plain[0]], strict=True)
    return {
        BASE: [""],
        **{name: [*adapters, ""] for name, adapters in ids.items()},
        STRENGTH: [*({name: 0.5} for name in plain), ""],
        TWO: [*({a: one, b: other} for a, b in neighbours), ""],
    }


def _side(lorikeet: LorikeetSide, name: str, adapted: list[Adapted]) -> Side:
    return Side(name, lambda prompts, n: lorikeet.run(prompts, in_turn(adapted, len(prompts)), n))


def _panel(label: str, ratios: Sequence[Ratio | Extra], series: list[Series], size: Size, limit: float) -> Panel:
    bars = {plural(n): [ratio.at(series, n) for ratio in ratios] for n in size.streams}
    return Panel(label, [ratio.one for ratio in ratios], bars, limit)
