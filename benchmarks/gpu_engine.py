"""The engine end to end over a runner: its thread, scheduler, sampler and detokenizer, requests in and events out.

Only the adapter manager is left out: every adapter is on the device from the start.
"""

import queue
import time
from collections.abc import Mapping, Sequence

from gpu_model import Served
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.server.engine.block_manager import BlockManager
from lorikeet.server.engine.detokenizer import DetokenizerFactory
from lorikeet.server.engine.engine import Engine
from lorikeet.server.engine.request import Delta, Event, Failed, Finished, Request
from lorikeet.server.engine.sampler import Sampler
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.engine.scheduler import Scheduler
from lorikeet.server.engine.stats import SilentObserver
from step_clock import StepClock

EVENT_TIMEOUT_S = 120.0
_POLL_S = 0.0005


class ResidentAdapters:
    """The engine's `AdapterPort` where every adapter has its slot for good.

    Args:
        slots: of each adaptation.
    """

    def __init__(self, slots: Mapping[Adaptation, int]) -> None:
        self.on_ready = lambda: None
        self._slots = dict(slots)

    def try_activate(self, adaptation: Adaptation) -> int | None:
        """Its slot."""
        return self._slots[adaptation]

    def deactivate(self, adaptation: Adaptation) -> None:
        """Nothing is counted."""

    def release(self, adaptation: Adaptation) -> None:
        """Nothing is held."""

    def step_work(self) -> None:
        """There is none."""


class _Observer(SilentObserver):
    """Hands steps to a clock."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def on_step(self, seconds: float, num_tokens: int, num_requests: int, num_adapters: int) -> None:
        self._clock.on_step(seconds, num_tokens, num_requests, num_adapters)


class _Stream:
    """The events of one request."""

    def __init__(self) -> None:
        self.is_over = False
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def take(self, event: Event) -> None:
        """Called by the engine."""
        self._events.put(event)
        self.is_over = not isinstance(event, Delta)

    def first_token(self) -> None:
        """Wait for it."""
        _checked(self._events.get(timeout=EVENT_TIMEOUT_S))

    def rest(self) -> None:
        """Wait for the end.

        Raises:
            RuntimeError: the request did not end well.
        """
        while not isinstance(_checked(self._events.get(timeout=EVENT_TIMEOUT_S)), Finished):
            pass


def _any_over(streams: Sequence[_Stream]) -> bool:
    return any(stream.is_over for stream in streams)


def _checked(event: Event) -> Event:
    if isinstance(event, Failed):
        raise RuntimeError(f"a request failed: {event.error}")
    assert isinstance(event, Delta | Finished)
    return event


class EngineRun:
    """A started engine; use it as a context, so that its thread ends.

    Args:
        served: model, adapters and cache.
        step_tokens: of a step at most, chunks of prompts included.
        max_slowdown: of decodes by chunks, see `Scheduler`.
    """

    def __init__(self, served: Served, step_tokens: int, max_slowdown: float = 0.0) -> None:
        room = served.room
        self.clock = StepClock()
        self._served = served
        adapters = ResidentAdapters(dict(zip(served.adaptations, served.slots, strict=True)))
        scheduler = Scheduler(
            BlockManager(room.blocks, room.block_size),
            adapters,
            max_running=room.requests,
            token_budget=step_tokens,
            max_slowdown=max_slowdown,
            padded_sizes=served.runner.padded_sizes,
        )
        base = served.base
        self._engine = Engine(
            served.runner,
            scheduler,
            Sampler(sorted(base.eos_token_ids)),
            DetokenizerFactory(base.tokenizer),
            adapters,
            _Observer(self.clock),
            base.eos_token_ids,
            room.context,
            max_waiting=4 * room.requests,
        )
        self._num_requests = 0

    @property
    def num_steps(self) -> int:
        """Steps since the start; exact while nothing runs."""
        return self._engine.stats().num_steps

    def __enter__(self) -> "EngineRun":
        self._engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()

    def decode(self, prompts: Sequence[Sequence[int]], adapters: int, new_tokens: int) -> list[float]:
        """Generate greedily for all prompts at once.

        Args:
            prompts: token ids.
            adapters: different ones, in turn over the prompts; 0: none.
            new_tokens: for each.

        Returns:
            Seconds between the ends of steps that gave every prompt a token.
        """
        self.clock.clear()
        streams = [
            self._submit(prompt, i % adapters if adapters else None, new_tokens) for i, prompt in enumerate(prompts)
        ]
        for stream in streams:
            stream.rest()
        return self.clock.full_decode_steps(len(prompts))

    def decode_beside_prompts(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, arriving: Sequence[Sequence[int]], pause_steps: int
    ) -> list[tuple[float, bool]]:
        """Generate for prompts of different adapters, while further prompts arrive one after the other.

        Args:
            prompts: of those that decode.
            new_tokens: for each of them.
            arriving: each generates one token; they stop arriving when those that decode end.
            pause_steps: steps between the end of one and the arrival of the next.

        Returns:
            (seconds, whether a chunk of a prompt ran) of every step that gave all of `prompts` a token.
        """
        count = len(prompts)
        streams = [self._submit(prompt, i, new_tokens) for i, prompt in enumerate(prompts)]
        for stream in streams:
            stream.first_token()
        self.clock.clear()
        for number, prompt in enumerate(arriving):
            self._submit(prompt, number % count, 1).rest()
            goal = self.clock.count + pause_steps
            deadline = time.monotonic() + EVENT_TIMEOUT_S
            while self.clock.count < goal and time.monotonic() < deadline and not _any_over(streams):
                time.sleep(_POLL_S)
            if _any_over(streams):
                break
        intervals = self.clock.intervals()
        for stream in streams:
            stream.rest()
        return [(seconds, step.tokens > step.requests) for seconds, step in intervals if step.requests >= count]

    def _submit(self, prompt: Sequence[int], adapter: int | None, new_tokens: int) -> _Stream:
        self._num_requests += 1
        stream = _Stream()
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        adaptation = None if adapter is None else self._served.adaptations[adapter]
        self._engine.submit(Request(f"bench-{self._num_requests}", list(prompt), params, adaptation, stream.take))
        return stream
