"""Requests that decode side by side, and the time between the tokens of each."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.server.app import App
from lorikeet.server.engine.request import Delta, Event, Failed, Finished, Request
from lorikeet.server.engine.sampling_params import SamplingParams
from measurement import Spread

START_TIMEOUT_S = 600.0
TAIL_TIMEOUT_S = 120.0
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen of all streams for a while.

    Attributes:
        seconds: its length.
        gaps_s: seconds from one token of a stream to its next, of every token that came in the window.
    """

    seconds: float
    gaps_s: list[float]

    def percentile_ms(self, percent: float) -> float:
        """Of the gaps, in milliseconds."""
        return 1000 * float(np.percentile(self.gaps_s, percent))

    @property
    def tokens_per_s(self) -> float:
        """Of all streams together."""
        return len(self.gaps_s) / self.seconds


def pooled_ratio(one: Sequence[Window], other: Sequence[Window], percent: float) -> Spread:
    """That percentile of all gaps of `one` together, by that of `other`; a single number.

    A window has few steps where steps are slow: all of them together have a p99 that is not just the longest.
    """
    both = [Window(0.0, [gap for w in windows for gap in w.gaps_s]).percentile_ms(percent) for windows in (one, other)]
    return Spread.of([both[0] / both[1]])


class _Stream:
    """One request, from its submission until it is aborted."""

    def __init__(self, server: App, name: str, prompt: Sequence[int], adapter_id: str) -> None:
        self.times: list[float] = []  # when each token was handed out
        self.started = threading.Event()
        self.ended = threading.Event()
        self.is_closing = False
        self.trouble = ""
        self._name = name
        self._server = server
        params = SamplingParams(temperature=0.0, max_tokens=server.max_context - len(prompt), ignore_eos=True)
        adaptation = Adaptation.single(server.manager.resolve(adapter_id)) if adapter_id else None
        server.engine.submit(Request(name, list(prompt), params, adaptation, self._take))

    def close(self) -> None:
        """Abort it and wait for its end."""
        self.is_closing = True
        self._server.engine.abort(self._name)
        self.ended.wait(START_TIMEOUT_S)

    def gaps(self, begin: float, end: float) -> list[float]:
        """The gaps behind the tokens of [begin, end): one that reaches beyond the end counts, too."""
        return [after - before for before, after in pairwise(self.times) if begin <= before < end]

    def _take(self, event: Event) -> None:
        match event:
            case Delta():
                self.times.append(time.perf_counter())
                self.started.set()
                return
            case Finished():
                self.trouble = "it came to the end of the context; measure for fewer seconds"
            case Failed(error=error):
                self.trouble = "" if self.is_closing else error.message
        self.started.set()
        self.ended.set()


def watch_streams(
    server: App,
    prompts: Sequence[Sequence[int]],
    adapter_ids: Sequence[str],
    seconds: float,
    meanwhile: Callable[[], Any] | None = None,
) -> Window:
    """Start one stream for each prompt and watch them once all have their first token.

    Args:
        server: has nothing else to do.
        prompts: token ids; never given before, or a cached prefix would make contexts differ.
        adapter_ids: of each prompt; empty: the base.
        seconds: length of the window.
        meanwhile: called when the window begins; returns at once.

    Raises:
        RuntimeError: a stream ended, or did not start or go on in time.
    """
    turn = time.monotonic_ns()
    streams = [
        _Stream(server, f"stream-{turn}-{i}", prompt, adapter_id)
        for i, (prompt, adapter_id) in enumerate(zip(prompts, adapter_ids, strict=True))
    ]
    try:
        for stream in streams:
            if not stream.started.wait(START_TIMEOUT_S):
                raise RuntimeError("a stream had no token in time")
        begin = time.perf_counter()
        if meanwhile is not None:
            meanwhile()
        time.sleep(max(0.0, begin + seconds - time.perf_counter()))
        end = time.perf_counter()
        # A token that is late when the window ends must not be left out: it may be the latest of all.
        patience = end + TAIL_TIMEOUT_S
        while any(not s.ended.is_set() and s.times[-1] < end for s in streams) and time.perf_counter() < patience:
            time.sleep(_POLL_S)
        trouble = next((s.trouble or "it stopped" for s in streams if s.trouble or s.times[-1] < end), "")
        if trouble:
            raise RuntimeError(f"a stream ended while it was watched: {trouble}")
    finally:
        for stream in streams:
            stream.close()
    return Window(end - begin, [gap for stream in streams for gap in stream.gaps(begin, end)])
