"""`make bench-front`: what stands before the engine (gRPC, interceptor, service, tokenizing), and where it limits.

A server process has the real front and a double of the engine (front_server.py), which gives every stream a token at a
fixed pace; clients are processes of their own (front_clients.py). At each number of concurrent streams two things run:
long answers, for what a token costs and how long it takes from the step thread to the client, and answers of one token,
call after call, for what a request costs. Costs are processor time of the server, by thread: the event loop's, and the
front's, which is all but the step thread's. On a machine that clients share with the server they mean more than times.

`--compare DIR` measures another checkout's server beside this one, in turns.

Prints ratios first and writes JSON and a plot.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bar_panels import Panel, write_result
from lorikeet.server.base.demo import prepare_demo_base
from lorikeet.server.config import ServerConfig
from machine import describe_machine, one_line, warn_if_busy
from measurement import Spread, ratio
from options import parse_or_quick, parser_of
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
THIS, OTHER = "this", "compared with"
QUICK = {"streams": [4], "tokens": 3, "repeats": 2, "rounds": 1, "clients": 1, "interval_ms": 10.0}


@dataclass(frozen=True, slots=True)
class Front:
    """One run at one number of streams.

    Attributes:
        tokens_per_s, messages_per_s, tokens_per_message: delivered, of long answers.
        requests_per_s: answers of one token, started and ended.
        loop_share: processor time of the event loop's thread over wall time, of long answers.
        short_loop_share: the same of answers of one token.
        delay_p50_ms, delay_p99_ms: from a token's emission on the step thread to its arrival at the client.
        front_us_per_token, loop_us_per_token: processor time of a further token.
        front_us_per_request, loop_us_per_request: of a request with one token.
        resident_mb: of the server, at the end.
    """

    tokens_per_s: float
    messages_per_s: float
    tokens_per_message: float
    requests_per_s: float
    loop_share: float
    short_loop_share: float
    delay_p50_ms: float
    delay_p99_ms: float
    front_us_per_token: float
    loop_us_per_token: float
    front_us_per_request: float
    loop_us_per_request: float
    resident_mb: float


Series = dict[str, dict[int, list[Front]]]
# Title, value, format.
ROWS: tuple[tuple[str, Callable[[Front], float], str], ...] = (
    ("tokens/s delivered", lambda f: f.tokens_per_s, ".0f"),
    ("messages/s", lambda f: f.messages_per_s, ".0f"),
    ("tokens in a message", lambda f: f.tokens_per_message, ".2f"),
    ("event loop, % of a core", lambda f: 100 * f.loop_share, ".1f"),
    ("emitted -> received, p50, ms", lambda f: f.delay_p50_ms, ".1f"),
    ("emitted -> received, p99, ms", lambda f: f.delay_p99_ms, ".1f"),
    ("CPU us/token, front", lambda f: f.front_us_per_token, ".1f"),
    ("CPU us/token, event loop", lambda f: f.loop_us_per_token, ".1f"),
    ("one-token requests/s", lambda f: f.requests_per_s, ".0f"),
    ("meanwhile event loop, % of a core", lambda f: 100 * f.short_loop_share, ".1f"),
    ("CPU us/request, front", lambda f: f.front_us_per_request, ".0f"),
    ("CPU us/request, event loop", lambda f: f.loop_us_per_request, ".0f"),
    ("resident MB", lambda f: f.resident_mb, ".0f"),
)


class _Process:
    """A Python process that takes lines and answers with JSON lines."""

    def __init__(self, script: str, *arguments: str, code: Path | None = None) -> None:
        environment = dict(os.environ)
        if code is not None:
            environment["PYTHONPATH"] = str(code)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, line: str) -> dict[str, Any]:
        self.tell(line)
        return self.hear()

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


@dataclass(frozen=True, slots=True)
class _Burst:
    """What clients and server saw of one job: processor seconds of the server, counts, seconds, delays in seconds."""

    seconds: float
    wall: float
    loop: float
    front: float
    tokens: int
    messages: int
    requests: int
    delays: "np.ndarray[Any, np.dtype[np.float64]]"
    resident_bytes: int


class FrontServer:
    """A server process.

    Args:
        model: directory of a tokenizer.
        interval_s: from step to step.
        code: a folder with the package `lorikeet` to run; None: this one.
    """

    def __init__(self, model: Path, interval_s: float, code: Path | None) -> None:
        self._process = _Process("front_server.py", "--model", str(model), "--interval", str(interval_s), code=code)
        self._address = f"127.0.0.1:{self._process.hear()['port']}"

    def measure(self, streams: int, tokens: int, repeats: int, clients: int) -> Front:
        """Long answers, then answers of one token.

        Args:
            streams: at the same time.
            tokens: of a long answer.
            repeats: short answers of each stream, one after the other.
            clients: processes that share the streams.
        """
        long = self._burst(streams, tokens, 1, clients)
        short = self._burst(streams, 1, repeats, clients)
        front, loop = (cost / short.requests for cost in (short.front, short.loop))
        further = long.tokens - long.requests
        return Front(
            tokens_per_s=long.tokens / long.seconds,
            messages_per_s=long.messages / long.seconds,
            # `started` and `finished` bring none.
            tokens_per_message=long.tokens / max(1, long.messages - 2 * long.requests),
            requests_per_s=short.requests / short.seconds,
            loop_share=long.loop / long.wall,
            short_loop_share=short.loop / short.wall,
            delay_p50_ms=1e3 * float(np.percentile(long.delays, 50)),
            delay_p99_ms=1e3 * float(np.percentile(long.delays, 99)),
            front_us_per_token=1e6 * (long.front - front * long.requests) / further,
            loop_us_per_token=1e6 * (long.loop - loop * long.requests) / further,
            front_us_per_request=1e6 * front,
            loop_us_per_request=1e6 * loop,
            resident_mb=long.resident_bytes / 1e6,
        )

    def close(self) -> None:
        """End it."""
        self._process.close()

    def _burst(self, streams: int, tokens: int, repeats: int, clients: int) -> _Burst:
        with tempfile.TemporaryDirectory() as folder, _clients(clients) as processes:
            files = [Path(folder) / f"{i}.npz" for i in range(clients)]
            for i, process in enumerate(processes):
                job = {
                    "address": self._address,
                    "name": f"client-{i}",
                    "streams": len(range(i, streams, clients)),
                    "repeats": repeats,
                    "tokens": tokens,
                    "channels": 4,
                    "file": str(files[i]),
                }
                process.tell(json.dumps(job))
            for process in processes:
                process.hear()
            before = self._process.ask("mark")
            for process in processes:
                process.tell("start")
            seen = [process.hear() for process in processes]
            after = self._process.ask("mark")
            emitted = Path(folder) / "emits.npz"
            self._process.ask(f"emits {emitted}")
            emits = np.load(emitted)
            delays = np.concatenate(
                [arrivals[name] - emits[name] for arrivals in map(np.load, files) for name in arrivals]
            )
        spent = {name: after[name] - before[name] for name in before}
        return _Burst(
            seconds=max(s["end"] for s in seen) - min(s["begin"] for s in seen),
            wall=spent["wall"],
            loop=spent["loop"],
            front=spent["process"] - spent["step"],
            tokens=sum(s["tokens"] for s in seen),
            messages=sum(s["messages"] for s in seen),
            requests=sum(s["requests"] for s in seen),
            delays=delays,
            resident_bytes=after["resident_bytes"],
        )


@contextlib.contextmanager
def _clients(number: int) -> Iterator[list[_Process]]:
    processes = [_Process("front_clients.py") for _ in range(number)]
    try:
        yield processes
    finally:
        for process in processes:
            process.close()


def main() -> int:
    """Run it.

    Returns:
        The exit status.
    """
    options = parse()
    machine = describe_machine()
    warn_if_busy(machine, "times will be longer than they are")
    model = options.model or prepare_demo_base(ServerConfig().cache_dir)
    with contextlib.ExitStack() as stack:
        sides: dict[str, FrontServer] = {}
        for name, code in ((THIS, None), (OTHER, options.compare)):
            if name == THIS or code is not None:
                path = None if code is None else stack.enter_context(_importable(code))
                sides[name] = FrontServer(model, options.interval_ms / 1e3, path)
                stack.callback(sides[name].close)
        series: Series = {name: {n: [] for n in options.streams} for name in sides}
        with tqdm(total=(options.rounds + 1) * len(options.streams) * len(sides), unit="run") as bar:
            for turn in range(-1, options.rounds):
                for streams in options.streams:
                    for name in list(sides)[:: 1 if turn % 2 else -1]:
                        # What is not measured warms up.
                        run = sides[name].measure(streams, options.tokens, options.repeats, options.clients)
                        if turn >= 0:
                            series[name][streams].append(run)
                        bar.update()
    report(options, machine, series)
    return 0


@contextlib.contextmanager
def _importable(checkout: Path) -> Iterator[Path]:
    """A folder from which a checkout can be imported as `lorikeet`, and nothing else of it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lorikeet").symlink_to(checkout.resolve(), target_is_directory=True)
        yield Path(folder)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "out", "quick")
    add = parser.add_argument
    add("--streams", type=int, nargs="+", default=[64, 128, 256, 512], help="at the same time [64 128 256 512]")
    add("--tokens", type=int, default=48, help="of a long answer [48]")
    add("--repeats", type=int, default=3, help="answers of one token that each stream asks for [3]")
    add("--interval-ms", type=float, default=100.0, help="from step to step of the engine's double [100]")
    add("--clients", type=int, default=2, help="client processes [2]")
    add("--rounds", type=int, default=3, help="times that everything runs, after once to warm up [3]")
    add("--compare", type=Path, help="another checkout, to measure its front beside this one's")
    add("--model", type=Path, help="directory of another tokenizer [the demo base]")
    return parse_or_quick(parser, QUICK)


def report(options: argparse.Namespace, machine: dict[str, Any], series: Series) -> None:
    """Print the table, write JSON and plot."""
    numbers = options.streams
    costs = [row for row in ROWS if row[0].startswith("CPU")]
    ratios = {}
    if OTHER in series:
        ratios = {
            f"{title}, {THIS} / {OTHER}": {
                n: ratio([value(r) for r in series[THIS][n]], [value(r) for r in series[OTHER][n]]) for n in numbers
            }
            for title, value, _ in costs
        }
    few = numbers[0]
    for title, value, _ in costs[:1]:
        ratios[f"{title}, relative to {few} streams"] = {
            n: ratio([value(r) for r in series[THIS][n]], [value(r) for r in series[THIS][few]]) for n in numbers
        }
    rows = {
        name: {title: {n: Spread.of([value(r) for r in runs[n]]) for n in numbers} for title, value, _ in ROWS}
        for name, runs in series.items()
    }
    settings = {
        "command": "make bench-front",
        "compared_with_another_checkout": OTHER in series,
        **{name: value for name, value in vars(options).items() if name not in ("model", "out", "quick", "compare")},
    }
    what = (
        f"a token for each stream every {options.interval_ms:g} ms, {options.tokens} tokens; {options.clients} client "
        "processes on the same machine"
    )
    result = {
        "machine": machine,
        "settings": settings,
        "ratios": {title: {n: asdict(s) for n, s in of.items()} for title, of in ratios.items()},
        "rows": {
            name: {title: {n: asdict(s) for n, s in of.items()} for title, of in table.items()}
            for name, table in rows.items()
        },
        "rounds": {name: {n: [asdict(run) for run in runs[n]] for n in numbers} for name, runs in series.items()},
    }
    groups = [str(n) for n in numbers]
    panels = [
        Panel(
            title,
            groups,
            {name: [table[title][n] for n in numbers] for name, table in rows.items()},
        )
        for title in ("CPU us/token, front", "event loop, % of a core", "emitted -> received, p99, ms")
    ]
    for path in write_result(options.out, "front", result, panels, f"{what}\n{one_line(machine)}"):
        sys.stdout.write(f"wrote {path}\n")
    width = max(len(title) for title in (*ratios, *(title for title, _, _ in ROWS))) + 2
    lines = [what, one_line(machine), ""]
    lines += [f"{'median (min..max) of the rounds':<{width}}" + "".join(f"{f'{n} streams':>22}" for n in numbers)]
    for title, of in ratios.items():
        lines.append(f"{title:<{width}}" + "".join(f"{s:.2f}".rjust(22) for s in of.values()))
    for name, table in rows.items():
        lines += ["", f"{name}:" if OTHER in rows else ""]
        for title, _, form in ROWS:
            lines.append(f"{title:<{width}}" + "".join(f"{format(table[title][n], form):>22}" for n in numbers))
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
