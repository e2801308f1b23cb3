"""What each way of deploying the demo's adapters costs in perplexity, size and time: `make fidelity`.

For every adapter and its held-out text: the base in 16 bit and in NF4, the adapter unmerged on NF4 (through Lorikeet's
own engine), merged into 16 bit onto both, and merged and quantized. Every result is kept as soon as it is there, so an
interrupted run goes on where it was. Writes fidelity.json, fidelity.png and the page docs/fidelity.md.
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
from fidelity_page import page, text_table
from fidelity_ways import Setup, Subject, measure_ways
from lorikeet.adapters.inspection import inspect_directory
from lorikeet.server.base.demo import prepare_demo_base
from lorikeet.server.config_loading import load_config
from lorikeet.server.evaluation.measured import Way
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
    setup = Setup(config, base, options.context, options.context // 2, options.iterations, work, options.fresh)
    ways = [way for way in Way if not options.only or way.name.lower() in options.only]
    results: dict[str, dict[Way, PathResult]] = {}
    missing: dict[str, dict[Way, str]] = {}
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=len(options.adapter) * len(ways), unit="way") as bar:
        for name in options.adapter:
            subject = _subject(name, Path(scratch), config.cache_dir)
            results[name], missing[name] = measure_ways(subject, setup, ways, bar)
    settings = {
        "command": "make fidelity",
        "base": "SmolLM2-135M-Instruct",
        "texts": "examples/heldout, each paragraph on its own",
        "context": setup.context,
        "stride": setup.stride,
        "autoround_iterations": setup.iterations,
    }
    sys.stdout.write(f"\n{text_table(results, missing)}\n\n{one_line(machine)}\n")
    found = _json(results, missing, machine, settings)
    title = f"held-out text of each adapter\n{one_line(machine)}"
    for path in write_result(options.out, "fidelity", found, _panels(results, ways), title):
        sys.stdout.write(f"wrote {path}\n")
    if not options.no_page:
        plot = os.path.relpath(options.out / "fidelity.png", options.page.parent)
        options.page.write_text(page(results, missing, settings, one_line(machine), plot), encoding="utf-8")
        sys.stdout.write(f"wrote {options.page}\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--adapter", action="append", choices=sorted(SOURCES), help="measure this one (repeatable) [all four]")
    ways = [way.name.lower() for way in Way]
    add("--only", action="append", choices=ways, help="measure this way (repeatable) [all]")
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
    results: Results, missing: Mapping[str, Mapping[Way, str]], machine: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    return {
        "machine": machine,
        "settings": settings,
        "adapters": {
            name: {
                "measured": {way.value: result.to_json() for way, result in found.items()},
                "missing": {way.value: why for way, why in missing[name].items()},
            }
            for name, found in results.items()
        },
    }


def _panels(results: Results, ways: list[Way]) -> list[Panel]:
    """Perplexity as a share of the NF4 base's, and the distance from the unmerged adapter, by way and adapter."""
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
    return panels


def _exact(value: float) -> Spread:
    return Spread(value, value, value)


if __name__ == "__main__":
    sys.exit(main())
