"""`make bench-merge`: do running requests notice that the server merges adapters?

Streams decode on the demo base with small adapters. In windows that take turns, nothing else happens, or a merge of
one of the adapters begins, or one that began before writes its weights, or one compares its result on text; when it
ends, the next one begins. Compared is the time between two tokens of a request, from the engine's events. And how far
merges come meanwhile: their share of a core, and how much of the stage was done.

Prints ratios first and writes JSON and a plot.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bar_panels import Panel, write_result
from local_server import local_server, quiet_process
from lorikeet.server.app import App
from lorikeet.server.base.demo import prepare_demo_base
from lorikeet.server.client import LorikeetClient
from lorikeet.server.client_merges import MergeOptions
from lorikeet.server.config import ServerConfig
from machine import one_line
from measurement import Spread, ratio
from merging import ContinuousMerges, MergeWork, merge_client
from options import base_of, parse_or_quick, parser_of
from token_gaps import Window, pooled_ratio, watch_streams
from workload import Workload, in_turn, write_random_adapters

SEED = 11
ADAPTERS, RANK = 4, 8
QUIET, BEGINNING, MERGING, COMPARING = "quiet", "beginning", "merging", "comparing"
SIDES = (QUIET, BEGINNING, MERGING, COMPARING)
QUICK = {"streams": 2, "prompt": 8, "seconds": 2.0, "rounds": 1}
GOAL = 1.2  # p99 between tokens, merging / quiet
# Any text does: what is measured is not how well a random adapter predicts it.
MERGES: dict[str, MergeOptions] = {
    BEGINNING: {"unverified": True},
    MERGING: {"unverified": True},
    COMPARING: {"texts": [Path(__file__).read_text(encoding="utf-8")], "accept_loss": True},
}
# The stage in which a window begins; none: the merge begins with it.
STAGES = {BEGINNING: "", MERGING: "Merging", COMPARING: "Comparing"}


def main() -> int:
    """Run it.

    Returns:
        The exit status.
    """
    parser = parser_of(__doc__, "threads", "device", "model", "out", "quick")
    add = parser.add_argument
    add("--streams", type=int, default=8, help="requests that decode at the same time [8]")
    add("--prompt", type=int, default=32, help="tokens in each prompt [32]")
    add("--seconds", type=float, default=30.0, help="length of a window [30]")
    add("--rounds", type=int, default=5, help="windows of each kind [5]")
    add("--priority", default="low", choices=("idle", "low", "normal"), help="the server's --merge-priority [low]")
    options = parse_or_quick(parser, QUICK)
    machine = quiet_process(options.threads, "gaps will be longer than they are")
    base = options.model or prepare_demo_base(ServerConfig().cache_dir)
    with tempfile.TemporaryDirectory() as scratch:
        folder, merged = Path(scratch) / "adapters", Path(scratch) / "merged"
        merged.mkdir()
        names = write_random_adapters(base, folder, count=ADAPTERS, rank=RANK, seed=SEED)
        server_settings: dict[str, Any] = {
            "model": str(options.model or "demo"),
            "device": options.device,
            "threads": options.threads,
            "merge_dir": merged,
            "merge_priority": options.priority,
        }
        with local_server(options.model, folder, Path(scratch) / "state", **server_settings) as server:
            for name in names:
                server.manager.load(name)
            with merge_client(server) as client:
                watch = _watcher(server, client, names, merged, options.streams, options.prompt, options.seconds)
                windows, work = watch_rounds(watch, options.rounds)
    settings = {
        "command": "make bench-merge",
        "base": base_of(options),
        "adapters": f"{ADAPTERS} of rank {RANK}",
        "streams": options.streams,
        "prompt_tokens": options.prompt,
        "window_s": options.seconds,
        "rounds": options.rounds,
        "merge_priority": options.priority,
    }
    report(options.out, machine, settings, windows, work)
    return 0


# A window of that kind with that number, and what merges did in it.
Watch = Callable[[str, int], tuple[Window, MergeWork | None]]


def _watcher(
    server: App, client: LorikeetClient, names: list[str], merged: Path, streams: int, prompt: int, seconds: float
) -> Watch:
    adapter_ids = in_turn(names, streams)

    def watch(side: str, number: int) -> tuple[Window, MergeWork | None]:
        prompts = Workload(streams, prompt, 0).prompts(server.base.model.config.vocab_size, seed=1000 * SEED + number)
        if side == QUIET:
            return watch_streams(server, prompts, adapter_ids, seconds), None
        merges = ContinuousMerges(client, merged, names[0], MERGES[side])

        def begin() -> None:
            merges.mark()
            if not STAGES[side]:
                merges.start()

        try:
            if STAGES[side]:
                merges.start(STAGES[side])
            window = watch_streams(server, prompts, adapter_ids, seconds, meanwhile=begin)
            work = merges.work()
        finally:
            merges.stop()
        return window, work

    return watch


def watch_rounds(watch: Watch, rounds: int) -> tuple[dict[str, list[Window]], dict[str, list[MergeWork]]]:
    """The windows of each side, and what merges did in them."""
    windows: dict[str, list[Window]] = {side: [] for side in SIDES}
    works: dict[str, list[MergeWork]] = {side: [] for side in SIDES[1:]}
    watch(QUIET, -1)
    for number in range(rounds):
        # What the machine does meanwhile meets all: each comes first in turn.
        first = number % len(SIDES)
        for side in SIDES[first:] + SIDES[:first]:
            window, work = watch(side, len(SIDES) * number + SIDES.index(side))
            windows[side].append(window)
            if work is not None:
                works[side].append(work)
                sys.stderr.write(f"    {side}: {work}\n")
        p99 = ", ".join(f"{windows[side][-1].percentile_ms(99):.1f} ms {side}" for side in SIDES)
        sys.stderr.write(f"  round {number + 1}/{rounds}: p99 between tokens {p99}\n")
    return windows, works


def report(
    out: Path,
    machine: dict[str, Any],
    settings: dict[str, Any],
    windows: dict[str, list[Window]],
    works: dict[str, list[MergeWork]],
) -> None:
    """Print the tables, write JSON and plot."""
    gaps = {
        side: {f"p{p}": Spread.of([w.percentile_ms(p) for w in of]) for p in (50, 99, 100)}
        for side, of in windows.items()
    }
    ratios: dict[str, Spread] = {}
    for side in SIDES[1:]:
        for p in (99, 50):
            found = ratio(*([w.percentile_ms(p) for w in windows[each]] for each in (side, QUIET)))
            ratios[f"p{p} between tokens, {side} / quiet"] = found
        ratios[f"p99 of all rounds together, {side}"] = pooled_ratio(windows[side], windows[QUIET], 99)
    result = {
        "machine": machine,
        "settings": settings,
        "goal": GOAL,
        "ratios": {name: asdict(spread) for name, spread in ratios.items()},
        "gaps_ms": {side: {p: asdict(spread) for p, spread in of.items()} for side, of in gaps.items()},
        "gaps_in_each_window": {side: [len(w.gaps_s) for w in of] for side, of in windows.items()},
        "work": {side: [asdict(work) for work in of] for side, of in works.items()},
    }
    panels = [Panel("ms between two tokens", ["p50", "p99"], {s: [of["p50"], of["p99"]] for s, of in gaps.items()})]
    title = f"{settings['streams']} streams, adapters: {settings['adapters']}\n{one_line(machine)}"
    for path in write_result(out, "merge_serving", result, panels, title):
        sys.stdout.write(f"wrote {path}\n")
    lines = [title, "", f"{'':<52}{'median (min..max)':>24}   goal"]
    lines += [f"{name:<52}{f'{r:.2f}':>24}{f'   {GOAL}' if 'p99' in name else ''}" for name, r in ratios.items()]
    lines += ["", f"{'window':<12}{'p50 ms':>24}{'p99 ms':>24}{'longest ms':>24}{'merges, % of a core':>24}"]
    for side, of in gaps.items():
        spreads = "".join(f"{f'{of[p]:.1f}':>24}" for p in ("p50", "p99", "p100"))
        shares = f"{Spread.of([100 * work.core_share for work in works[side]]):.1f}" if side in works else "-"
        lines.append(f"{side:<12}{spreads}{shares:>24}")
    lines += ["", "how far merges came in each window:"]
    lines += [f"  {side:<12}{work}" for side, of in works.items() for work in of]
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
