"""`make bench-trace`: S-LoRA's synthetic trace over 5 to 2,000 adapters on disk, with memory for 50 of them.

One server for each number of adapters, all in this process with the same budgets of host and device memory, take turns
with the same requests; only the adapters that these name differ (synthetic_trace.py). By default the servers are
saturated: a request is handed in as soon as fewer than --in-flight have not ended, which makes throughput comparable.
With --rate requests arrive when the trace says, and the time to the first token means something.

"Apart from load misses" has two meanings, and both are printed. The weaker one leaves out only the time in which no
request was running although some were in the engine: each of them waited for its adapter. The stronger one looks at
full steps only, those in which as many requests ran as may, each with the pause before it: whatever waited for an
adapter then kept nobody else from running.

Needs 3 GB of temporary disk ($TMPDIR chooses which). Prints ratios first and writes JSON and a plot.
"""

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from adapter_files import FILE_ITEM_BYTES, elements_per_rank, write_numbered_adapters
from bar_panels import Panel, write_result
from local_server import local_server
from lorikeet.adapters.arena import aligned
from lorikeet.server.app import App
from lorikeet.server.base.demo import prepare_demo_base
from lorikeet.server.config import ServerConfig
from lorikeet.server.logs import configure_logs
from lorikeet.server.resolve import resolve_compute
from machine import describe_machine, one_line, warn_if_busy
from measurement import Spread, ratio
from options import base_of, parse_or_quick, parser_of
from synthetic_trace import SLORA_SEED, TraceShape, synthetic_trace
from trace_replay import Replay, TraceReplayer

SEED = 7
# More of the linears would be more than 4 GB on disk for 2,000 adapters.
TARGETS = ("q_proj", "v_proj")
RANKS = (8, 16)
GOAL = 0.945
QUICK = {
    "adapters": [2, 12],
    "resident": 4,
    "requests": 12,
    "prompt": [4, 8],
    "tokens": [2, 6],
    "running": 4,
    "in_flight": 8,
    "rounds": 1,
}
RATIOS: dict[str, Callable[[Replay], float]] = {
    "output tokens/s, relative": lambda r: r.tokens_per_s,
    "without time when all waited for adapters": lambda r: r.tokens_per_running_s,
    "full steps only": lambda r: r.tokens_per_full_s,
}
Series = dict[int, list[Replay]]
# Title, value of a run, format.
ROWS: tuple[tuple[str, Callable[[Replay], float], str], ...] = (
    ("requests/s", lambda r: r.requests_per_s, ".2f"),
    ("output tokens/s", lambda r: r.tokens_per_s, ".1f"),
    ("everything waited for adapters, %", lambda r: 100 * r.stalled_s / r.wall_s, ".1f"),
    ("time to first token, p50, s", lambda r: r.ttft_percentile_s(50), ".2f"),
    ("time to first token, p99, s", lambda r: r.ttft_percentile_s(99), ".2f"),
    ("arrived with adapter on device, %", lambda r: 100 * r.found["device"] / r.num_requests, ".0f"),
    ("arrived with adapter in host memory, %", lambda r: 100 * r.found["host"] / r.num_requests, ".0f"),
    ("arrived with adapter on disk only, %", lambda r: 100 * r.found["disk"] / r.num_requests, ".0f"),
    ("adapters read from disk", lambda r: len(r.reads_s), ".0f"),
    ("seconds of a read, median", lambda r: statistics.median(r.reads_s) if r.reads_s else 0.0, ".3f"),
    ("evictions from the device", lambda r: r.evictions["device"], ".0f"),
    ("evictions from host memory", lambda r: r.evictions["host"], ".0f"),
    ("requests in a step, mean", lambda r: r.step_requests, ".1f"),
    ("adapters in a step, mean", lambda r: r.step_adapters, ".1f"),
    ("full steps, %", lambda r: 100 * r.full_steps / r.num_steps, ".0f"),
    ("output tokens/s of full steps", lambda r: r.tokens_per_full_s, ".1f"),
)


def main() -> int:
    """Run it.

    Returns:
        The exit status.
    """
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    # Each adapter whose files are not kept would be a warning; here none are.
    configure_logs("error", "console")
    torch.set_num_threads(options.threads)
    machine = describe_machine()
    warn_if_busy(machine, "the numbers will be worse than it is")
    base = options.model or prepare_demo_base(ServerConfig().cache_dir)
    per_rank = elements_per_rank(base, TARGETS)
    numbers = sorted(set(options.adapters))
    disk_bytes = numbers[-1] * per_rank * FILE_ITEM_BYTES * sum(RANKS) // len(RANKS)
    if shutil.disk_usage(tempfile.gettempdir()).free < 1.2 * disk_bytes:
        sys.exit(f"{disk_bytes / 1e9:.1f} GB of temporary disk are needed; $TMPDIR chooses which.")
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as servers:
        adapters = Path(scratch) / "adapters"
        ids = write_numbered_adapters(base, adapters, count=numbers[-1], ranks=RANKS, targets=TARGETS, seed=SEED)
        disk_bytes = sum(path.stat().st_size for path in adapters.glob("*/*"))
        sys.stderr.write(f"  {len(ids)} adapters, {disk_bytes / 1e9:.2f} GB\n")
        budget = budget_bytes(options, per_rank)
        replayers: dict[int, TraceReplayer] = {}
        for number in numbers:
            server = servers.enter_context(start(adapters, Path(scratch) / f"state-{number}", budget, options))
            load_all(server, adapters, ids[:number])
            sys.stderr.write(f"  {number} adapters are known to their server\n")
            replayers[number] = TraceReplayer(server, ids, options.running)
        series = play_in_turns(replayers, options)
    report(options, machine, series, disk_bytes, budget)
    return 0


def parse() -> argparse.Namespace:
    """The command line; the defaults are what the numbers in docs/performance.md were made with."""
    parser = parser_of(__doc__, "threads", "device", "model", "out", "quick")
    add = parser.add_argument
    add("--adapters", type=int, nargs="+", default=[5, 50, 200, 2000], help="numbers of adapters [5 50 200 2000]")
    add("--resident", type=int, default=50, help="adapters that memory is given for, host and device each [50]")
    add("--requests", type=int, default=128, help="in each run [128]")
    add("--alpha", type=float, default=0.8, help="of the power distribution; 1: uniform, smaller: more skewed [0.8]")
    add("--rate", type=float, help="requests a second; without it the servers are saturated")
    add("--cv", type=float, default=1.0, help="coefficient of variation of the intervals, with --rate [1]")
    add("--prompt", type=int, nargs=2, default=[8, 64], help="prompt tokens, from [low, high) [8 64]")
    add("--tokens", type=int, nargs=2, default=[8, 64], help="output tokens, from [low, high) [8 64]")
    add("--running", type=int, default=32, help="requests in a step at most [32]")
    add("--in-flight", type=int, default=64, help="requests in the engine while it is saturated [64]")
    add("--slo", type=float, default=6.0, help="seconds to the first token, with --rate [6]")
    add("--rounds", type=int, default=3, help="times that every number of adapters runs [3]")
    add("--kv-cache-bytes", default="512MiB", help="of each server [512MiB]")
    return parse_or_quick(parser, QUICK)


def budget_bytes(options: argparse.Namespace, per_rank: int) -> int:
    """What --resident adapters of ranks that take turns need, on the device or in host memory."""
    item_bytes = resolve_compute(ServerConfig(device=options.device)).dtype.itemsize
    return sum(item_bytes * aligned(per_rank * RANKS[i % len(RANKS)]) for i in range(options.resident))


def start(
    adapters: Path, state_dir: Path, budget: int, options: argparse.Namespace
) -> contextlib.AbstractContextManager[App]:
    """A server with that much memory for adapters in either tier."""
    return local_server(
        options.model,
        adapters,
        state_dir,
        device=options.device,
        threads=options.threads,
        kv_cache_bytes=options.kv_cache_bytes,
        adapter_device_bytes=budget,
        adapter_host_bytes=budget,
        # They are read again from their folders.
        adapter_store_bytes=0,
        max_running=options.running,
        max_waiting=max(1, options.requests),
    )


def load_all(server: App, folder: Path, ids: Sequence[str]) -> None:
    """Make adapters known to a server as its folder watcher would."""
    root = folder.resolve()
    for future in [server.manager.load_folder(name, root / name) for name in ids]:
        future.result()


def play_in_turns(replayers: dict[int, TraceReplayer], options: argparse.Namespace) -> Series:
    """Every server `rounds` times, and once before to warm up; the order rotates from round to round."""
    numbers = list(replayers)
    shape = TraceShape(
        options.requests, options.alpha, options.rate or 1.0, options.cv, tuple(options.prompt), tuple(options.tokens)
    )
    in_flight = options.in_flight if options.rate is None else None
    series: Series = {number: [] for number in numbers}
    for turn in range(-1, options.rounds):
        rotated = turn % len(numbers)
        for number in (*numbers[rotated:], *numbers[:rotated]):
            trace = synthetic_trace(number, shape, SLORA_SEED + turn + 1)
            run = replayers[number].play(trace, seed=1000 * SEED + turn, in_flight=in_flight)
            if turn < 0:
                continue
            series[number].append(run)
            sys.stderr.write(
                f"  round {turn + 1}/{options.rounds}: {number:>5} adapters {run.tokens_per_s:8.1f} tokens/s, "
                f"{len(run.reads_s)} read from disk\n"
            )
    return series


def report(options: argparse.Namespace, machine: dict[str, Any], series: Series, disk_bytes: int, budget: int) -> None:
    """Print the table, write JSON and plot."""
    few, *_ = numbers = list(series)
    ratios = {title: {n: relative(series[n], series[few], value) for n in numbers} for title, value in RATIOS.items()}
    rows = {title: {n: Spread.of([value(r) for r in series[n]]) for n in numbers} for title, value, _ in ROWS}
    formats = {title: form for title, _, form in ROWS}
    if options.rate is not None:
        title = f"first token within {options.slo:g} s, %"
        formats[title] = ".0f"
        rows[title] = {n: Spread.of([100 * _share_within(r.ttft_s, options.slo) for r in series[n]]) for n in numbers}

    load = (
        f"{options.rate:g} requests/s, cv {options.cv:g}"
        if options.rate
        else f"saturated, {options.in_flight} in flight"
    )
    what = (
        f"{options.requests} requests, alpha {options.alpha:g}, {load}; prompts {options.prompt}, outputs "
        f"{options.tokens}; ranks {' and '.join(map(str, RANKS))} on {' and '.join(TARGETS)}; memory for "
        f"{options.resident} adapters ({budget / 1e6:.0f} MB) in either tier"
    )
    settings = {
        "command": "make bench-trace",
        "base": base_of(options),
        "adapter_bytes_on_disk": disk_bytes,
        "budget_bytes": budget,
        **{name: value for name, value in vars(options).items() if name not in ("model", "out", "quick", "threads")},
    }
    result = {
        "machine": machine,
        "settings": settings,
        "goal_apart_from_load_misses": GOAL,
        "ratios": {title: {n: s and asdict(s) for n, s in of.items()} for title, of in ratios.items()},
        "rows": {title: {n: asdict(s) for n, s in of.items()} for title, of in rows.items()},
        "rounds": {n: [_summary(run) for run in runs] for n, runs in series.items()},
    }
    groups = [str(n) for n in numbers]
    panels = [
        Panel(
            f"output tokens/s, relative to {few} adapters",
            groups,
            {title: [s or Spread(0.0, 0.0, 0.0) for s in of.values()] for title, of in ratios.items()},
            GOAL,
        ),
        Panel(
            "seconds to the first token",
            groups,
            {p: list(rows[f"time to first token, {p}, s"].values()) for p in ("p50", "p99")},
        ),
    ]
    for path in write_result(options.out, "adapter_trace", result, panels, f"{what}\n{one_line(machine)}"):
        sys.stdout.write(f"wrote {path}\n")

    lines = [what, f"{disk_bytes / 1e9:.2f} GB of adapters on disk; {one_line(machine)}", ""]
    lines += [f"{'median (min..max) of the rounds':<46}" + "".join(f"{f'{n} adapters':>22}" for n in numbers)]
    for title, of in ratios.items():
        lines.append(f"{title:<46}" + "".join(f"{s:.3f}".rjust(22) if s else f"{'-':>22}" for s in of.values()))
    lines += [f"(goal apart from load misses: {GOAL} or more; --help says what the last two leave out)", ""]
    for title, of in rows.items():
        lines.append(f"{title:<46}" + "".join(f"{format(s, formats[title]):>22}" for s in of.values()))
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


def relative(runs: Sequence[Replay], few: Sequence[Replay], value: Callable[[Replay], float]) -> Spread | None:
    """Round by round; None where a round has nothing to compare (no full step)."""
    if not all(value(run) for run in (*runs, *few)):
        return None
    return ratio([value(run) for run in runs], [value(run) for run in few])


def _share_within(ttft_s: Sequence[float], limit_s: float) -> float:
    return sum(s <= limit_s for s in ttft_s) / len(ttft_s)


def _summary(run: Replay) -> dict[str, Any]:
    """A run without its long lists."""
    values = asdict(run)
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in values.items()
        if not isinstance(value, list)
    } | {title: round(value(run), 4) for title, value, _ in ROWS}


if __name__ == "__main__":
    sys.exit(main())
