"""The step loop: what happens in a round, and how a request ends. Everything here runs on the step thread.

One round (`step`): read the inbox, end what was aborted or ran out of time, let the adapters do their work between
steps, schedule, run the model, sample, deliver. A step waits for the device once: for the copy of its sampled tokens.
What a step delivers on CUDA is handed over while the next one runs there (`outbox.py`).

Every accepted request ends in `_end` or, when the loop itself fails, in `die`, and nowhere else: there its blocks, its
slot and its adapter versions are given back and its one terminal event is emitted.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import structlog
import torch
from torch import Tensor

from ...adapters.errors import AdapterUnloadedError, ServingError
from ...adapters.version import AdapterVersion
from ..errors import CancelledError, DeadlineError, DrainingError, EngineDeadError
from .adapter_port import AdapterPort
from .deadlines import Deadlines
from .errors import DeviceMemoryError, NonFiniteLogitsError
from .inbox import Inbox
from .outbox import Outbox
from .output import Output, TextStreamFactory
from .request import Delta, Failed, Finished, FinishReason, Phase, Request, TokenLogprob
from .sampler import SampledToken, Sampler
from .scheduler import Plan, ScheduledStep, Scheduler
from .stats import EngineObserver, EngineState, EngineStats, SilentObserver

log = structlog.stdlib.get_logger(__name__)

_STATS_EVERY_S = 0.1
_UNOBSERVED = SilentObserver()
_RETRY_EVERY_S = 1.0  # with requests that wait for adapters and nothing to run; `on_ready` comes before, as a rule


class ModelRunner(Protocol):
    """Runs a step on the device."""

    def forward(self, step: ScheduledStep) -> Tensor:
        """Logits of every request of the step that samples, in step order: float32 [n, vocab]."""
        ...

    def scores(self) -> dict[Request, list[TokenLogprob] | None]:
        """Of the step that was just run: what its scored rows give; None where logits were not finite."""
        ...


class StepLoop:
    """The rounds of one engine; the arguments are those of `Engine`, and its inbox.

    Attributes:
        stats: replaced as a whole, so that any thread may read it.
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
        inbox: Inbox,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = EngineStats(EngineState.NEW, 0, 0, scheduler.blocks.stats())
        self._runner = runner
        self._scheduler = scheduler
        self._sampler = sampler
        self._make_stream = make_stream
        self._adapters = adapters
        self._observer = observer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_tokens = min(max_context, scheduler.max_tokens)
        self._inbox = inbox
        self._clock = clock
        self._deadlines = Deadlines()
        self._outbox = Outbox()
        self._outputs: dict[Request, Output] = {}  # requests that the scheduler knows
        self._num_steps = 0
        self._num_preemptions = 0
        self._stats_at = 0.0
        self._is_device_waiting = False  # between two steps the device has nothing to do, but the host

    def step(self) -> bool:
        """One round; returns whether there is more to do at once."""
        now = self._clock()
        self._read_inbox()
        self._fail_unreachable()
        for request in self._deadlines.expired(now):
            self._fail(request, DeadlineError("The deadline passed before the request ended."))
        if self._inbox.drain_deadline is not None and now >= self._inbox.drain_deadline:
            self._fail_all()
        self._adapters.step_work()
        plan = self._scheduler.schedule(now)
        self._report(plan, now)
        is_idle = not plan.step.requests
        if is_idle:
            self._outbox.release()
            self._fail_unreachable()
        self._publish(now, force=is_idle)
        if is_idle:
            return self._scheduler.wants_another_pass
        self._execute(plan.step)
        return True

    def idle_s(self) -> float | None:
        """Seconds until something has to be done without anybody asking for it; None: never."""
        times = [self._deadlines.next()]
        if self._outputs:
            times.append(self._inbox.drain_deadline)
        waits = [at - self._clock() for at in times if at is not None]
        if self._scheduler.num_waiting:
            waits.append(_RETRY_EVERY_S)
        return max(0.0, min(waits)) if waits else None

    def finish(self) -> None:
        """The engine was stopped: end whatever is left."""
        self._outbox.release()
        self._read_inbox()
        self._fail_all()
        self._publish(self._clock(), force=True)

    def die(self) -> None:
        """The loop failed: nothing that it holds can be trusted, but nobody may wait for ever."""
        self._outbox.release()
        for request in self._inbox.live():
            if request in self._outputs:
                with _logged("blocks_not_freed", request):
                    self._scheduler.remove(request)
            with _logged("version_not_released", request):
                self._close(request, Failed(EngineDeadError("The server failed and is about to end.")))

    def _read_inbox(self) -> None:
        news = self._inbox.take()
        for request in news.submitted:
            self._outputs[request] = Output(request, self._make_stream, self._eos_token_ids, self._max_tokens)
            self._scheduler.add(request)
            self._deadlines.add(request)
        for request in news.aborted:
            self._fail(request, CancelledError("The client cancelled the request."))
        for version in news.dropped:
            self._scheduler.blocks.drop_adapter(version.digest)
            for request in [request for request in self._outputs if _needs(request, version)]:
                self._fail(request, _unloaded(version))
        if news.limits_changed:
            self._scheduler.refresh_limits()
        if news.adapter_ready:
            self._scheduler.adapter_ready()

    def _report(self, plan: Plan, now: float) -> None:
        """Tell the observer, and the requests that failed, what the scheduler did."""
        for request in plan.admitted:
            self._observer_of(request).on_admitted(request.adapter_id, now - request.arrival)
        for request in plan.preempted:
            self._num_preemptions += 1
            self._observer_of(request).on_preempted(request.adapter_id)
        for request, error in plan.failed:
            self._end(request, Failed(error))

    def _execute(self, step: ScheduledStep) -> None:
        """Run a planned step and deliver what it sampled."""
        started = self._clock()
        sampling = [item.request for item in step.requests if item.samples]
        sampled: list[SampledToken | None] | None = None
        scores: dict[Request, list[TokenLogprob] | None] = {}
        try:
            sampled = self._forward(step, sampling)
            if any(item.num_scored for item in step.requests):
                scores = self._runner.scores()
        except torch.OutOfMemoryError as error:
            log.error("out_of_device_memory", num_tokens=step.num_tokens, exc_info=error)
            sampled = None
        if sampled is None:
            # Not in the handler: what the error's traceback holds is the memory that was missing.
            self._shed(step)
            return
        self._scheduler.complete(step)
        now = self._clock()
        self._num_steps += 1
        self._scheduler.measured(step, now - started)
        adaptations = {item.request.slot: item.request.adapter for item in step.requests}
        num_adapters = len({version for each in adaptations.values() if each is not None for version in each.versions})
        self._observer.on_step(now - started, step.num_tokens, len(step.requests), num_adapters)
        if self._inbox.has_rates:
            self._inbox.spend(
                Counter(i for request in sampling if request.capture is None for i in request.adapter_ids)
            )
        if self._is_device_waiting:
            self._outbox.hold()
        for request, token in zip(sampling, sampled, strict=True):
            self._deliver(request, token, now)
        for item in step.requests:
            if item.request.scored is not None:
                self._deliver_scores(item.request, scores.get(item.request, []))

    def _forward(self, step: ScheduledStep, sampling: Sequence[Request]) -> list[SampledToken | None]:
        logits = self._runner.forward(step)
        self._is_device_waiting = _is_asynchronous(logits)
        self._outbox.release()
        if sampling:
            sampled = self._sampler.sample(logits, sampling)
            _capture(logits, sampling)
            return sampled
        if logits.is_cuda:
            # Nothing to copy, but a step ends when its work has: its time is measured, and no second one piles up.
            torch.cuda.current_stream(logits.device).synchronize()
        return []

    def _shed(self, step: ScheduledStep) -> None:
        """Fail one request of a step that did not fit into the device's memory: the youngest prompt, else the youngest.

        Nothing of the step was recorded: the others run it again.
        """
        prompts = [item.request for item in step.requests if item.num_tokens > 1 or not item.request.output_token_ids]
        request = max(prompts or [item.request for item in step.requests], key=lambda request: request.order)
        if prompts:
            message = "The device ran out of memory while this prompt was computed. Try a shorter one, or later."
        else:
            message = "The device ran out of memory while this request was computed. Try again later."
        self._fail(request, DeviceMemoryError(message))
        # Pieces that torch keeps for tensors of other sizes may be what is missing for the next try.
        torch.cuda.empty_cache()

    def _deliver(self, request: Request, sampled: SampledToken | None, now: float) -> None:
        if sampled is None:
            self._fail(request, NonFiniteLogitsError("The model's output for this request was not a finite number."))
            return
        delta, finished = self._outputs[request].add(sampled)
        adapter = request.adapter_id
        if request.first_token is None or request.last_token is None:
            request.first_token = now
            self._observer_of(request).on_first_token(adapter, now - request.arrival)
        else:
            self._observer_of(request).on_token(adapter, now - request.last_token)
        request.last_token = now
        if not self._outbox.put(request, delta):
            self._fail(request, _undelivered())
        elif finished is not None:
            self._end(request, finished)

    def _deliver_scores(self, request: Request, scores: list[TokenLogprob] | None) -> None:
        """Deliver what a step gives of a text; nothing, while what comes before the first token is computed."""
        assert request.scored is not None
        if scores is None:
            self._fail(request, NonFiniteLogitsError("The model's output for this text was not a finite number."))
            return
        delta = Delta("", tuple(score.token_id for score in scores), tuple(scores))
        request.scored.next += len(scores)
        if scores and not self._outbox.put(request, delta):
            self._fail(request, _undelivered())
        elif request.num_computed_tokens == request.num_tokens:
            prompt_tokens, cached_tokens = len(request.prompt_token_ids), request.num_cached_tokens
            self._end(request, Finished(FinishReason.SCORED, prompt_tokens, cached_tokens, 0))

    def _fail(self, request: Request, error: ServingError) -> None:
        """End a request with an error, unless it has ended."""
        if request.phase is not Phase.FINISHED:
            self._end(request, Failed(error))

    def _end(self, request: Request, event: Finished | Failed) -> None:
        self._scheduler.remove(request)
        del self._outputs[request]
        outcome = event.reason.value if isinstance(event, Finished) else event.error.reason.lower()
        self._observer_of(request).on_finished(
            request.adapter_id,
            outcome,
            len(request.prompt_token_ids),
            request.num_cached_tokens,
            len(request.output_token_ids),
            self._clock() - request.arrival,
        )
        self._close(request, event)

    def _close(self, request: Request, event: Finished | Failed) -> None:
        """What has to happen once whatever else goes wrong."""
        self._inbox.close(request)
        try:
            if request.adapter is not None:
                self._adapters.release(request.adapter)
        finally:
            self._outbox.put(request, event)

    def _observer_of(self, request: Request) -> EngineObserver:
        """Who hears of a request: of the server's own ones nobody, they are no client's."""
        return self._observer if request.capture is None else _UNOBSERVED

    def _fail_unreachable(self) -> None:
        for request in self._outbox.take_unreachable():
            self._fail(request, _undelivered())

    def _fail_all(self) -> None:
        for request in list(self._outputs):
            self._fail(request, DrainingError("The server shut down before the request could end."))

    def _publish(self, now: float, *, force: bool) -> None:
        """Refresh what other threads see."""
        num_waiting = self._scheduler.num_waiting
        self._inbox.set_num_waiting(num_waiting, self._scheduler.take_waiting_changes())
        if not force and now - self._stats_at < _STATS_EVERY_S:
            return
        self._stats_at = now
        self.stats = EngineStats(
            state=self._inbox.state,
            running=len(self._scheduler.running),
            waiting=num_waiting,
            blocks=self._scheduler.blocks.stats(),
            running_by_adapter=dict(Counter(i for request in self._scheduler.running for i in request.adapter_ids)),
            waiting_by_adapter=self._scheduler.count_waiting_by_adapter(),
            num_steps=self._num_steps,
            num_preemptions=self._num_preemptions,
        )


def _capture(logits: Tensor, sampling: Sequence[Request]) -> None:
    """Hand the logits of first tokens to those who asked for them, without the ids that their vocabulary does not have.

    Rows are as wide as the largest vocabulary of the step; what lies beyond a row's own is -inf.
    """
    for row, request in enumerate(sampling):
        if request.capture is not None and not request.output_token_ids:
            with _logged("logits_not_captured", request):
                captured = logits[row].to("cpu", torch.float32, copy=True)
                known = (captured != -torch.inf).nonzero()
                request.capture(captured[: int(known[-1]) + 1])


@contextlib.contextmanager
def _logged(event: str, request: Request) -> Iterator[None]:
    """Log an exception and go on."""
    try:
        yield
    except Exception:
        log.exception(event, request_id=request.request_id)


def _is_asynchronous(logits: Tensor) -> bool:
    """Whether the device that computes them works while the host goes on."""
    return logits.is_cuda


def _undelivered() -> CancelledError:
    return CancelledError("The output could not be delivered.")


def _needs(request: Request, version: AdapterVersion) -> bool:
    return request.adapter is not None and version in request.adapter.versions


def _unloaded(version: AdapterVersion) -> AdapterUnloadedError:
    message = f"The adapter {version.adapter_id!r} was unloaded or replaced before the request could end."
    return AdapterUnloadedError(message, {"adapter_id": version.adapter_id})
