"""Steps of the runner, timed on the device: decodes over contexts that are already computed, prompts, and both.

Two times of a step. *Device*: from the first to the last thing that the device does for it, with the host so far ahead
that the device never waits; what the byte model speaks of. *Wall*: what the step thread waits for it, the host's part
included.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from gpu_model import Served
from gpu_timing import Timing, in_turns
from lorikeet.server.engine.request import NO_SLOT, Request
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.engine.scheduler import ScheduledRequest, ScheduledStep

# Cycles that the device spins before a timed step: some 4 ms, in which the host prepares and launches all of it.
_HEAD_START_CYCLES = 8_000_000
WARM_UP = 6


def decode_step(served: Served, batch: int, context: int, adapters: int, seed: int) -> ScheduledStep:
    """One token for each of `batch` requests whose context, this token included, is `context` tokens long.

    Args:
        served: its cache must hold batch x context tokens.
        batch: requests.
        context: tokens.
        adapters: different ones, in turn over the requests; 0: none.
        seed: of tokens and blocks.
    """
    return _step(served, [context - 1] * batch, context, adapters, seed)


def mixed_step(served: Served, batch: int, context: int, adapters: int, rows: int, seed: int) -> ScheduledStep:
    """As `decode_step`, and beside it tokens of one prompt more: of its last ones as many as make `rows` rows."""
    return _step(served, [*[context - 1] * batch, context - rows + batch], context, adapters, seed)


def prompt_step(served: Served, requests: int, tokens: int, adapters: int, seed: int) -> ScheduledStep:
    """All of `tokens` prompt tokens of each request at once."""
    return _step(served, [0] * requests, tokens, adapters, seed)


def _step(served: Served, starts: Sequence[int], length: int, adapters: int, seed: int) -> ScheduledStep:
    """Of a request of `length` tokens for each of `starts`, what follows there."""
    room = served.room
    width = -(-length // room.block_size)
    batch = len(starts)
    assert batch * width <= room.blocks and batch <= room.requests
    assert min(starts) >= 0 and batch * length - sum(starts) <= room.step_tokens
    draw = random.Random(seed)
    # Scattered, as after a while of serving.
    blocks = draw.sample(range(room.blocks), batch * width)
    items = []
    for number, start in enumerate(starts):
        prompt = [draw.randrange(served.base.vocab_size) for _ in range(length)]
        index = number % adapters if adapters else None
        adaptation = None if index is None else served.adaptations[index]
        request = Request(f"step-{number}", prompt, SamplingParams(temperature=0.0), adaptation, lambda event: None)
        request.block_table = blocks[number * width : (number + 1) * width]
        request.num_computed_tokens = start
        request.slot = NO_SLOT if index is None else served.slots[index]
        request.order = number
        items.append(ScheduledRequest(request, start, length - start, True))
    return ScheduledStep(sorted(items, key=lambda item: (item.request.slot, item.request.order)))


def time_runs(
    runs: Mapping[str, Callable[[], object]], *, rounds: int, repeats: int
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """(device, wall) times of steps that take turns.

    Args:
        runs: name -> runs its step once.
        rounds: of turns.
        repeats: times of each step in a round.
    """
    for run in runs.values():
        # Kernels are compiled, and a shape that comes for the fourth time is captured (`StepGraphs`).
        for _ in range(WARM_UP):
            run()
    torch.cuda.synchronize()
    found = [
        in_turns({name: partial(_samples, way, run, repeats) for name, run in runs.items()}, rounds)
        for way in (device_us, wall_us)
    ]
    return found[0], found[1]


def _samples(way: Callable[[Callable[[], object]], float], run: Callable[[], object], repeats: int) -> list[float]:
    return [way(run) for _ in range(repeats)]


def device_us(run: Callable[[], object]) -> float:
    """Microseconds that the device works on a step."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end)


def wall_us(run: Callable[[], object]) -> float:
    """Microseconds from the call to the end of its work."""
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - begin)
