"""When the engine's steps ended, and what ran in them."""

import itertools
import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    Attributes:
        end_s: `time.perf_counter()` when it ended.
        tokens: rows of its batch.
        requests: in it.
    """

    end_s: float
    tokens: int
    requests: int


class StepClock:
    """Hears of every step on the step thread; any thread reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: list[Step] = []

    def on_step(self, seconds: float, num_tokens: int, num_requests: int, num_adapters: int) -> None:
        """`EngineObserver.on_step`."""
        with self._lock:
            self._steps.append(Step(time.perf_counter(), num_tokens, num_requests))

    def clear(self) -> None:
        """Forget the steps so far."""
        with self._lock:
            self._steps.clear()

    @property
    def count(self) -> int:
        """Steps since the last `clear`."""
        with self._lock:
            return len(self._steps)

    def intervals(self) -> list[tuple[float, Step]]:
        """(seconds since the end of the step before, step): scheduling and delivery of the tokens count."""
        with self._lock:
            steps = list(self._steps)
        return [(step.end_s - before.end_s, step) for before, step in itertools.pairwise(steps)]

    def full_decode_steps(self, streams: int) -> list[float]:
        """Seconds from the end of the step before to the end of each step that gave every stream one token."""
        return [seconds for seconds, step in self.intervals() if step.tokens == step.requests == streams]
