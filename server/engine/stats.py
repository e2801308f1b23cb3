"""What the engine tells about itself: numbers for any thread to read, and calls for the metrics. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from .block_manager import BlockStats


class EngineState(StrEnum):
    """Lifecycle of the engine; it only moves forward."""

    NEW = "new"
    SERVING = "serving"
    DRAINING = "draining"  # accepts nothing, finishes what is in flight
    STOPPED = "stopped"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot, at most a step or 0.1 s old while the engine works, exact while it is idle.

    Attributes:
        running, waiting: requests now.
        running_by_adapter, waiting_by_adapter: the same by adapter id, "" is the base; without zeros. Requests with
            several adapters count for each of them.
        blocks: KV blocks by state, prefix cache counters.
        num_steps, num_preemptions: since start.
    """

    state: EngineState
    running: int
    waiting: int
    blocks: BlockStats
    running_by_adapter: Mapping[str, int] = field(default_factory=dict)
    waiting_by_adapter: Mapping[str, int] = field(default_factory=dict)
    num_steps: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class GraphStats:
    """Captured steps; kept by the step thread, to be read on any.

    Attributes:
        num_graphs: there are now.
        num_replays: steps that one of them ran, since start.
        failure: why no further one is captured; "": nothing has failed.
    """

    num_graphs: int = 0
    num_replays: int = 0
    failure: str = ""


class EngineObserver(Protocol):
    """Hears what happens, on the step thread; every call must be cheap.

    `adapter` is an adapter id, "" for the base; where several answer together, their ids joined by "+".
    """

    def on_admitted(self, adapter: str, queue_wait_s: float) -> None:
        """A request runs for the first time."""
        ...

    def on_first_token(self, adapter: str, ttft_s: float) -> None:
        """A request's first token was sampled, that many seconds after its submission."""
        ...

    def on_token(self, adapter: str, itl_s: float) -> None:
        """A later token was sampled, that many seconds after the one before."""
        ...

    def on_finished(
        self, adapter: str, outcome: str, prompt_tokens: int, cached_tokens: int, output_tokens: int, e2e_s: float
    ) -> None:
        """A request ended: outcome is the finish reason, or the error's reason in lower case."""
        ...

    def on_step(self, seconds: float, num_tokens: int, num_requests: int, num_adapters: int) -> None:
        """A step ran: forward pass and sampling, without the delivery of the tokens."""
        ...

    def on_preempted(self, adapter: str) -> None:
        """A request gave its blocks back to older ones and waits again."""
        ...


class SilentObserver:
    """Ignores every event."""

    def on_admitted(self, adapter: str, queue_wait_s: float) -> None:
        """Ignore it."""

    def on_first_token(self, adapter: str, ttft_s: float) -> None:
        """Ignore it."""

    def on_token(self, adapter: str, itl_s: float) -> None:
        """Ignore it."""

    def on_finished(
        self, adapter: str, outcome: str, prompt_tokens: int, cached_tokens: int, output_tokens: int, e2e_s: float
    ) -> None:
        """Ignore it."""

    def on_step(self, seconds: float, num_tokens: int, num_requests: int, num_adapters: int) -> None:
        """Ignore it."""

    def on_preempted(self, adapter: str) -> None:
        """Ignore it."""
