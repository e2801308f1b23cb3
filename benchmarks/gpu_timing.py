"""Times device work as a CUDA graph with events, on a cold cache: what the device needs, without Python's launches.

A function is captured once and replayed. Between two replays 256 MB are written, which is more than any L2 cache holds,
so that every replay reads its inputs from device memory; that write is not timed. Candidates that are compared take
turns, so that what the card does meanwhile (clocks, temperature) meets all of them.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from lorikeet.server.engine.graph_capture import CudaCapture

FLUSH_BYTES = 256 * 2**20
_WARM_UP = 3
_COPY_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one run of a function: median, 20th and 80th percentile."""

    median_us: float
    low_us: float
    high_us: float

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> "Timing":
        """Of at least one sample."""
        ordered = sorted(samples_us)
        fifth = len(ordered) // 5
        return cls(statistics.median(ordered), ordered[fifth], ordered[-1 - fifth])

    def bytes_per_s(self, num_bytes: float) -> float:
        """Rate at the median, if one run moves so many bytes."""
        return num_bytes / (1e-6 * self.median_us)


class Captured:
    """A function as a CUDA graph.

    Args:
        fn: works on the current stream and on tensors that outlive this object; does not wait for the device.
        runs: how often the graph runs it; times are of one run. More than 1 only where runs do not find each other's
            inputs in the cache (`rotating`), or where a warm cache is what is measured.
    """

    def __init__(self, fn: Callable[[], object], runs: int = 1) -> None:
        def run() -> None:
            for _ in range(runs):
                fn()

        self._runs = runs
        self._replay = CudaCapture(torch.device("cuda", torch.cuda.current_device())).capture(run)

    def sample(self, repeats: int, *, flush: torch.Tensor | None) -> list[float]:
        """Replay and time: microseconds of one run, for each of `repeats` replays; waits for the device at the end.

        Args:
            repeats: replays.
            flush: written before each, so that nothing of the inputs is in the cache; None: warm.
        """
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            if flush is not None:
                flush.zero_()  # takes longer than the launch of the graph, so the device never waits for the host
            start.record()
            self._replay()
            end.record()
        torch.cuda.synchronize()
        return [1000 * start.elapsed_time(end) / self._runs for start, end in events]


def measure(fn: Callable[[], object], *, repeats: int, flush: bool) -> Timing:
    """Capture a function and time it.

    Args:
        fn: see `Captured`.
        repeats: timed replays.
        flush: whether its inputs are out of the cache before each.
    """
    captured = Captured(fn)
    buffer = flush_buffer() if flush else None
    captured.sample(_WARM_UP, flush=buffer)
    return Timing.of(captured.sample(repeats, flush=buffer))


def measure_each(
    fns: Mapping[str, Callable[[], object]], *, rounds: int, repeats: int, flush: bool
) -> dict[str, Timing]:
    """The same for several candidates, in turns: `repeats` replays of each in every round, in rotating order."""
    captured = {name: Captured(fn) for name, fn in fns.items()}
    buffer = flush_buffer() if flush else None
    for each in captured.values():
        each.sample(_WARM_UP, flush=buffer)
    return in_turns({n: partial(c.sample, repeats, flush=buffer) for n, c in captured.items()}, rounds)


def rotating(fns: Sequence[Callable[[], object]]) -> Captured:
    """The same work on several copies of its inputs, one after the other in one graph, as in the layers of a model.

    Where the copies together are larger than the cache, each finds its own gone, and the gap before a graph's first
    kernel is shared by all: the way to time what takes few microseconds.
    """
    turn = itertools.cycle(fns)
    return Captured(lambda: next(turn)(), runs=len(fns))


def in_turns(samplers: Mapping[str, Callable[[], list[float]]], rounds: int) -> dict[str, Timing]:
    """Take samples of every candidate in every round; who comes first rotates.

    Args:
        samplers: name -> some samples in microseconds.
        rounds: how often each is asked.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    for number in range(rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            samples[name] += samplers[name]()
    return {name: Timing.of(each) for name, each in samples.items()}


def flush_buffer() -> torch.Tensor:
    """What `Captured.sample` writes before each replay."""
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What this card does in the best case; bytes a second.

    Attributes:
        copy: bytes read plus bytes written of a large copy on the device.
        read: bytes read by a large reduction.
        shortest_us: what a kernel that does nothing takes by the way of timing used here.
    """

    copy: float
    read: float
    shortest_us: float


def measure_bandwidth(repeats: int = 20) -> Bandwidth:
    """Copy and read 2 GiB of random values."""
    source = torch.empty(_COPY_BYTES // 4, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    total = torch.empty((), dtype=torch.float32, device="cuda")
    copy = measure(lambda: target.copy_(source), repeats=repeats, flush=False)
    read = measure(lambda: torch.sum(source, dim=0, out=total), repeats=repeats, flush=False)
    least = measure(total.zero_, repeats=repeats, flush=True)
    return Bandwidth(copy.bytes_per_s(2 * source.nbytes), read.bytes_per_s(source.nbytes), least.median_us)
