"""The engine as other threads see it: hand in a request, abort it, read the numbers, shut down. Owns the step thread.

With nothing to run the thread sleeps until the inbox, an adapter or a deadline wakes it. If a round fails, every
accepted request ends with EngineDeadError, `on_dead` is called, and nothing is accepted any more.
"""

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterable

import structlog

from ...adapters.version import AdapterVersion
from ..errors import BadRequestError, PromptTooLongError
from .adapter_port import AdapterPort
from .inbox import Inbox
from .output import TextStreamFactory
from .request import Request
from .sampler import Sampler
from .scheduler import Scheduler
from .stats import EngineObserver, EngineState, EngineStats
from .step_loop import ModelRunner, StepLoop

log = structlog.stdlib.get_logger(__name__)

_DRAIN_GRACE_S = 5.0  # for the step under way when the drain deadline comes
# A step gives the interpreter lock away at every operator, thousands of times, and gets it back from a thread that runs
# plain Python only after this time. With Python's default of 5 ms one such thread, of whatever priority, stops the
# engine: 8 streams on the demo base got no token in 8 s, and with this they do not notice it (2 cores of an AMD EPYC,
# Zen 3; 2026-11-22).
SWITCH_INTERVAL_S = 0.0005


class Engine:
    """Runs requests. Every method may be called on any thread, but `step`.

    Args:
        runner: the model.
        scheduler: with its blocks, used by nobody else; its `limits_of` holds for what is handed in, too.
        sampler: chooses tokens.
        make_stream: makes a request's detokenizer (`DetokenizerFactory`).
        adapters: `on_ready` is set here.
        observer: hears what happens.
        eos_token_ids: the model's ends of sequence.
        max_context: tokens of prompt and output at most.
        max_waiting: requests that may wait; more are refused.
        clock: seconds; the one that made `Request.arrival` and `Request.deadline`.

    Attributes:
        on_dead: called once, on the step thread, when the loop failed; every request has ended by then.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        sampler: Sampler,
        make_stream: TextStreamFactory,
        adapters: AdapterPort,
        observer: EngineObserver,
        eos_token_ids: Iterable[int],
        max_context: int,
        max_waiting: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_dead: Callable[[BaseException], None] = lambda _: None
        self._scheduler = scheduler
        self._max_context = max_context
        self._clock = clock
        self._inbox = Inbox(max_waiting, scheduler.limits_of, clock)
        self._loop = StepLoop(
            runner, scheduler, sampler, make_stream, adapters, observer, eos_token_ids, max_context, self._inbox, clock
        )
        self._thread: threading.Thread | None = None
        adapters.on_ready = self._inbox.adapter_ready

    def start(self) -> None:
        """Start the step thread; once."""
        if self._thread is not None:
            raise RuntimeError("the engine was started before")
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._inbox.enter(EngineState.SERVING)
        self._thread = threading.Thread(target=self._run, name="lorikeet-step", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Accept a request: from here on it ends in exactly one terminal event, and its version is released.

        Raises:
            ServingError: it is not accepted, and the caller keeps its version: BadRequestError (no prompt, or the id is
                taken), PromptTooLongError, QueueFullError, AdapterQueueFullError, AdapterRateError, DrainingError,
                EngineDeadError.
        """
        length, longest = len(request.prompt_token_ids), self._max_context - 1
        if not length:
            raise BadRequestError("The prompt has no tokens; at least one is needed.")
        if length > longest:
            raise PromptTooLongError(
                f"The prompt has {length} tokens; at most {longest} and one token of output fit into the context.",
                {"prompt_tokens": str(length), "max_prompt_tokens": str(longest)},
            )
        self._scheduler.check_fits(request)
        self._inbox.submit(request)

    def abort(self, request_id: str) -> None:
        """End a request with CancelledError, soon; nothing happens if it has ended or never was."""
        self._inbox.abort(request_id)

    def on_version_dropped(self, version: AdapterVersion) -> None:
        """A version is gone: what runs or waits for it fails with AdapterUnloadedError, its cached KV is forgotten.

        For versions dropped by force; may be called for every version that goes, and more than once.
        """
        self._inbox.drop(version)

    def limits_changed(self) -> None:
        """The scheduler's `limits_of` returns something else from now on."""
        self._inbox.limits_changed()

    def refuse_more(self) -> None:
        """Accept nothing more, from now on; what is in flight goes on."""
        self._inbox.enter(EngineState.DRAINING)

    def drain(self, deadline_s: float) -> None:
        """Accept nothing more and return when everything in flight has ended.

        What has not ended after `deadline_s` seconds fails with DrainingError. Blocks; not for the step thread.
        """
        self._inbox.drain_deadline = self._clock() + deadline_s
        self.refuse_more()
        self._inbox.wait_until_quiet(deadline_s + _DRAIN_GRACE_S)

    def stop(self) -> None:
        """End the step thread after the step under way; what is in flight fails with DrainingError. Blocks."""
        self._inbox.request_stop()
        if self._thread is None:
            self._end()
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def stats(self) -> EngineStats:
        """A snapshot; costs nothing."""
        return dataclasses.replace(self._loop.stats, state=self._inbox.state)

    def is_running(self) -> bool:
        """Whether requests run now; may be 0.1 s late to notice the first."""
        return self._loop.stats.running > 0

    def step(self) -> bool:
        """One round, returns whether there is more to do at once. What the thread repeats; for tests that have none."""
        return self._loop.step()

    def _run(self) -> None:
        try:
            while not self._inbox.is_stopping:
                if not self.step():
                    self._inbox.wait(self._loop.idle_s())
            self._end()
        except BaseException as error:
            self._die(error)

    def _end(self) -> None:
        self._loop.finish()
        self._inbox.enter(EngineState.STOPPED)

    def _die(self, error: BaseException) -> None:
        log.critical("engine_died", exc_info=error)
        self._inbox.enter(EngineState.DEAD)
        self._loop.die()
        try:
            self.on_dead(error)
        except Exception:
            log.exception("on_dead_failed")
