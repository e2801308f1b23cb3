"""Plays a trace to a server in this process, and finds out where its adapters were and what waited for them."""

import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from local_server import listen
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.info import Tier
from lorikeet.server.app import App
from lorikeet.server.engine.request import Delta, Event, Failed, Request
from lorikeet.server.engine.sampling_params import SamplingParams
from synthetic_trace import TraceRequest

REPLAY_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Replay:
    """One run of one trace.

    Attributes:
        wall_s: from the first submission to the last token.
        stalled_s: of these, seconds in which no request was running although some were in the engine: each of them
            waited for its adapter to come in.
        num_requests, output_tokens: done.
        ttft_s: of each request, from its arrival.
        found: tier -> requests that found their adapter there when they arrived.
        reads_s: seconds of each adapter read from disk meanwhile.
        evictions: tier -> adapters that had to leave it.
        step_requests, step_adapters: means over the steps.
        num_steps: in all.
        full_steps: those in which as many requests ran as may: no adapter that was not there kept anyone out.
        full_s, full_tokens: seconds and output tokens of these.
    """

    wall_s: float
    stalled_s: float
    num_requests: int
    output_tokens: int
    ttft_s: list[float]
    found: dict[str, int]
    reads_s: list[float]
    evictions: dict[str, int]
    step_requests: float
    step_adapters: float
    num_steps: int
    full_steps: int
    full_s: float
    full_tokens: int

    @property
    def requests_per_s(self) -> float:
        """Over the whole run."""
        return self.num_requests / self.wall_s

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second over the whole run."""
        return self.output_tokens / self.wall_s

    @property
    def tokens_per_running_s(self) -> float:
        """Output tokens a second, without the time in which everything waited for adapters."""
        return self.output_tokens / (self.wall_s - self.stalled_s)

    @property
    def tokens_per_full_s(self) -> float:
        """Output tokens a second of full steps; 0: there was none."""
        return self.full_tokens / self.full_s if self.full_steps else 0.0

    def ttft_percentile_s(self, percent: float) -> float:
        """Of the times to the first token."""
        return float(np.percentile(self.ttft_s, percent))


@dataclass(slots=True)
class _Step:
    """One step of the engine.

    Attributes:
        begin, end: `time.monotonic()` seconds.
        num_tokens, num_requests, num_adapters: in it.
        num_output: tokens that it sampled.
        num_ended: requests that ended with it.
    """

    begin: float
    end: float
    num_tokens: int
    num_requests: int
    num_adapters: int
    num_output: int = 0
    num_ended: int = 0


@dataclass(slots=True)
class _Heard:
    """What the observers were told during one run."""

    steps: list[_Step] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    reads_s: list[float] = field(default_factory=list)
    evictions: "Counter[str]" = field(default_factory=Counter)


class TraceReplayer:
    """Plays traces to one server, one after the other.

    Args:
        server: started, with all adapters of the traces loaded; does nothing else.
        adapter_ids: by number.
        max_running: requests in a step at most.
    """

    def __init__(self, server: App, adapter_ids: Sequence[str], max_running: int) -> None:
        self._server = server
        self._adapter_ids = adapter_ids
        self._max_running = max_running
        self._heard = _Heard()
        self._runs = 0
        listen(server.metrics, "on_step", self._on_step)
        listen(server.metrics, "on_first_token", self._on_first_token)
        listen(server.metrics, "on_token", self._on_token)
        listen(server.metrics, "on_finished", self._on_finished)
        listen(server.metrics, "on_load", self._on_load)
        listen(server.metrics, "on_evict", self._on_evict)

    def play(self, trace: Sequence[TraceRequest], *, seed: int, in_flight: int | None) -> Replay:
        """Run a trace to its end.

        Args:
            trace: in order of arrival.
            seed: of the prompts, which must differ from run to run or the prefix cache would help.
            in_flight: hand in the next request when fewer than so many have not ended, whatever the arrival times say;
                None: hand it in when it arrives.

        Raises:
            RuntimeError: a request failed, or the run took too long.
        """
        self._runs += 1
        self._heard = _Heard()
        vocab_size = self._server.base.model.config.vocab_size
        generator = torch.Generator().manual_seed(seed)
        prompts = [
            # The middle of the vocabulary: special tokens lie at one of its ends.
            torch.randint(vocab_size // 4, vocab_size // 2, (r.prompt_tokens,), generator=generator).tolist()
            for r in trace
        ]
        calls: list[_Call] = []
        found: Counter[str] = Counter()
        free = threading.Semaphore(in_flight if in_flight is not None else len(trace))
        begin = time.monotonic()
        for number, (request, prompt) in enumerate(zip(trace, prompts, strict=True)):
            arrival = time.monotonic()
            if in_flight is None:
                arrival = begin + request.arrival_s
                time.sleep(max(0.0, arrival - time.monotonic()))
            elif not free.acquire(timeout=REPLAY_TIMEOUT_S):
                raise RuntimeError("the trace did not go on")
            else:
                arrival = time.monotonic()
            adapter_id = self._adapter_ids[request.adapter]
            found[self._server.manager.get(adapter_id).tier] += 1
            calls.append(
                _Call(self._server, f"trace-{self._runs}-{number}", adapter_id, prompt, request, arrival, free)
            )
        for call in calls:
            call.wait()
        end = max(call.ended_at for call in calls)
        return self._replay(begin, end, calls, found)

    def _replay(self, begin: float, end: float, calls: "Sequence[_Call]", found: "Counter[str]") -> Replay:
        heard, self._heard = self._heard, _Heard()
        steps = heard.steps
        busy = _union([(call.arrival, call.ended_at) for call in calls])
        # With the pause before it, in which the tokens of the step before were handed out.
        full = [(b.end - a.end, b.num_output) for a, b in pairwise(steps) if b.num_requests == self._max_running]
        return Replay(
            wall_s=end - begin,
            stalled_s=_stalled(steps, busy),
            num_requests=len(calls),
            output_tokens=sum(call.num_tokens for call in calls),
            ttft_s=heard.ttft_s,
            found={tier.value: found[tier] for tier in Tier},
            reads_s=heard.reads_s,
            evictions={tier.value: heard.evictions[tier] for tier in (Tier.HOST, Tier.DEVICE)},
            step_requests=statistics.fmean(s.num_requests for s in steps),
            step_adapters=statistics.fmean(s.num_adapters for s in steps),
            num_steps=len(steps),
            full_steps=len(full),
            full_s=sum(seconds for seconds, _ in full),
            full_tokens=sum(tokens for _, tokens in full),
        )

    def _on_step(self, seconds: float, num_tokens: int, num_requests: int, num_adapters: int) -> None:
        now = time.monotonic()
        self._heard.steps.append(_Step(now - seconds, now, num_tokens, num_requests, num_adapters))

    def _on_first_token(self, _: str, ttft_s: float) -> None:
        self._heard.ttft_s.append(ttft_s)
        self._heard.steps[-1].num_output += 1

    def _on_token(self, *_: object) -> None:
        self._heard.steps[-1].num_output += 1

    def _on_finished(self, *_: object) -> None:
        if self._heard.steps:
            self._heard.steps[-1].num_ended += 1

    def _on_load(self, _: str, outcome: str, seconds: float) -> None:
        if outcome == "ok":
            self._heard.reads_s.append(seconds)

    def _on_evict(self, tier: str) -> None:
        self._heard.evictions[str(tier)] += 1


class _Call:
    """One request, from its submission to its end."""

    def __init__(
        self,
        server: App,
        name: str,
        adapter_id: str,
        prompt: list[int],
        request: TraceRequest,
        arrival: float,
        free: threading.Semaphore,
    ) -> None:
        self.arrival = arrival
        self.num_tokens = 0
        self.ended_at = 0.0
        self._error = ""
        self._free = free
        self._ended = threading.Event()
        params = SamplingParams(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True)
        adaptation = Adaptation.single(server.manager.resolve(adapter_id))
        server.engine.submit(Request(name, prompt, params, adaptation, self._take, arrival=arrival))

    def wait(self) -> None:
        """Wait for its end."""
        if not self._ended.wait(REPLAY_TIMEOUT_S):
            raise RuntimeError("a request did not end in time")
        if self._error:
            raise RuntimeError(f"a request failed: {self._error}")

    def _take(self, event: Event) -> None:
        if isinstance(event, Delta):
            self.num_tokens += len(event.token_ids)
            return
        self._error = event.error.message if isinstance(event, Failed) else ""
        self.ended_at = time.monotonic()
        self._free.release()
        self._ended.set()


def _stalled(steps: Sequence[_Step], busy: Sequence[tuple[float, float]]) -> float:
    """Seconds between steps in which nothing was running and something was in the engine.

    Whatever runs is in the next step. So if all requests of a step ended with it, nothing is running until the next one
    begins, and what is in the engine then waits: for adapters, since with nothing running all KV blocks are free.
    """
    pauses = [(busy[0][0], steps[0].begin)] if steps and busy else []
    pauses += [(a.end, b.begin) for a, b in pairwise(steps) if a.num_ended >= a.num_requests]
    return sum(max(0.0, min(b, end) - max(a, begin)) for a, b in pauses for begin, end in busy)


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that touch or overlap become one."""
    union: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((begin, end))
    return union
