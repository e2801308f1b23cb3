"""Where other threads and the step thread meet: what was accepted, what was asked for, and the engine's state.

Caps on what may wait and on tokens a minute are held here, when a request is handed in. The server's own requests
(those with `capture`) are no client's and pass them.

Every method may be called on any thread and holds the lock briefly; those that the step thread alone calls say so.
Imports no torch.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...adapters.version import AdapterVersion
from ..errors import AdapterQueueFullError, BadRequestError, DrainingError, EngineDeadError, QueueFullError
from .limits import LimitsOf, TokenRates, unlimited
from .request import Request
from .stats import EngineState

ENDED = (EngineState.STOPPED, EngineState.DEAD)


@dataclass(slots=True)
class News:
    """What arrived since the last `Inbox.take`; to be handled in this order."""

    submitted: list[Request] = field(default_factory=list)
    aborted: list[Request] = field(default_factory=list)
    dropped: list[AdapterVersion] = field(default_factory=list)
    adapter_ready: bool = False
    limits_changed: bool = False


class Inbox:
    """Requests that were accepted and have not ended, and messages for the step thread.

    Args:
        max_waiting: requests that may wait, at least 1; the next one is refused.
        limits_of: caps by adapter id.
        clock: seconds.
    """

    def __init__(
        self, max_waiting: int, limits_of: LimitsOf = unlimited, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if max_waiting < 1:
            raise ValueError(f"max_waiting ({max_waiting}) must be 1 or more")
        self._max_waiting = max_waiting
        self._limits_of = limits_of
        self._clock = clock
        self._num_waiting = 0
        self._waiting: Counter[str] = Counter()  # by adapter id
        self._submitted: Counter[str] = Counter()  # by adapter id, since the last `take`
        self._rates = TokenRates()
        self._live: dict[str, Request] = {}
        self._news = News()
        self._has_news = False
        self._is_quiet = True  # nothing is live and the last terminal event was delivered
        self._state = EngineState.NEW
        self._is_stopping = False
        self._changed = threading.Condition()
        self.drain_deadline: float | None = None

    @property
    def state(self) -> EngineState:
        """The engine's state."""
        return self._state

    @property
    def is_stopping(self) -> bool:
        """Whether the step thread shall end."""
        return self._is_stopping

    @property
    def is_empty(self) -> bool:
        """Whether no accepted request is left."""
        return not self._live

    def submit(self, request: Request) -> None:
        """Accept a request or refuse it.

        Raises:
            EngineDeadError, DrainingError, BadRequestError (the id is taken), QueueFullError, AdapterQueueFullError,
                AdapterRateError: it is not accepted.
        """
        with self._changed:
            if self._state is EngineState.DEAD:
                raise EngineDeadError("The server has failed and is about to end.")
            if self._is_stopping or self._state not in (EngineState.NEW, EngineState.SERVING):
                raise DrainingError("The server is shutting down and accepts no new requests.")
            if request.request_id in self._live:
                raise BadRequestError(f"A request with the id {request.request_id!r} is being answered.")
            if self._num_waiting >= self._max_waiting:
                raise QueueFullError(
                    f"{self._num_waiting} requests are waiting already, which is this server's limit. Try again later.",
                    {"max_waiting": str(self._max_waiting)},
                )
            if request.capture is None:
                self._accept_within_limits(request)
            self._num_waiting += 1
            self._waiting.update(request.adapter_ids)
            self._submitted.update(request.adapter_ids)
            self._live[request.request_id] = request
            self._news.submitted.append(request)
            self._is_quiet = False
            self._notify()

    def abort(self, request_id: str) -> None:
        """Ask for the end of a request, if it has not ended."""
        with self._changed:
            request = self._live.get(request_id)
            if request is not None:
                self._news.aborted.append(request)
                self._notify()

    def drop(self, version: AdapterVersion) -> None:
        """Tell that an adapter version is gone."""
        with self._changed:
            self._news.dropped.append(version)
            self._notify()

    def adapter_ready(self) -> None:
        """Tell that some adapter may be on the device now."""
        with self._changed:
            self._news.adapter_ready = True
            self._notify()

    def limits_changed(self) -> None:
        """Tell that `limits_of` returns something else now."""
        with self._changed:
            self._news.limits_changed = True
            self._notify()

    def take(self) -> News:
        """Everything new. Step thread."""
        with self._changed:
            news, self._news = self._news, News()
            self._submitted.clear()
            self._has_news = False
            return news

    def set_num_waiting(self, num_scheduled: int, changed: Mapping[str, int]) -> None:
        """Correct the counts by what waits in the scheduler. Step thread.

        Args:
            num_scheduled: all of them.
            changed: those of each adapter where that is another number than the last time.
        """
        with self._changed:
            self._num_waiting = num_scheduled + len(self._news.submitted)
            for adapter_id, num_waiting in changed.items():
                self._waiting[adapter_id] = num_waiting + self._submitted[adapter_id]
                if not self._waiting[adapter_id]:
                    del self._waiting[adapter_id]

    @property
    def has_rates(self) -> bool:
        """Whether some adapter's tokens are counted now, so that `spend` means something."""
        return len(self._rates) > 0

    def spend(self, generated: Mapping[str, int]) -> None:
        """Count generated tokens, by adapter id, against the adapters' tokens a minute. Step thread.

        Those of several adapters that answered together count for each of them.
        """
        with self._changed:
            self._rates.spend(generated, self._clock())

    def close(self, request: Request) -> None:
        """A request ends: its terminal event is about to be delivered. Step thread."""
        with self._changed:
            del self._live[request.request_id]

    def live(self) -> list[Request]:
        """Every accepted request that has not ended."""
        with self._changed:
            return list(self._live.values())

    def wait(self, timeout_s: float | None) -> None:
        """Sleep until there is news, at most `timeout_s` (None: for ever). Step thread, with nothing left to do."""
        with self._changed:
            if not self._live:
                self._is_quiet = True
                self._changed.notify_all()
            if not self._has_news:
                self._changed.wait(timeout_s)

    def enter(self, state: EngineState) -> None:
        """Change the state, unless that were a way back."""
        with self._changed:
            states = list(EngineState)
            if states.index(state) > states.index(self._state):
                self._state = state
            self._notify()

    def request_stop(self) -> None:
        """Make the step thread end after the step under way."""
        with self._changed:
            self._is_stopping = True
            self._notify()

    def wait_until_quiet(self, timeout_s: float) -> None:
        """Wait until nothing is live and everything was delivered, or the engine ended, at most `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_quiet or self._state in ENDED, timeout_s)

    def _accept_within_limits(self, request: Request) -> None:
        """Refuse a request that is over a limit of any of its adapters, else count its prompt for each of them."""
        now = self._clock()
        rates: dict[str, int] = {}
        for adapter_id in request.adapter_ids:
            limits = self._limits_of(adapter_id)
            if limits.max_waiting is not None and self._waiting[adapter_id] >= limits.max_waiting:
                whose = f"Adapter {adapter_id!r}" if adapter_id else "The base model"
                raise AdapterQueueFullError(
                    f"{whose} has as many requests waiting as may wait ({limits.max_waiting}). Try again later.",
                    {"adapter_id": adapter_id, "max_waiting": str(limits.max_waiting)},
                )
            if limits.tokens_per_minute is not None:
                self._rates.check(adapter_id, limits.tokens_per_minute, now)
                rates[adapter_id] = limits.tokens_per_minute
        for adapter_id, per_minute in rates.items():  # nothing is used up by a request that is refused
            self._rates.accept(adapter_id, per_minute, len(request.prompt_token_ids), now)

    def _notify(self) -> None:
        self._has_news = True
        self._changed.notify_all()
