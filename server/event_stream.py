"""Engine events on their way from the step thread to a handler on the event loop.

`EventBridge.deliver_to(stream)` makes the `emit` of a request: called on the step thread, it hands events to the loop
with one `call_soon_threadsafe` for all that happen before the loop comes round, not one for each token. `EventStream`
is touched on the loop's thread only. Neither can grow with a slow reader: waiting deltas of a request are joined to
one, and that is bounded by the request's max_tokens.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from .engine.request import Delta, Event, Failed, Finished, TokenLogprob


class EventStream:
    """The events of one request, in order, with waiting deltas joined."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._terminal: Finished | Failed | None = None
        self._first_token: float | None = None
        self._num_tokens = 0
        self._news = asyncio.Event()

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
        self._news.set()

    def summary(self, arrival: float) -> dict[str, object]:
        """What a log line says about a request.

        Args:
            arrival: `time.monotonic()` second of its arrival.
        """
        fields: dict[str, object] = {"output_tokens": self._num_tokens}
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
            await self._news.wait()
            self._news.clear()
            # Read before yielding: while the consumer writes, more can come, and belongs to the next round.
            terminal = self._terminal
            if self._token_ids or self._text:
                delta = Delta("".join(self._text), tuple(self._token_ids), tuple(self._logprobs))
                self._text, self._token_ids, self._logprobs = [], [], []
                yield delta
            if isinstance(terminal, Failed):
                raise terminal.error
            if terminal is not None:
                yield terminal
                return


class EventBridge:
    """Carries the events of all requests from the step thread to the loop.

    Args:
        loop: the loop whose thread owns the streams.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._arrived: deque[tuple[EventStream, Event]] = deque()
        self._scheduled = False

    def deliver_to(self, stream: EventStream) -> Callable[[Event], None]:
        """The `emit` of a request: call it on the step thread."""

        def emit(event: Event) -> None:
            self._arrived.append((stream, event))
            if not self._scheduled:
                self._scheduled = True
                self._loop.call_soon_threadsafe(self._deliver)

        return emit

    def _deliver(self) -> None:
        # NOTE: first the flag, then the events: one that is appended in between schedules a call that finds it gone,
        # which is harmless; the other way round it could be left lying.
        self._scheduled = False
        while self._arrived:
            stream, event = self._arrived.popleft()
            stream.push(event)
