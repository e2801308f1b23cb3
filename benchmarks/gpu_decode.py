"""The sections of `make bench-gpu` that run the whole model: decode steps, the engine, prompts, launches.

Every row is plain JSON; `gpu_report.py` says what the numbers come to.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

from gpu_engine import EngineRun
from gpu_launches import count_launches
from gpu_limits import H100_BANDWIDTH, DecodeStep, ModelShapes
from gpu_model import Served, another_runner
from gpu_step import WARM_UP, decode_step, mixed_step, prompt_step, time_runs
from lorikeet.kernels.overlap import switches
from measurement import Spread

SEED = 11
NEW_TOKENS = 48
PROMPT_TOKENS, PROMPT_ADAPTERS = 4096, 16
# Batch, adapters, and what decides there how LoRA runs (`overlap`).
SWITCHES: Final = (
    (1, 1, ("lora_in_matmul", "dependent_launch")),
    (16, 1, ("lora_in_matmul",)),
    (16, 16, ("lora_side_stream", "dependent_launch")),
    (64, 1, ("lora_in_matmul",)),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What every section is given.

    Attributes:
        served: model, adapters and cache.
        copy_bandwidth: of this card, bytes a second.
        batches: streams, one after the other.
        context: tokens of each stream.
        rounds: in which the sides take turns.
        repeats: timed steps of each side in a round.
    """

    served: Served
    copy_bandwidth: float
    batches: Sequence[int]
    context: int
    rounds: int
    repeats: int

    def limit(self, batch: int, adapters: int) -> DecodeStep:
        """The byte model of a step."""
        shapes = ModelShapes.of(self.served.base.config)
        return DecodeStep(shapes, batch, self.context, self.served.room.rank, adapters)


def run_capture(with_: Measured) -> dict[str, Any]:
    """Capture the graphs that a server captures at its start."""
    runner = with_.served.runner
    begin = time.monotonic()
    runner.capture_graphs()
    stats = runner.graph_stats
    sys.stderr.write(f"  {stats.num_graphs} graphs{', ' + stats.failure if stats.failure else ''}\n")
    return {"graphs": stats.num_graphs, "failure": stats.failure, "seconds": round(time.monotonic() - begin, 1)}


def sides(batch: int) -> dict[str, int]:
    """Name -> different adapters of a batch: none, one for all, each its own. With one stream the last two are one."""
    return {"base": 0, "one shared": 1} | ({"all distinct": batch} if batch > 1 else {})


def run_decode(with_: Measured) -> list[dict[str, Any]]:
    """Time of a decode step on the device and for the step thread, beside the least its bytes allow."""
    rows = []
    for batch in with_.batches:
        wanted = sides(batch)
        runner = with_.served.runner
        runs = {
            side: partial(runner.forward, decode_step(with_.served, batch, with_.context, adapters, SEED))
            for side, adapters in wanted.items()
        }
        replays = runner.graph_stats.num_replays
        device, wall = time_runs(runs, rounds=with_.rounds, repeats=with_.repeats)
        steps = len(runs) * (WARM_UP + 2 * with_.rounds * with_.repeats)
        for side, adapters in wanted.items():
            limit = with_.limit(batch, adapters)
            limit_us = 1e6 * limit.seconds(with_.copy_bandwidth)
            row = {
                "batch": batch,
                "side": side,
                "adapters": adapters,
                "device_us": asdict(device[side]),
                "wall_us": asdict(wall[side]),
                "tokens_per_s": 1e6 * batch / device[side].median_us,
                "limit_us": limit_us,
                "limit_us_datasheet": 1e6 * limit.seconds(H100_BANDWIDTH),
                "of_limit": limit_us / device[side].median_us,
                "overhead": device[side].median_us / device["base"].median_us - 1,
                "overhead_limit": limit.overhead,
                "replayed": (runner.graph_stats.num_replays - replays) / steps,
            }
            rows.append(row)
            sys.stderr.write(
                f"  batch {batch:>3} {side:<12} device {device[side].median_us:8.0f} us  wall "
                f"{wall[side].median_us:8.0f} us  {100 * row['of_limit']:4.0f} % of the limit  "
                f"{100 * row['overhead']:+6.1f} %\n"
            )
    return rows


def run_engine(with_: Measured, seconds: float, new_tokens: int = NEW_TOKENS) -> list[dict[str, Any]]:
    """Tokens a second of the whole engine while all streams decode; contexts pass through `context` half-way.

    Args:
        with_: what to run.
        seconds: after which no second round begins.
        new_tokens: of each stream.
    """
    begin = time.monotonic()
    length = with_.context - new_tokens // 2
    steps: dict[tuple[int, str], list[float]] = {}
    with EngineRun(with_.served, with_.served.room.step_tokens) as engine:
        for number in range(2):
            if number and time.monotonic() - begin > seconds:
                break
            for batch in with_.batches:
                prompts = random_prompts(with_.served, batch, length, SEED + number)
                for side, adapters in sides(batch).items():
                    found = engine.decode(prompts, adapters, new_tokens)
                    steps.setdefault((batch, side), []).extend(found)
    rows = []
    for (batch, side), taken in steps.items():
        milliseconds = Spread.quantiles([1000 * s for s in taken])
        rate = 1000 * batch / milliseconds.median
        limit = with_.limit(batch, sides(batch)[side])
        rows.append(
            {
                "batch": batch,
                "side": side,
                "steps": len(taken),
                "step_ms": asdict(milliseconds),
                "tokens_per_s": rate,
                "limit_tokens_per_s": limit.tokens_per_s(with_.copy_bandwidth),
                "limit_tokens_per_s_datasheet": limit.tokens_per_s(H100_BANDWIDTH),
                "of_limit": rate / limit.tokens_per_s(with_.copy_bandwidth),
            }
        )
        sys.stderr.write(f"  batch {batch:>3} {side:<12} {rate:8.0f} tokens/s  {milliseconds.median:.2f} ms a step\n")
    return rows


def run_prefill(with_: Measured) -> dict[str, Any]:
    """A step of whole prompts over 16 adapters, against the same without."""
    length = PROMPT_TOKENS // PROMPT_ADAPTERS
    runs = {
        side: partial(with_.served.runner.forward, prompt_step(with_.served, PROMPT_ADAPTERS, length, adapters, SEED))
        for side, adapters in (("base", 0), ("16 adapters", PROMPT_ADAPTERS))
    }
    device, wall = time_runs(runs, rounds=with_.rounds, repeats=1)
    return {
        "tokens": PROMPT_TOKENS,
        "device_us": {side: asdict(timing) for side, timing in device.items()},
        "wall_us": {side: asdict(timing) for side, timing in wall.items()},
        "ratio": device["16 adapters"].median_us / device["base"].median_us,
    }


def run_chunks(
    with_: Measured,
    *,
    budgets: Sequence[tuple[int, float]] = ((512, 0.0), (512, 2.0), (256, 0.0), (128, 0.0)),
    streams: int = 16,
    new_tokens: int = 700,
    arriving: int = 12,
    arriving_tokens: int = 2048,
) -> list[dict[str, Any]]:
    """Time between two tokens of decoding streams while prompts come in, by the tokens that a step may have.

    For each step with a chunk of a prompt there are four of decodes alone: p50 is one of these, p99 has a chunk.

    Args:
        budgets: tokens of a step at most, and by how much chunks may slow decodes down (0: any).
        streams: that decode, each with an adapter of its own.
        new_tokens: of each, so many that all of them decode all the time.
        arriving: prompts that come in, one after the other.
        arriving_tokens: of each.
    """
    served = with_.served
    prompts = random_prompts(served, streams, with_.context - new_tokens // 2, SEED)
    rows = []
    for number, (step_tokens, max_slowdown) in enumerate(budgets):
        coming = random_prompts(served, arriving, arriving_tokens, SEED + 1 + number)
        chunk = step_tokens // 8 if max_slowdown else step_tokens - streams  # about
        pause = 4 * -(-arriving_tokens // chunk)
        replays = served.runner.graph_stats.num_replays
        with EngineRun(served, step_tokens, max_slowdown) as engine:
            gaps = engine.decode_beside_prompts(prompts, new_tokens, coming, pause)
        replays = served.runner.graph_stats.num_replays - replays
        milliseconds = sorted(1000 * seconds for seconds, _ in gaps)
        row = {
            "step_tokens": step_tokens,
            "max_slowdown": max_slowdown,
            "steps": len(gaps),
            "with_chunk": sum(has_chunk for _, has_chunk in gaps) / len(gaps),
            "replayed": replays / engine.num_steps,
            "p50_ms": percentile(milliseconds, 50),
            "p99_ms": percentile(milliseconds, 99),
        }
        row["p99_of_p50"] = row["p99_ms"] / row["p50_ms"]
        rows.append(row)
        sys.stderr.write(
            f"  {step_tokens} tokens a step, slowdown {max_slowdown:g}: p50 {row['p50_ms']:.2f} ms, "
            f"p99 {row['p99_ms']:.2f} ms, {100 * row['with_chunk']:.0f} % of {row['steps']} steps with a chunk, "
            f"{100 * row['replayed']:.0f} % replayed\n"
        )
    return rows


def run_switches(with_: Measured, plan: Sequence[tuple[int, int, Sequence[str]]] = SWITCHES) -> list[dict[str, Any]]:
    """Decode steps as they are served, and with one thing changed, in turns.

    Args:
        with_: what to run.
        plan: batch, different adapters, and the switches to change.
    """
    served = with_.served
    rows = []
    for batch, adapters, names in plan:
        step = decode_step(served, batch, with_.context, adapters, SEED)
        runs: dict[str, Callable[[], object]] = {"as served": partial(served.runner.forward, step)}
        for name in names:
            before = getattr(switches, name)
            runner = another_runner(served)
            setattr(switches, name, not before)
            try:
                for _ in range(WARM_UP):  # captures it so
                    runner.forward(step)
            finally:
                setattr(switches, name, before)
            runs[f"{name} {'off' if before else 'on'}"] = partial(runner.forward, step)
        runs["no graphs"] = partial(another_runner(served, graphs=False).forward, step)
        device, wall = time_runs(runs, rounds=with_.rounds, repeats=with_.repeats)
        rows.append(
            {
                "batch": batch,
                "adapters": adapters,
                "device_us": {name: asdict(timing) for name, timing in device.items()},
                "wall_us": {name: asdict(timing) for name, timing in wall.items()},
            }
        )
    return rows


def run_launches(with_: Measured, batch: int = 16, mixed_rows: int = 64) -> dict[str, Any]:
    """Kernels of a step and their time, by name, as served and without graphs.

    Args:
        with_: what to run.
        batch: streams that decode.
        mixed_rows: rows of a step that has tokens of a prompt beside them.
    """
    served = with_.served
    eager = another_runner(served, graphs=False)
    steps = {}
    for side, adapters in sides(batch).items():
        steps[side] = decode_step(served, batch, with_.context, adapters, SEED)
        mixed = mixed_step(served, batch, with_.context, adapters, mixed_rows, SEED)
        steps[f"{side}, {mixed_rows - batch} tokens of a prompt"] = mixed
    found = {}
    for side, step in steps.items():
        found[side] = count_launches(partial(served.runner.forward, step))
        found[f"{side}, no graphs"] = count_launches(partial(eager.forward, step))
    return {"batch": batch, "sides": found}


def random_prompts(served: Served, count: int, length: int, seed: int) -> list[list[int]]:
    """Different ones, so that no prefix is shared."""
    draw = random.Random(seed)
    return [[draw.randrange(2, served.base.vocab_size) for _ in range(length)] for _ in range(count)]


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Of ascending values; the nearest from below."""
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
