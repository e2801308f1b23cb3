"""`make bench-engine`: what the engine's own bookkeeping costs a step, and how that grows. No model runs.

The real loop, scheduler, blocks, input building, sampler, detokenizer and metrics run around a model that answers with
prepared logits (`engine_world.py`). One size grows at a time: running requests, adapters that requests wait for,
contexts, chunks of long prompts, requests that take each other's blocks away, cached prefixes. Every size takes its
turn in each round, half of the steps with a clock on each part. Prints the exponents first (1 is linear), writes JSON
and a plot. What many known adapters cost the adapter manager's calls is `registry_scale.py`'s.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_world import BLOCK, GREEDY, EngineWorld, ResidentVersions, Rounds, bare_store, versions
from growth import Curve, Point, write_curves
from lorikeet.adapters.version import AdapterVersion
from lorikeet.server.base.demo import prepare_demo_base
from lorikeet.server.config import ServerConfig
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.logs import configure_logs
from machine import describe_machine, one_line
from options import parser_of
from tqdm import tqdm
from transformers import AutoTokenizer

SEED = 7
SLOTS = 1024
ADAPTERS = 8  # that run
CHUNK = 512
SHORT = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


@dataclass
class Case:
    """One size of one curve.

    Attributes:
        size: along the axis.
        run: makes so many rounds, with a clock on the parts or without.
        per: what of a step its time is divided by.
    """

    size: int
    run: Callable[[int, bool], Rounds]
    per: Callable[[Rounds], float]


class Worlds:
    """Makes engines in the state that is to be measured; one is made at a time, and costs memory until it is dropped.

    Args:
        tokenizer: of transformers.
        steps: that every world must have room for.
    """

    def __init__(self, tokenizer: Any, steps: int) -> None:
        self.vocab_size = len(tokenizer)
        self._tokenizer = tokenizer
        self._steps = steps
        self._draw = random.Random(SEED)

    def running(self, size: int) -> Case:
        """So many requests decode, of 8 adapters."""
        world, adapters = self._world(size, contexts=64)
        self._decode(world, size, 64, adapters)
        return Case(size, lambda n, parts: world.rounds(n, in_parts=parts), lambda rounds: rounds.requests)

    def waiting(self, size: int) -> Case:
        """63 requests decode, one more might, and so many adapters that are not on the device have one waiting."""
        world, adapters = self._world(64, contexts=64, others=size)
        self._decode(world, 63, 64, adapters[:ADAPTERS])
        for adapter in adapters[ADAPTERS:]:
            world.submit(self._prompt(16), adapter)
        return Case(size, lambda n, parts: world.rounds(n, in_parts=parts), lambda rounds: rounds.requests)

    def contexts(self, size: int) -> Case:
        """16 requests decode with so many tokens of context each."""
        world, adapters = self._world(16, contexts=size, step_tokens=8192)
        self._decode(world, 16, size, adapters)
        return Case(size, lambda n, parts: world.rounds(n, in_parts=parts), lambda rounds: rounds.requests)

    def prompts(self, size: int) -> Case:
        """Prompts of so many tokens are computed one after the other in chunks of 512."""
        world, adapters = self._world(1, contexts=size)

        def submit_next() -> None:
            if not world.scheduler.running:
                world.submit(self._prompt(size), adapters[0], SHORT)

        return Case(
            size, lambda n, parts: world.rounds(n, in_parts=parts, before=submit_next), lambda rounds: rounds.tokens
        )

    def preempted(self, size: int) -> Case:
        """So many requests decode with blocks for three quarters of them: some go and come back all the time."""
        world, adapters = self._world(size, contexts=64, num_blocks=max(8, size * 64 // BLOCK * 3 // 4))

        def fill_up() -> None:
            for _ in range(size - world.scheduler.num_waiting - len(world.scheduler.running)):
                params = SamplingParams(temperature=0.0, max_tokens=self._draw.randint(32, 96), ignore_eos=True)
                world.submit(self._prompt(32), self._draw.choice(adapters), params)

        fill_up()
        world.settle()
        return Case(
            size, lambda n, parts: world.rounds(n, in_parts=parts, before=fill_up), lambda rounds: rounds.requests
        )

    def cached(self, size: int) -> Case:
        """A request of 256 tokens comes with every step, into a prefix cache of so many blocks, all of them taken."""
        world, adapters = self._world(8, contexts=256, num_blocks=size)

        def submit_one() -> None:
            world.submit(self._prompt(256), self._draw.choice(adapters), SHORT)

        world.rounds(2 * size * BLOCK // 256, before=submit_one)  # twice as many prompts as it holds
        return Case(size, lambda n, parts: world.rounds(n, in_parts=parts, before=submit_one), lambda _: 1.0)

    def _world(
        self, running: int, *, contexts: int, others: int = 0, step_tokens: int = CHUNK, num_blocks: int | None = None
    ) -> tuple[EngineWorld, list[AdapterVersion]]:
        adapters = versions(ADAPTERS + others)
        room = contexts + self._steps + BLOCK
        world = EngineWorld(
            self._tokenizer,
            bare_store(SLOTS),
            ResidentVersions(adapters[:ADAPTERS]),
            max_running=running,
            step_tokens=max(step_tokens, running),
            num_blocks=num_blocks or -(-running * room // BLOCK) + running,
            max_context=room,
        )
        return world, adapters

    def _decode(self, world: EngineWorld, count: int, tokens: int, adapters: list[AdapterVersion]) -> None:
        for i in range(count):
            world.submit(self._prompt(tokens), adapters[i % ADAPTERS], GREEDY)
        world.settle()

    def _prompt(self, tokens: int) -> list[int]:
        """No two begin alike, so nothing is cached but what is a request's own."""
        return self._draw.choices(range(self.vocab_size // 4, self.vocab_size // 2), k=tokens)


CURVES = {
    "running": ("running requests", "request", (1, 4, 16, 64, 256, 1024)),
    "waiting": ("waiting adapters", "request", (1, 10, 100, 1000, 10000)),
    "contexts": ("tokens of context", "request", (128, 512, 2048, 8192, 32768)),
    "prompts": ("tokens of a prompt", "token", (512, 2048, 8192, 32768)),
    "preempted": ("requests that want blocks", "request", (16, 64, 256, 1024)),
    "cached": ("blocks of the cache", "admission", (512, 2048, 8192, 32768)),
}
QUICK = {
    "running": (1, 4),
    "waiting": (3, 30),
    "contexts": (64, 128),
    "prompts": (64, 600),
    "preempted": (8, 16),
    "cached": (64, 128),
}


def main() -> int:
    """Run it.

    Returns:
        The exit status.
    """
    options = parse()
    configure_logs("error", "console")
    torch.set_num_threads(options.threads)
    machine = describe_machine()
    base = options.model or prepare_demo_base(ServerConfig().cache_dir)
    worlds = Worlds(AutoTokenizer.from_pretrained(base), steps=2 * options.steps * (options.rounds + 1) + 64)
    names = options.only or list(CURVES)
    curves = [measure(name, worlds, options) for name in names]
    sys.stdout.write("\n" + "\n\n".join(curve.as_text() for curve in curves) + f"\n\n{one_line(machine)}\n")
    settings = {
        "command": "make bench-engine",
        "steps": options.steps,
        "rounds": options.rounds,
        "threads": options.threads,
        "vocab_size": worlds.vocab_size,
    }
    title = f"what the engine does for a step, without a model\n{one_line(machine)}"
    result = {"machine": machine, "settings": settings}
    for path in write_curves(options.out, "engine_costs", result, curves, title):
        sys.stdout.write(f"wrote {path}\n")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "out", "quick")
    add = parser.add_argument
    add("--only", nargs="+", choices=CURVES, help="curves to measure [all]")
    add("--steps", type=int, default=100, help="of each kind in a round, at each size [100]")
    add("--rounds", type=int, default=5, help="times that every size is measured [5]")
    add("--threads", type=int, default=1, help="CPU threads of torch [1]")
    add("--model", type=Path, help="directory of the tokenizer [the demo base]")
    return parser.parse_args()


def measure(name: str, worlds: Worlds, options: argparse.Namespace) -> Curve:
    """One curve: every size in each round."""
    axis, unit, sizes = CURVES[name]
    sizes = QUICK[name] if options.quick else sizes
    cases = [getattr(worlds, name)(size) for size in tqdm(sizes, desc=f"{name}: preparing", leave=False)]
    points = [Point(case.size) for case in cases]
    for turn in tqdm(range(-1, options.rounds), desc=name):
        for case, point in zip(cases, points, strict=True):
            plain, timed = case.run(options.steps, False), case.run(options.steps, True)
            if turn < 0:  # the first round warms up
                continue
            point.step_us.append(statistics.median(plain.total_us))
            point.per = case.per(plain)
            for part, microseconds in timed.parts_us.items():
                point.parts_us.setdefault(part, []).append(microseconds)
    return Curve(name, axis, unit, points)


if __name__ == "__main__":
    sys.exit(main())
