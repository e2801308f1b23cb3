"""`make bench-prefix`: what the prefix cache saves where prompts begin alike: hit rate, and time to the first token.

Two workloads on two servers in one process, one with the cache and one without, in rounds that take turns; all prompts
of a round are new but for what they are meant to share:

- *shared*: every request of an adapter begins with that adapter's system prompt of 256 tokens, goes on with one of two
  blocks of examples (64 tokens) and ends with a question of its own (32); one after the other, adapters in turn;
- *chat*: conversations of several turns; a turn's prompt is everything said before, the answers included.

Adapters are random ones over all linears. Prints ratios first, writes JSON and a plot.
"""

import argparse
import queue
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bar_panels import Panel, write_result
from local_server import local_server
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.info import Tier
from lorikeet.server.app import App
from lorikeet.server.base.demo import prepare_demo_base
from lorikeet.server.config import ServerConfig
from lorikeet.server.engine.request import Delta, Event, Failed, Finished, Request
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.logs import configure_logs
from machine import describe_machine, one_line
from measurement import Spread, ratio
from options import parse_or_quick, parser_of
from tqdm import tqdm
from workload import write_random_adapters

SEED = 7
TIMEOUT_S = 600.0
WITH, WITHOUT = "with", "without"
SHARED, CHAT = "shared", "chat"
EXAMPLES, QUESTION, NUM_EXAMPLES = 64, 32, 2  # tokens, tokens, blocks of examples of each adapter
QUICK = {"adapters": 2, "system": 48, "requests": 4, "turns": 2, "rounds": 1, "tokens": 2}


@dataclass(slots=True)
class Run:
    """One workload on one server, once.

    Attributes:
        ttft_s: of each request.
        prompt_tokens, cached_tokens: of all requests.
    """

    ttft_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def median_ms(self) -> float:
        """Of the times to the first token."""
        return 1000 * float(np.median(self.ttft_s))

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were cached."""
        return self.cached_tokens / self.prompt_tokens


class Client:
    """Asks a server, one request after the other."""

    def __init__(self, server: App, tokens: int) -> None:
        self._server = server
        self._params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def ask(self, prompt: Sequence[int], adapter_id: str, run: Run) -> list[int]:
        """The answer's tokens; what was seen goes into `run`."""
        events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
        adaptation = Adaptation.single(self._server.manager.resolve(adapter_id))
        name = f"prefix-{time.monotonic_ns()}"
        begin = time.perf_counter()
        self._server.engine.submit(
            Request(
                name, list(prompt), self._params, adaptation, lambda event: events.put((time.perf_counter(), event))
            )
        )
        answer: list[int] = []
        while True:
            at, event = events.get(timeout=TIMEOUT_S)
            match event:
                case Delta(token_ids=token_ids):
                    if not answer:
                        run.ttft_s.append(at - begin)
                    answer += token_ids
                case Finished():
                    run.prompt_tokens += event.prompt_tokens
                    run.cached_tokens += event.cached_tokens
                    return answer
                case Failed(error=error):
                    raise RuntimeError(f"a request failed: {error.message}")


def main() -> int:
    """Run it.

    Returns:
        The exit status.
    """
    options = parse()
    configure_logs("warning", "console")
    machine = describe_machine()
    base = options.model or prepare_demo_base(ServerConfig().cache_dir)
    runs: dict[str, dict[str, list[Run]]] = {name: {WITH: [], WITHOUT: []} for name in (SHARED, CHAT)}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = (Path(scratch) / "adapters").resolve()
        ids = write_random_adapters(base, folder, count=options.adapters, rank=options.rank, seed=SEED)
        clients = {}
        for side in (WITH, WITHOUT):
            settings = {"threads": options.threads, "device": "cpu", "prefix_cache": side == WITH}
            server = stack.enter_context(
                local_server(options.model, folder, Path(scratch) / f"state-{side}", **settings)
            )
            for name in ids:
                server.manager.load(name)
                server.manager.prefetch(name, Tier.DEVICE)
            clients[side] = Client(server, options.tokens)
        vocab_size = server.base.vocab_size
        for turn in tqdm(range(-1, options.rounds), desc="rounds"):
            for side in (WITH, WITHOUT) if turn % 2 else (WITHOUT, WITH):
                for name, workload in ((SHARED, shared), (CHAT, chat)):
                    run = workload(clients[side], ids, Prompts(vocab_size, SEED + turn), options)
                    if turn >= 0:  # the first round warms up
                        runs[name][side].append(run)
    report(runs, machine, options)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "threads", "model", "out", "quick")
    add = parser.add_argument
    add("--adapters", type=int, default=8, help="random adapters [8]")
    add("--rank", type=int, default=16, help="of each adapter, on all linears [16]")
    add("--system", type=int, default=256, help="tokens of a system prompt [256]")
    add("--requests", type=int, default=16, help="of the shared workload in a round [16]")
    add("--turns", type=int, default=3, help="of a conversation; there is one for each adapter [3]")
    add("--tokens", type=int, default=16, help="of an answer [16]")
    add("--rounds", type=int, default=3, help="times that both servers take turns [3]")
    return parse_or_quick(parser, QUICK)


class Prompts:
    """Random tokens from the middle of the vocabulary; both servers get the same in a round."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._ids = range(vocab_size // 4, vocab_size // 2)
        self._draw = random.Random(seed)

    def some(self, count: int) -> list[int]:
        """So many."""
        return self._draw.choices(self._ids, k=count)


def shared(client: Client, ids: Sequence[str], prompts: Prompts, options: argparse.Namespace) -> Run:
    """Requests that begin with their adapter's system prompt."""
    run = Run()
    system = {name: prompts.some(options.system) for name in ids}
    examples = {name: [prompts.some(EXAMPLES) for _ in range(NUM_EXAMPLES)] for name in ids}
    for number in range(options.requests):
        name, turn = ids[number % len(ids)], number // len(ids)
        prompt = system[name] + examples[name][turn % NUM_EXAMPLES] + prompts.some(QUESTION)
        client.ask(prompt, name, run)
    return run


def chat(client: Client, ids: Sequence[str], prompts: Prompts, options: argparse.Namespace) -> Run:
    """Conversations side by side: the first turn of each, the second of each, and so on."""
    run = Run()
    said = {name: prompts.some(options.system) for name in ids}
    for _ in range(options.turns):
        for name in ids:
            said[name] += prompts.some(QUESTION)
            said[name] += client.ask(said[name], name, run)
    return run


def report(runs: dict[str, dict[str, list[Run]]], machine: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the table, write JSON and plot."""
    result: dict[str, Any] = {"machine": machine, "settings": {"command": "make bench-prefix"}, "workloads": {}}
    result["settings"] |= {name: value for name, value in vars(options).items() if isinstance(value, int)}
    spreads: dict[str, dict[str, Spread]] = {}
    lines = []
    for name, of in runs.items():
        times = {side: [run.median_ms for run in of[side]] for side in of}
        saved = ratio(times[WITH], times[WITHOUT])
        rates = {side: Spread.of([run.hit_rate for run in of[side]]) for side in of}
        spreads[name] = {side: Spread.of(times[side]) for side in of}
        lines.append(f"{name:<8} time to first token, with / without the cache: {saved:.2f}")
        lines.append(f"{'':<8} cached / prompt tokens: {rates[WITH]:.3f}, without {rates[WITHOUT]:.3f}")
        lines += [f"{'':<8} median time to first token {side}, ms: {spreads[name][side]:.1f}" for side in of]
        result["workloads"][name] = {
            "ttft_ratio": asdict(saved),
            "hit_rate": {side: asdict(rates[side]) for side in of},
            "ttft_ms": {side: asdict(spreads[name][side]) for side in of},
            "rounds": {side: [asdict(run) for run in of[side]] for side in of},
        }
    sys.stdout.write("median (min..max) of the rounds\n" + "\n".join(lines) + f"\n\n{one_line(machine)}\n")
    bars = {f"{side} prefix cache": [spreads[name][side] for name in runs] for side in (WITH, WITHOUT)}
    panels = [
        Panel("ms to the first token, median", list(runs), bars),
        Panel(
            "% of the prompt tokens cached",
            list(runs),
            {WITH: [Spread.of([100 * run.hit_rate for run in runs[name][WITH]]) for name in runs]},
        ),
    ]
    title = f"prompts that begin alike, {options.adapters} adapters\n{one_line(machine)}"
    for path in write_result(options.out, "prefix_cache", result, panels, title):
        sys.stdout.write(f"wrote {path}\n")


if __name__ == "__main__":
    sys.exit(main())
