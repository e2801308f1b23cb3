"""Engine events on their way from the step thread to a handler on the event loop.

`EventBridge.deliver_to(stream)` makes the `emit` of a request: called on the step thread, it hands events to the loop
with one `call_soon_threadsafe` for all that happen before the loop comes round, not one for each token. `EventStream`
is touched on the loop's thread only. Neither can grow with a slow reader: waiting deltas of a request are joined to
one, and that is bounded by the request's max_tokens.

Writing a message costs the loop's thread some 0.1 ms whatever is in it, most of it gRPC's own, and takes that from the
step thread, too, with which it shares the interpreter lock and maybe the core. So under load tokens are handed out less
often, several at a time: as often as keeps the loop's thread below SHARE of a core, and no later than MAX_PAUSE_S.
First tokens never wait.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

from .engine.request import Delta, Event, Failed, Finished, TokenLogprob

# Of a core that the loop's thread may take before tokens are joined.
SHARE: Final = 0.25
# How long a token may wait for that; below what a reader notices as halting.
MAX_PAUSE_S: Final = 0.2
# Shorter ones are not worth a timer.
_MIN_PAUSE_S: Final = 0.001


class EventStream:
    """The events of one request, in order, with waiting deltas joined.

    Args:
        is_scored: its tokens are given, and not generated.
    """

    def __init__(self, *, is_scored: bool = False) -> None:
        self._is_scored = is_scored
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._terminal: Finished | Failed | None = None
        self._first_token: float | None = None
        self._num_tokens = 0
        # Resolved by `push`; not an asyncio.Event, which takes three times as long, for every token.
        self._news: asyncio.Future[None] | None = None
        self._wants_deltas = True

    @property
    def ended(self) -> bool:
        """Whether the terminal event has arrived, taken or not."""
        return self._terminal is not None

    def push(self, event: Event) -> None:
        """Add an event."""
        assert self._terminal is None, "an event after the terminal one"
        if isinstance(event, Delta):
            self._text.append(event.text)
            self._token_ids.extend(event.token_ids)
            self._logprobs.extend(event.logprobs)
            self._num_tokens += len(event.token_ids)
            if self._first_token is None:
                self._first_token = time.monotonic()
        else:
            self._terminal = event
        if self._news is not None and not self._news.done() and (self._wants_deltas or self._terminal is not None):
            self._news.set_result(None)

    def summary(self, arrival: float) -> dict[str, object]:
        """What a log line says about a request.

        Args:
            arrival: `time.monotonic()` second of its arrival.
        """
        if self._is_scored:
            fields: dict[str, object] = {"scored_tokens": self._num_tokens}
        else:
            fields = {"output_tokens": self._num_tokens}
            if self._first_token is not None:
                fields["ttft_s"] = round(self._first_token - arrival, 6)
        if isinstance(self._terminal, Finished):
            fields |= {"finish_reason": self._terminal.reason.value, "cached_tokens": self._terminal.cached_tokens}
        return fields

    async def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        """Yield what has come since the last time, ending after `Finished`.

        Raises:
            ServingError: the request ended with `Failed`; output before it is yielded first.
        """
        while True:
            await self._wait()
            # Read before yielding: while the consumer writes, more can come, and belongs to the next round.
            terminal = self._terminal
            if self._token_ids or self._text:
                yield self._take()
            if isinstance(terminal, Failed):
                raise terminal.error
            if terminal is not None:
                yield terminal
                return

    async def whole(self) -> tuple[Delta, Finished]:
        """Wait for the end: all output at once. Costs nothing while tokens come.

        Raises:
            ServingError: the request ended with `Failed`.
        """
        self._wants_deltas = False
        while self._terminal is None:
            await self._wait()
        if isinstance(self._terminal, Failed):
            raise self._terminal.error
        return self._take(), self._terminal

    async def _wait(self) -> None:
        """Until there is something to take."""
        has_news = self._terminal is not None or (self._wants_deltas and (self._token_ids or self._text))
        if not has_news:
            self._news = asyncio.get_running_loop().create_future()
            await self._news

    def _take(self) -> Delta:
        """Everything that waits, as one."""
        delta = Delta("".join(self._text), tuple(self._token_ids), tuple(self._logprobs))
        self._text, self._token_ids, self._logprobs = [], [], []
        return delta


class EventBridge:
    """Carries the events of all requests from the step thread to the loop.

    Args:
        loop: the loop whose thread owns the streams.
        share: of a core that the loop's thread may take before tokens are joined.
        max_pause_s: longest time that tokens may wait for that.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, share: float = SHARE, max_pause_s: float = MAX_PAUSE_S
    ) -> None:
        self._loop = loop
        self._share = share
        self._max_pause_s = max_pause_s
        self._arrived: deque[tuple[EventStream, Event]] = deque()
        self._scheduled = False
        # The first event of each request goes this way.
        self._first: deque[tuple[EventStream, Event]] = deque()
        self._first_scheduled = False
        self._handed_out_at = 0.0  # `time.monotonic()`
        self._spent_by_then_s = 0.0  # `time.thread_time()` of the loop's thread

    def deliver_to(self, stream: EventStream) -> Callable[[Event], None]:
        """The `emit` of a request: call it on the step thread."""
        has_begun = False

        def emit(event: Event) -> None:
            nonlocal has_begun
            if has_begun:
                self._arrived.append((stream, event))
                if not self._scheduled:
                    self._scheduled = True
                    self._loop.call_soon_threadsafe(self._deliver)
                return
            has_begun = True
            self._first.append((stream, event))
            if not self._first_scheduled:
                self._first_scheduled = True
                self._loop.call_soon_threadsafe(self._deliver_first)

        return emit

    def _deliver(self) -> None:
        """Hand everything out, now or when the loop's thread has had its share."""
        pause_s = self._pause_s()
        if pause_s < _MIN_PAUSE_S:
            self._hand_out()
        else:
            self._loop.call_later(pause_s, self._hand_out)

    def _pause_s(self) -> float:
        """How long after now the next hand-out is due, by what the loop's thread has spent since the last one."""
        spent_s = time.thread_time() - self._spent_by_then_s
        return min(spent_s / self._share + self._handed_out_at - time.monotonic(), self._max_pause_s)

    def _hand_out(self) -> None:
        self._handed_out_at, self._spent_by_then_s = time.monotonic(), time.thread_time()
        # NOTE: first the flag, then the events: one that is appended in between schedules a call that finds it gone,
        # which is harmless; the other way round it could be left lying.
        self._scheduled = False
        # Events that come from here on wait: what is among the first ones belongs before them.
        number = len(self._arrived)
        self._deliver_first()
        for _ in range(number):
            stream, event = self._arrived.popleft()
            stream.push(event)

    def _deliver_first(self) -> None:
        self._first_scheduled = False
        while self._first:
            stream, event = self._first.popleft()
            stream.push(event)
