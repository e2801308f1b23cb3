"""What each way of deploying the demo's adapters costs in perplexity, size and time: `make fidelity`.

For every adapter and its held-out text: the base in 16 bit and in NF4, the adapter unmerged on NF4 (through Lorikeet's
own engine), merged into 16 bit onto both, and merged and quantized. Every result is kept as soon as it is there, so an
interrupted run goes on where it was. Then the decode steps of all ways of one adapter are timed in turns, which takes
minutes and a machine that does nothing else: `--no-times` leaves that for later, `--times-only` does nothing else.
Writes fidelity.json, fidelity.png and the page docs/fidelity.md of what there is.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from bar_panels import Panel, write_result
from corpora import SOURCES, load_corpus
from fidelity_codes import unchanged_codes
from fidelity_page import page, text_table
from fidelity_steps import measure_steps, step_spreads
from fidelity_ways import USUAL, Setup, Subject, kept_ways, measure_ways
from lorikeet.adapters.inspection import inspect_directory
from lorikeet.server.base.demo import prepare_demo_base
from lorikeet.server.config_loading import load_config
from lorikeet.server.evaluation.measured import MeasuredTable, StepTimes, Way
from lorikeet.server.evaluation.report import PathResult
from lorikeet.server.evaluation.texts import read_texts
from lorikeet.server.logs import configure_logs
from machine import describe_machine, one_line
from measurement import Spread
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION_CHARS = 400_000

Results = Mapping[str, Mapping[Way, PathResult]]


def main() -> int:
    """Run it."""
    options = _parse()
    configure_logs("warning", "console")
    config = load_config(["--model", "demo"])
    base = prepare_demo_base(config.cache_dir, wheel=config.demo_wheel)
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    machine = describe_machine()
    work = config.cache_dir / "fidelity" / "models"
    work.mkdir(parents=True, exist_ok=True)
    timed = None if options.no_times else options.timed
    sizes = options.context, options.context // 2
    setup = Setup(config, base, *sizes, options.iterations, work, options.fresh and not options.times_only, timed)
    ways = [way for way in Way if way.name.lower() in options.only] if options.only else list(USUAL)
    results: dict[str, dict[Way, PathResult]] = {}
    missing: dict[str, dict[Way, str]] = {}
    steps: dict[str, StepTimes] = {}
    with tempfile.TemporaryDirectory() as scratch:
        names = dict.fromkeys([*options.adapter, options.timed])
        subjects = {name: _subject(name, Path(scratch), config.cache_dir) for name in names}
        with tqdm(total=len(options.adapter) * len(ways), unit="way", disable=options.times_only) as bar:
            for name in options.adapter:
                if options.times_only:
                    results[name] = kept_ways(subjects[name], setup, ways)
                    missing[name] = {way: "not yet" for way in ways if way not in results[name]}
                else:
                    results[name], missing[name] = measure_ways(subjects[name], setup, ways, bar)
        unchanged = {name: unchanged_codes(subjects[name], setup) for name in results if Way.MERGED_NF4 in ways}
        kept = MeasuredTable(config.cache_dir, subjects[options.timed].digest).steps()
        if timed is not None and (kept is None or options.times_only or options.fresh):
            kept = measure_steps(subjects[timed], setup, ways, one_line(machine))
        if kept is not None:
            steps[options.timed] = kept
    settings = {
        "command": "make fidelity",
        "base": "SmolLM2-135M-Instruct",
        "texts": "examples/heldout, each paragraph on its own",
        "context": setup.context,
        "stride": setup.stride,
        "autoround_iterations": setup.iterations,
    }
    sys.stdout.write(f"\n{text_table(results, missing, steps, unchanged)}\n\n{one_line(machine)}\n")
    found = _json(results, missing, steps, unchanged, machine, settings)
    title = f"held-out text of each adapter\n{one_line(machine)}"
    for path in write_result(options.out, "fidelity", found, _panels(results, steps, ways), title):
        sys.stdout.write(f"wrote {path}\n")
    if not options.no_page:
        plot = os.path.relpath(options.out / "fidelity.png", options.page.parent)
        options.page.write_text(
            page(results, missing, steps, unchanged, settings, one_line(machine), plot), encoding="utf-8"
        )
        sys.stdout.write(f"wrote {options.page}\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--adapter", action="append", choices=sorted(SOURCES), help="measure this one (repeatable) [all four]")
    ways = [way.name.lower() for way in Way]
    usual = ", ".join(way.name.lower() for way in USUAL)
    add("--only", action="append", choices=ways, help=f"measure this way (repeatable) [{usual}]")
    add("--timed", choices=sorted(SOURCES), default="austen", help="time the ways of this adapter [%(default)s]")
    times = parser.add_mutually_exclusive_group()
    times.add_argument("--times-only", action="store_true", help="time the ways anew, and measure nothing else")
    times.add_argument("--no-times", action="store_true", help="time nothing; times of an earlier run are shown")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where JSON and plot go [%(default)s]")
    add("--page", type=Path, default=ROOT / "docs" / "fidelity.md", help="the page to write [%(default)s]")
    add("--no-page", action="store_true", help="do not write the page")
    add("--context", type=int, default=1024, help="tokens of a window [%(default)s]")
    add("--iterations", type=int, default=20, help="of auto-round for each layer [%(default)s]")
    add("--fresh", action="store_true", help="measure again what was measured before, such as on a busy machine")
    options = parser.parse_args()
    options.adapter = options.adapter or sorted(SOURCES)
    return options


def _subject(name: str, scratch: Path, cache_dir: Path) -> Subject:
    """One demo adapter; auto-round gets the text that it was trained on, if that can be fetched."""
    adapter = ROOT / "examples" / "adapters" / name
    calibration: Path | None = scratch / f"{name}.txt"
    try:
        records = load_corpus(name, cache_dir / "texts").train
        text = "\n\n".join(record.text for record in records)[:CALIBRATION_CHARS]
        calibration.write_text(text, encoding="utf-8")
    except SystemExit as error:  # what the fetcher raises
        sys.stderr.write(f"{error} Ways that are calibrated will be missing.\n")
        calibration = None
    texts = read_texts(ROOT / "examples" / "heldout" / f"{name}.txt", by_paragraph=True)
    return Subject(name, adapter, inspect_directory(adapter).digest, texts, calibration)


def _json(
    results: Results,
    missing: Mapping[str, Mapping[Way, str]],
    steps: Mapping[str, StepTimes],
    unchanged: Mapping[str, float],
    machine: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    return {
        "machine": machine,
        "settings": settings,
        "adapters": {
            name: {
                "measured": {way.value: result.to_json() for way, result in found.items()},
                "missing": {way.value: why for way, why in missing[name].items()},
                "unchanged_nf4_values": unchanged.get(name),
            }
            for name, found in results.items()
        },
        "steps": {
            name: {
                "machine": times.machine,
                "steps": times.steps,
                "seconds": {way.value: values for way, values in times.seconds.items()},
            }
            for name, times in steps.items()
        },
    }


def _panels(results: Results, steps: Mapping[str, StepTimes], ways: list[Way]) -> list[Panel]:
    """Perplexity over the NF4 base's, the distance from the unmerged adapter, and step time over the unmerged one's."""
    shown = [way for way in ways if way is not Way.BASE_NF4 and all(way in found for found in results.values())]
    panels: list[Panel] = []
    if all(Way.BASE_NF4 in found for found in results.values()) and shown:
        bars = {
            name: [_exact(found[way].perplexity.value / found[Way.BASE_NF4].perplexity.value) for way in shown]
            for name, found in results.items()
        }
        panels.append(Panel("perplexity / that of the NF4 base", [fill(way.value, 14) for way in shown], bars, 1.0))
    apart = [way for way in shown if all(found[way].divergence is not None for found in results.values())]
    if apart:
        bars = {
            name: [_exact(d.mean) for way in apart if (d := found[way].divergence) is not None]
            for name, found in results.items()
        }
        panels.append(Panel("mean KL from unmerged, nats", [fill(way.value, 14) for way in apart], bars))
    for name, times in steps.items():
        ratios = {way: over for way, (_, over) in step_spreads(times).items() if over is not None}
        if ratios:
            label = f"decode step / unmerged ({name})"
            panels.append(Panel(label, [fill(way.value, 14) for way in ratios], {name: list(ratios.values())}, 1.0))
    return panels


def _exact(value: float) -> Spread:
    return Spread(value, value, value)


if __name__ == "__main__":
    sys.exit(main())
