"""`make bench-loading`: do running requests notice that large adapters are loaded, and how long does a load take?

Streams decode on the demo base with small adapters. In windows that take turns, nothing else happens, or adapters of
about 100 MB come in without pause: from disk over host memory to the device, each a version that was never seen, and
are unloaded again. Compared is the time between two tokens of a request, from the engine's events. Then, with no
request running, each part of a load is timed beside the plain work that it contains. Files come from the page cache.

Prints ratios first and writes JSON and a plot.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapter_files import LargeAdapter, write_large_adapters
from adapter_loads import ContinuousLoads, LoadTimes, time_loads
from bar_panels import Panel, write_result
from local_server import local_server, quiet_process
from lorikeet.server.app import App
from lorikeet.server.base.demo import prepare_demo_base
from lorikeet.server.config import ServerConfig
from lorikeet.server.resolve import resolve_compute
from machine import one_line
from measurement import Spread, ratio
from options import base_of, parse_or_quick, parser_of
from token_gaps import Window, pooled_ratio, watch_streams
from workload import Workload, in_turn, write_random_adapters

SEED = 7
SMALL_ADAPTERS, SMALL_RANK = 4, 8
# All small ones together must be smaller than half a large one: see time_loads.
LEAST_RANK = 16
# The server keeps copies of the files; of so many large ones, then the oldest go.
STORED_LARGE = 8
QUICK = {"streams": 2, "prompt": 8, "seconds": 1.0, "rounds": 1, "loads": 1, "adapter_mb": 10.0}
PARTS = {
    "bare_read": "read and hash, nothing else",
    "load": "disk -> ready (new, files kept)",
    "read_again": "disk -> host (evicted before)",
    "plain_copy": "host -> device, plain copy",
    "activate": "host -> device, prefetch",
}
RATIOS = {
    "host -> device / plain copy": ("activate", "plain_copy"),
    "disk -> ready / read and hash": ("load", "bare_read"),
    "disk -> host again / read and hash": ("read_again", "bare_read"),
}
GAP_RATIOS = {f"p{p} between tokens, loading / quiet": p for p in (99, 50)}
POOLED = "p99 of all rounds together"  # of the gaps, loading / quiet
GOALS = {"p99 between tokens, loading / quiet": 1.1, POOLED: 1.1, "host -> device / plain copy": 1.3}


def main() -> int:
    """Run it.

    Returns:
        The exit status.
    """
    options = parse()
    machine = quiet_process(options.threads, "gaps will be longer than they are")
    base = options.model or prepare_demo_base(ServerConfig().cache_dir)
    compute = resolve_compute(ServerConfig(device=options.device))
    with tempfile.TemporaryDirectory() as scratch:
        adapters = Path(scratch) / "adapters"
        large = write_large_adapters(base, adapters, count=2, megabytes=options.adapter_mb, seed=SEED + 1)
        if large[0].rank < LEAST_RANK:
            sys.exit(f"--adapter-mb: {options.adapter_mb:g} MB are rank {large[0].rank} here; at least {LEAST_RANK}.")
        small_rank = min(SMALL_RANK, large[0].rank // LEAST_RANK)
        small = write_random_adapters(base, adapters, count=SMALL_ADAPTERS, rank=small_rank, seed=SEED)
        packed = large[0].num_elements * compute.dtype.itemsize
        small_share = SMALL_ADAPTERS * small_rank / large[0].rank
        # Room for one large adapter and not for two, beside the small ones.
        budget = round((1.5 + small_share) * packed)
        server_settings: dict[str, Any] = {
            "device": options.device,
            "threads": options.threads,
            "adapter_device_bytes": budget,
            "adapter_host_bytes": budget,
            "adapter_store_bytes": round((STORED_LARGE + small_share) * large[0].file_bytes),
        }
        with local_server(options.model, adapters, Path(scratch) / "state", **server_settings) as server:
            for name in small:
                server.manager.load(name)
            windows = watch_windows(server, small, large[0], options)
            times = time_loads(server, large, options.loads)
    what = (
        f"{options.streams} streams, {SMALL_ADAPTERS} adapters of rank {small_rank}; incoming adapters of "
        f"{large[0].file_bytes / 1e6:.1f} MB (rank {large[0].rank}, {packed / 1e6:.1f} MB on the device)"
    )
    settings = {
        "command": "make bench-loading",
        "base": base_of(options),
        "adapters": what,
        "streams": options.streams,
        "prompt_tokens": options.prompt,
        "window_s": options.seconds,
        "rounds": options.rounds,
        "file_bytes": large[0].file_bytes,
        "packed_bytes": packed,
        "compute_dtype": str(compute.dtype).removeprefix("torch."),
    }
    report(options.out, machine, settings, windows, times)
    return 0


def parse() -> argparse.Namespace:
    """The command line; the defaults are what the numbers in docs/performance.md were made with."""
    parser = parser_of(__doc__, "threads", "device", "model", "out", "quick")
    add = parser.add_argument
    add("--streams", type=int, default=8, help="requests that decode at the same time [8]")
    add("--prompt", type=int, default=32, help="tokens in each prompt [32]")
    add("--adapter-mb", type=float, default=100.0, help="size of an incoming adapter's file, 10^6 bytes [100]")
    add("--seconds", type=float, default=30.0, help="length of a window [30]")
    add("--rounds", type=int, default=5, help="pairs of a quiet window and one with loads [5]")
    add("--loads", type=int, default=5, help="loads of either large adapter that are timed without streams [5]")
    return parse_or_quick(parser, QUICK)


def watch_windows(
    server: App, small: list[str], large: LargeAdapter, options: argparse.Namespace
) -> list[tuple[Window, Window, float]]:
    """For each round: the quiet window, the one with loads, and how many loads fell into it."""
    vocab_size = server.base.model.config.vocab_size
    adapter_ids = in_turn(small, options.streams)

    def prompts(number: int) -> list[list[int]]:
        return Workload(options.streams, options.prompt, 0).prompts(vocab_size, seed=1000 * SEED + number)

    watch_streams(server, prompts(-1), adapter_ids, min(2.0, options.seconds))
    rounds: list[tuple[Window, Window, float]] = []
    for number in range(options.rounds):
        found: dict[bool, Window] = {}
        loads = 0.0
        # What the machine does meanwhile meets both: either comes first every other time.
        for is_loading in (False, True) if number % 2 == 0 else (True, False):
            turn = prompts(2 * number + is_loading)
            if is_loading:
                found[True], loads = watch_with_loads(server, turn, adapter_ids, large, options.seconds)
            else:
                found[False] = watch_streams(server, turn, adapter_ids, options.seconds)
        rounds.append((found[False], found[True], loads))
        quiet, loading = found[False].percentile_ms(99), found[True].percentile_ms(99)
        sys.stderr.write(
            f"  round {number + 1}/{options.rounds}: p99 between tokens {quiet:7.1f} ms quiet, {loading:7.1f} ms with "
            f"{loads:.1f} loads\n"
        )
    return rounds


def watch_with_loads(
    server: App, prompts: list[list[int]], adapter_ids: list[str], large: LargeAdapter, seconds: float
) -> tuple[Window, float]:
    """A window during which loads go on, and how many of them fell into it."""
    loads = ContinuousLoads(server, large)
    begin = 0.0

    def start() -> None:
        nonlocal begin
        begin = time.perf_counter()
        loads.start()

    window = watch_streams(server, prompts, adapter_ids, seconds, meanwhile=start)
    loads.stop()
    return window, loads.loads_during(begin, begin + window.seconds)


def report(
    out: Path,
    machine: dict[str, Any],
    settings: dict[str, Any],
    rounds: list[tuple[Window, Window, float]],
    times: LoadTimes,
) -> None:
    """Print the tables, write JSON and plot."""
    sides = {"quiet": [quiet for quiet, _, _ in rounds], "loading": [loading for _, loading, _ in rounds]}
    loads = Spread.of([number for _, _, number in rounds])
    rate = Spread.of([number * settings["file_bytes"] / 1e6 / window.seconds for _, window, number in rounds])
    gaps = {
        side: {f"p{p}": Spread.of([w.percentile_ms(p) for w in windows]) for p in (50, 99, 100)}
        for side, windows in sides.items()
    }
    seconds = asdict(times)
    spreads = {part: Spread.of([1000 * s for s in seconds[part]]) for part in PARTS}
    ratios = {
        title: ratio(*([w.percentile_ms(p) for w in sides[side]] for side in ("loading", "quiet")))
        for title, p in GAP_RATIOS.items()
    } | {title: ratio(seconds[one], seconds[other]) for title, (one, other) in RATIOS.items()}
    ratios[POOLED] = pooled_ratio(sides["loading"], sides["quiet"], 99)

    result = {
        "machine": machine,
        "settings": settings,
        "goals": GOALS,
        "ratios": {title: asdict(spread) for title, spread in ratios.items()},
        "gaps_ms": {side: {p: asdict(spread) for p, spread in of.items()} for side, of in gaps.items()},
        "gaps_in_each_window": {side: [len(w.gaps_s) for w in windows] for side, windows in sides.items()},
        "loads_in_a_window": asdict(loads),
        "loaded_mb_per_s": asdict(rate),
        "load_ms": {part: [round(1000 * s, 3) for s in seconds[part]] for part in PARTS},
    }
    panels = [
        Panel("ms between two tokens", ["p50", "p99"], {s: [of["p50"], of["p99"]] for s, of in gaps.items()}),
        Panel(
            "ms",
            ["read", "load", "again", "copy", "activate"],
            {"no streams": [spreads[part] for part in PARTS]},
        ),
    ]
    title = f"{settings['adapters']}\n{one_line(machine)}"
    for path in write_result(out, "adapter_loading", result, panels, title):
        sys.stdout.write(f"wrote {path}\n")

    lines = [title, "", f"{'':<36}{'median (min..max)':>24}   goal"]
    lines += [f"{title:<36}{f'{r:.2f}':>24}   {GOALS.get(title, '')}".rstrip() for title, r in ratios.items()]
    lines += ["", f"{'window':<9}{'p50 ms':>24}{'p99 ms':>24}{'longest ms':>24}{'tokens/s':>24}"]
    lines += [
        f"{side:<9}"
        + "".join(f"{f'{of[p]:.1f}':>24}" for p in ("p50", "p99", "p100"))
        + f"{Spread.of([w.tokens_per_s for w in sides[side]]):.1f}".rjust(24)
        for side, of in gaps.items()
    ]
    lines += [f"loads in a window: {loads:.1f}, {rate:.1f} MB/s", "", f"{'without streams':<34}{'ms':>24}"]
    lines += [f"{PARTS[part]:<34}{f'{spread:.1f}':>24}" for part, spread in spreads.items()]
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
