"""`make bench-serving`: S-LoRA's trace over gRPC, with 1 to 2,000 adapters: what users of a server see.

For each number of adapters a real `lorikeet serve` runs, started as a user would, that many adapters in its folder and
memory for --resident of them. A client process sends each request when the trace says, whatever has been answered by
then (open loop), so a server that falls behind cannot slow its load down. All numbers of adapters get the same arrivals
and lengths in turns; only the adapters differ (synthetic_trace.py). How fast requests come is a share (--load) of what
the machine can do, which a closed loop measures first, so that the result does not depend on the machine.

Times are the client's, from the arrival that the trace has. The server's metrics are read before and after each run:
calls by status and tokens must be the same, or the benchmark fails; its mean times are shown beside the client's.

Prints ratios first and writes JSON and a plot. The defaults take about 8 minutes on 2 cores and 2 GB of temporary disk.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from adapter_files import elements_per_rank, write_numbered_adapters
from bar_panels import Panel, write_result
from lorikeet.adapters.arena import aligned
from lorikeet.server.base.demo import prepare_demo_base
from lorikeet.server.config import ServerConfig
from lorikeet.server.resolve import resolve_compute
from machine import describe_machine, one_line, warn_if_busy
from measurement import Spread, ratio
from options import base_of, parse_or_quick, parser_of
from server_process import Server, running_server
from serving_client import Seen
from serving_run import ServingRun, Slo, evaluate
from synthetic_trace import SLORA_SEED, TraceShape, synthetic_trace
from tqdm import tqdm
from transformers import AutoConfig

HERE = Path(__file__).resolve().parent
SEED = 7
SETTLE_S = 0.3
TARGETS = ("q_proj", "v_proj")
RANKS = (8, 16)
QUICK = {
    "adapters": [1, 6],
    "resident": 4,
    "seconds": 1.0,
    "calibrate": 1.0,
    "prompt": [4, 8],
    "tokens": [2, 6],
    "running": 4,
    "rounds": 1,
    "least": 8,
}
Series = dict[int, list[ServingRun]]
# Title, value of a run, format; the first ones are compared with the fewest adapters.
COMPARED = 6
ROWS: tuple[tuple[str, Callable[[ServingRun], float], str], ...] = (
    ("output tokens/s", lambda r: r.tokens_per_s, ".1f"),
    ("requests/s", lambda r: r.requests_per_s, ".2f"),
    ("good requests/s", lambda r: r.good_per_s, ".2f"),
    ("time to first token, p50, s", lambda r: r.ttft(50), ".3f"),
    ("time to first token, p99, s", lambda r: r.ttft(99), ".3f"),
    ("between messages of tokens, p50, s", lambda r: r.itl(50), ".3f"),
    ("between messages of tokens, p99, s", lambda r: r.itl(99), ".3f"),
    ("time to first token, p90, s", lambda r: r.ttft(90), ".3f"),
    ("between tokens, mean, s", lambda r: r.mean_itl_s, ".3f"),
    ("good requests, %", lambda r: 100 * r.good_share, ".1f"),
    ("requests sent", lambda r: r.sent, ".0f"),
    ("errors", lambda r: r.sent - r.requests, ".0f"),
    ("client late, p99, ms", lambda r: 1e3 * float(np.percentile(r.late_s, 99)), ".1f"),
    ("tokens in a message", lambda r: r.tokens_per_message, ".2f"),
    ("distinct adapters used", lambda r: r.distinct_adapters, ".0f"),
    ("adapters read from disk", lambda r: r.loads, ".0f"),
    ("requests without a read, %", lambda r: 100 * max(0.0, 1 - r.loads / r.sent), ".0f"),
    ("evictions from the device", lambda r: r.evictions_device, ".0f"),
    ("requests in a step, mean", lambda r: r.server["mean_step_requests"], ".1f"),
    ("adapters in a step, mean", lambda r: r.server["mean_step_adapters"], ".1f"),
    ("server: time to first token, mean, s", lambda r: r.server["mean_ttft_s"], ".3f"),
    ("client: time to first token, mean, s", lambda r: float(np.mean(r.ttft_s or [0.0])), ".3f"),
    ("server: between tokens, mean, s", lambda r: r.server["mean_itl_s"], ".3f"),
)


class Client:
    """A client process that plays traces."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "serving_client.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def play(
        self, server: Server, requests: Sequence[dict[str, Any]], in_flight: int | None, deadline_s: float
    ) -> list[Seen]:
        """Play a trace to its end; see serving_client.py."""
        job = {"address": server.address, "in_flight": in_flight, "deadline_s": deadline_s, "requests": requests}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client ended with status {self._process.wait()}")
        return [Seen(**seen) for seen in json.loads(line)]

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def main() -> int:
    """Run it.

    Returns:
        The exit status.
    """
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    machine = describe_machine()
    warn_if_busy(machine, "the numbers will be worse")
    base = options.model or prepare_demo_base(ServerConfig().cache_dir)
    vocab_size = int(AutoConfig.from_pretrained(base).vocab_size)
    numbers = sorted(set(options.adapters))
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        ids = write_numbered_adapters(base, folder / "all", count=numbers[-1], ranks=RANKS, targets=TARGETS, seed=SEED)
        servers: dict[int, Server] = {}
        for number in numbers:
            adapters = linked(folder / "all", ids[:number], folder / f"adapters-{number}")
            arguments = server_arguments(options, base, adapters)
            servers[number] = stack.enter_context(running_server(arguments, folder / f"log-{number}"))
            sys.stderr.write(f"  {number} adapters: ready after {servers[number].start_s:.1f} s\n")
        client = Client()
        stack.callback(client.close)

        def play(number: int, shape: TraceShape, seed: int, in_flight: int | None) -> ServingRun:
            requests = trace_requests(number, shape, seed, ids, vocab_size)
            before = servers[number].scrape()
            seen = client.play(servers[number], requests, in_flight, options.deadline)
            # A call that its deadline ended may have to be counted yet.
            time.sleep(SETTLE_S)
            return evaluate(seen, requests, servers[number].scrape() - before, options.slo)

        shape = TraceShape(
            options.running, options.alpha, 1.0, options.cv, tuple(options.prompt), tuple(options.tokens)
        )
        capacity = calibrate(lambda s, seed: play(numbers[0], s, seed, options.running), shape, options)
        shape = replace(shape, rate=options.load * capacity)
        shape = replace(shape, num_requests=max(options.least, round(shape.rate * options.seconds)))
        sys.stderr.write(f"  capacity {capacity:.2f} requests/s; the trace has {shape.rate:.2f}\n")
        series = play_in_turns(
            numbers, options.rounds, lambda number, turn: play(number, shape, SLORA_SEED + turn, None)
        )
    report(options, machine, series, capacity, shape)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "threads", "device", "model", "out", "quick")
    add = parser.add_argument
    add("--adapters", type=int, nargs="+", default=[1, 8, 50, 200, 2000], help="numbers of them [1 8 50 200 2000]")
    add("--resident", type=int, default=50, help="adapters that memory is given for, host and device each [50]")
    add("--load", type=float, default=0.7, help="arrivals as a share of the measured capacity [0.7]")
    add("--seconds", type=float, default=25.0, help="of a trace [25]")
    add("--least", type=int, default=16, help="requests of a trace at least [16]")
    add("--calibrate", type=float, default=15.0, help="seconds of the closed loop that measures the capacity [15]")
    add("--alpha", type=float, default=0.8, help="of the power distribution; 1: uniform, smaller: more skewed [0.8]")
    add("--cv", type=float, default=1.0, help="coefficient of variation of the intervals [1]")
    add("--prompt", type=int, nargs=2, default=[8, 64], help="prompt tokens, from [low, high) [8 64]")
    add("--tokens", type=int, nargs=2, default=[8, 64], help="output tokens, from [low, high) [8 64]")
    add("--running", type=int, default=32, help="requests in a step at most [32]")
    add("--slo-ttft", type=float, default=6.0, help="seconds to the first token of a good request [6]")
    add("--slo-itl", type=float, default=0.5, help="mean seconds between the tokens of a good request [0.5]")
    add("--deadline", type=float, default=120.0, help="seconds that a call may take [120]")
    add("--rounds", type=int, default=2, help="times that every number of adapters runs [2]")
    add("--kv-cache-bytes", default="256MiB", help="of each server [256MiB]")
    options = parse_or_quick(parser, QUICK)
    options.slo = Slo(options.slo_ttft, options.slo_itl)
    return options


def linked(files: Path, ids: Sequence[str], folder: Path) -> Path:
    """A folder of these adapters, whose files take no space of their own."""
    for name in ids:
        (folder / name).mkdir(parents=True)
        for file in (files / name).iterdir():
            os.link(file, folder / name / file.name)
    return folder


def server_arguments(options: argparse.Namespace, base: Path, adapters: Path) -> list[str]:
    """Flags of `lorikeet serve`."""
    per_rank = elements_per_rank(base, TARGETS)
    item_bytes = resolve_compute(ServerConfig(device=options.device)).dtype.itemsize
    budget = sum(item_bytes * aligned(per_rank * RANKS[i % len(RANKS)]) for i in range(options.resident))
    settings = {
        "model": options.model or "demo",
        "adapters": adapters,
        "adapter-device-bytes": budget,
        "adapter-host-bytes": budget,
        # They are read again from their folders.
        "adapter-store-bytes": 0,
        "max-running": options.running,
        "kv-cache-bytes": options.kv_cache_bytes,
        "device": options.device,
        "threads": options.threads,
    }
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def trace_requests(
    number: int, shape: TraceShape, seed: int, ids: Sequence[str], vocab_size: int
) -> list[dict[str, Any]]:
    """A trace with prompts, which differ from seed to seed or the prefix cache would help."""
    draw = np.random.RandomState(seed)
    return [
        {
            "arrival_s": request.arrival_s,
            "adapter_id": ids[request.adapter],
            # The middle of the vocabulary: special tokens lie at one of its ends.
            "prompt": draw.randint(vocab_size // 4, vocab_size // 2, request.prompt_tokens).tolist(),
            "tokens": request.output_tokens,
        }
        for request in synthetic_trace(number, shape, seed)
    ]


def calibrate(play: Callable[[TraceShape, int], ServingRun], shape: TraceShape, options: argparse.Namespace) -> float:
    """Requests a second of a closed loop with as many in flight as may run.

    As many requests as run at a time are played first, which warms up and says how many --calibrate seconds are.
    """
    first = play(shape, 1000)
    number = max(len(first.ttft_s), round(first.requests_per_s * options.calibrate))
    return play(replace(shape, num_requests=number), 1001).requests_per_s


def play_in_turns(numbers: Sequence[int], rounds: int, play: Callable[[int, int], ServingRun]) -> Series:
    """Every number of adapters `rounds` times; the order rotates from round to round."""
    series: Series = {number: [] for number in numbers}
    with tqdm(total=rounds * len(numbers), unit="run") as bar:
        for turn in range(rounds):
            for number in _rotated(numbers, turn):
                series[number].append(play(number, turn))
                bar.update()
    return series


def _rotated(numbers: Sequence[int], turn: int) -> Iterator[int]:
    first = turn % len(numbers)
    yield from numbers[first:]
    yield from numbers[:first]


def report(
    options: argparse.Namespace, machine: dict[str, Any], series: Series, capacity: float, shape: TraceShape
) -> None:
    """Print the table, write JSON and plot."""
    few, *_ = numbers = list(series)
    ratios = {
        f"{title}, relative": {n: _relative(series[n], series[few], value) for n in numbers}
        for title, value, _ in ROWS[:COMPARED]
    }
    rows = {title: {n: Spread.of([value(r) for r in series[n]]) for n in numbers} for title, value, _ in ROWS}
    formats = {title: form for title, _, form in ROWS}
    errors = {
        n: {code: sum(r.codes.get(code, 0) for r in runs) for r in runs for code in r.codes if code != "OK"}
        for n, runs in series.items()
    }
    what = (
        f"S-LoRA's trace: alpha {options.alpha:g}, cv {options.cv:g}, {shape.rate:.2f} requests/s ({options.load:g} of "
        f"the capacity {capacity:.2f}), {shape.num_requests} requests; prompts {options.prompt}, outputs "
        f"{options.tokens}; memory for {options.resident} adapters"
    )
    good = f"good: first token within {options.slo.ttft_s:g} s, mean between tokens at most {options.slo.itl_s:g} s"
    hidden = ("model", "out", "quick", "threads", "slo")
    result = {
        "machine": machine,
        "settings": {
            "command": "make bench-serving",
            "base": base_of(options),
            "capacity_requests_per_s": capacity,
            "rate_requests_per_s": shape.rate,
            "requests": shape.num_requests,
            **{name: value for name, value in vars(options).items() if name not in hidden},
        },
        "ratios": {title: {n: s and asdict(s) for n, s in of.items()} for title, of in ratios.items()},
        "rows": {title: {n: asdict(s) for n, s in of.items()} for title, of in rows.items()},
        "errors": errors,
        "rounds": {n: [_summary(run) for run in runs] for n, runs in series.items()},
    }
    groups = [str(n) for n in numbers]

    def panel(label: str, bars: dict[str, str], limit: float | None = None) -> Panel:
        return Panel(label, groups, {name: list(rows[title].values()) for name, title in bars.items()}, limit)

    panels = [
        panel("output tokens/s", {"": "output tokens/s"}),
        panel("seconds to the first token", {p: f"time to first token, {p}, s" for p in ("p50", "p90", "p99")}),
        panel("seconds between messages of tokens", {p: f"between messages of tokens, {p}, s" for p in ("p50", "p99")}),
    ]
    for path in write_result(options.out, "serving", result, panels, f"{what}\n{good}; {one_line(machine)}"):
        sys.stdout.write(f"wrote {path}\n")
    lines = [what, good, one_line(machine), ""]
    lines += [f"{'median (min..max) of the rounds':<46}" + "".join(f"{f'{n} adapters':>24}" for n in numbers)]
    for title, of in ratios.items():
        lines.append(f"{title:<46}" + "".join(f"{s:.2f}".rjust(24) if s else f"{'-':>24}" for s in of.values()))
    lines.append("")
    for title, of in rows.items():
        lines.append(f"{title:<46}" + "".join(f"{format(s, formats[title]):>24}" for s in of.values()))
    for n, codes in errors.items():
        for code, count in codes.items():
            lines.append(f"{n} adapters: {count} calls ended with {code}")
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


def _relative(
    runs: Sequence[ServingRun], few: Sequence[ServingRun], value: Callable[[ServingRun], float]
) -> Spread | None:
    """Round by round; None where there is nothing to compare with."""
    if not all(value(run) for run in few):
        return None
    return ratio([value(run) for run in runs], [value(run) for run in few])


def _summary(run: ServingRun) -> dict[str, Any]:
    """A run without its long lists."""
    short = {name: value for name, value in asdict(run).items() if not isinstance(value, list)}
    return short | {title: round(value(run), 4) for title, value, _ in ROWS}


if __name__ == "__main__":
    sys.exit(main())
