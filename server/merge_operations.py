"""The merges that a server was asked for: one runs, others wait, ended ones are remembered for a while.

Everything here is on the event loop's thread. What runs a merge is handed in (`merge_process.py`).
"""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

import structlog

from ..adapters.errors import Code, ServingError
from ..adapters.merge.errors import MergeCancelledError, MergeOutputExistsError
from .errors import DrainingError, MergeQueueFullError, OperationNotDoneError, OperationNotFoundError
from .merge_command import MergeCommand

# Of those that have ended.
MAX_KEPT: Final = 100
KEPT_S: Final = 24 * 3600.0

log = structlog.stdlib.get_logger(__name__)


class MergeState(StrEnum):
    """Whether a merge waits, runs or has ended."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED: Final = frozenset({MergeState.SUCCEEDED, MergeState.FAILED, MergeState.CANCELLED})


@dataclass(frozen=True, slots=True)
class MergedVersion:
    """A version in a merge, and what its effect is multiplied by."""

    adapter_id: str
    digest: str
    weight: float


@dataclass(slots=True, eq=False)
class MergeOperation:
    """One merge.

    Attributes:
        number: in the order in which they were asked for.
        name: what clients call it.
        members: what is merged.
        names: of adapters and aliases that a client must be allowed to manage to know of it.
        command: for its process; None once it has ended.
        request_id: of the call that asked for it.
        state, stage, done, total, unit: how far it is; see MergeProgress.
        created, started, ended: Unix seconds; 0: not yet.
        report: what it answered.
        error: why it did not.
        cancelled: set when it shall end.
        over: set when it has ended.
        observe: told which share of the stage is done.
    """

    number: int
    name: str
    output: str
    members: tuple[MergedVersion, ...]
    names: frozenset[str]
    command: MergeCommand | None
    request_id: str
    state: MergeState = MergeState.QUEUED
    stage: str = "Waiting"
    done: int = 0
    total: int = 0
    unit: str = ""
    created: float = field(default_factory=time.time)
    started: float = 0.0
    ended: float = 0.0
    report: dict[str, Any] | None = None
    error: ServingError | None = None
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    observe: Callable[[float], None] = lambda share: None

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.state in ENDED

    def tell(self, stage: str, done: int, total: int, unit: str) -> None:
        """How far it is."""
        self.stage, self.done, self.total, self.unit = stage, done, total, unit
        self.observe(done / total if total else 0.0)


# Runs a merge, tells the operation how far it is, and ends soon after `cancelled` is set; returns its report. When it
# raises, nothing is left of the merge.
RunMerge = Callable[[MergeOperation], Awaitable[dict[str, Any]]]
# Gets rid of what was prepared for a merge; returns at once.
Discard = Callable[[MergeCommand], None]


class MergeObserver(Protocol):
    """Is told of merges; ServerMetrics is one."""

    def on_merges(self, queued: int, running: int) -> None:
        """So many wait and run now."""

    def on_merge_progress(self, share: float) -> None:
        """So much of its stage has the running merge done, 0 to 1."""

    def on_merge_ended(self, outcome: str, seconds: float) -> None:
        """One has ended: `ok` or an error's reason, after so many seconds of running."""


class MergeOperations:
    """See the module.

    Args:
        run: runs one.
        discard: called for each command, when its merge has ended or never began.
        max_queued: most that wait.
        observer: told of merges.
    """

    def __init__(self, run: RunMerge, discard: Discard, max_queued: int, observer: MergeObserver) -> None:
        self._run = run
        self._discard = discard
        self._max_queued = max_queued
        self._observer = observer
        self._operations: dict[str, MergeOperation] = {}
        self._number = 0
        self._runner: asyncio.Task[None] | None = None
        self._is_closed = False

    def check_room(self, output: str) -> None:
        """Raise unless a merge to this name could be added now.

        Raises:
            DrainingError, MergeQueueFullError, MergeOutputExistsError.
        """
        if self._is_closed:
            raise DrainingError("The server is shutting down and accepts nothing new.")
        pending = [each for each in self._operations.values() if not each.is_over]
        if any(each.output == output for each in pending):
            raise MergeOutputExistsError(
                f"Another merge is going to write {output}; give another output.", {"field": "output"}
            )
        # One runs, or will at once.
        if len(pending) > self._max_queued:
            raise MergeQueueFullError(
                f"{len(pending) - 1} merges are waiting, which is as many as may (--merge-max-queued); try again when "
                "one has ended, or cancel one."
            )

    def add(
        self, command: MergeCommand, members: tuple[MergedVersion, ...], names: frozenset[str], request_id: str
    ) -> MergeOperation:
        """Have a merge run, now or when it is its turn.

        Raises:
            DrainingError, MergeQueueFullError, MergeOutputExistsError: it was not added.
        """
        output = command.out.name
        self.check_room(output)
        self._number += 1
        name = f"operations/merge-{secrets.token_hex(8)}"
        operation = MergeOperation(
            self._number, name, output, members, names, command, request_id, observe=self._observer.on_merge_progress
        )
        self._operations[name] = operation
        self._forget()
        self._observe()
        if self._runner is None:
            self._runner = asyncio.get_running_loop().create_task(self._run_all())
        log.info("merge_queued", operation=name, output=output)
        return operation

    def get(self, name: str) -> MergeOperation:
        """The operation of that name.

        Raises:
            OperationNotFoundError: there is none.
        """
        self._forget()
        operation = self._operations.get(name)
        if operation is None:
            raise unknown(name)
        return operation

    def all(self) -> list[MergeOperation]:
        """All operations."""
        self._forget()
        return list(self._operations.values())

    def cancel(self, operation: MergeOperation) -> None:
        """Let it end, if it has not."""
        if operation.state is MergeState.QUEUED:
            self._end(operation, MergeCancelledError("The merge was cancelled before it began."))
        elif operation.state is MergeState.RUNNING:
            operation.state = MergeState.CANCELLING
            operation.cancelled.set()

    def delete(self, operation: MergeOperation) -> None:
        """Forget it.

        Raises:
            OperationNotDoneError: it has not ended.
        """
        if not operation.is_over:
            raise OperationNotDoneError(
                f"The merge to {operation.output} has not ended; cancel it first.", {"name": operation.name}
            )
        self._operations.pop(operation.name, None)

    def stop(self) -> None:
        """Take no more, and end all that there are."""
        self._is_closed = True
        for operation in self.all():
            if operation.state is MergeState.QUEUED:
                self._end(operation, DrainingError("The server was stopped before the merge began."))
            self.cancel(operation)

    async def close(self) -> None:
        """Stop, and wait until nothing runs any more."""
        self.stop()
        if self._runner is not None:
            await self._runner

    async def _run_all(self) -> None:
        """Run one after the other until none waits."""
        try:
            while waiting := [each for each in self._operations.values() if not each.is_over]:
                await self._run_one(waiting[0])
        finally:
            self._runner = None

    async def _run_one(self, operation: MergeOperation) -> None:
        operation.state, operation.started = MergeState.RUNNING, time.time()
        self._observe()
        error: ServingError | None = None
        try:
            operation.report = await self._run(operation)
        except MergeCancelledError as cancelled:
            stopped = DrainingError("The server was stopped while it merged; nothing is left of it.")
            error = stopped if self._is_closed else cancelled
        except ServingError as failure:
            error = failure
        except Exception:
            log.exception("merge_failed", operation=operation.name)
            error = ServingError("The merge failed; the server's log has the details. Nothing is left of it.")
        self._end(operation, error)

    def _end(self, operation: MergeOperation, error: ServingError | None) -> None:
        operation.ended = time.time()
        operation.error = error
        if error is None:
            operation.state = MergeState.SUCCEEDED
        else:
            operation.state = MergeState.CANCELLED if error.code is Code.CANCELLED else MergeState.FAILED
        command, operation.command = operation.command, None
        if command is not None:
            self._discard(command)
        operation.over.set()
        seconds = operation.ended - operation.started if operation.started else 0.0
        outcome = "ok" if error is None else error.reason
        self._observer.on_merge_ended(outcome, seconds)
        self._observe()
        log.info("merge_ended", operation=operation.name, output=operation.output, outcome=outcome, seconds=seconds)

    def _forget(self) -> None:
        """Drop ended ones that are too many or too old."""
        ended = [each for each in self._operations.values() if each.is_over]
        horizon = time.time() - KEPT_S
        for position, each in enumerate(sorted(ended, key=lambda each: each.ended, reverse=True)):
            if position >= MAX_KEPT or each.ended < horizon:
                del self._operations[each.name]

    def _observe(self) -> None:
        states = Counter(each.state for each in self._operations.values())
        self._observer.on_merges(states[MergeState.QUEUED], states[MergeState.RUNNING] + states[MergeState.CANCELLING])


def unknown(name: str) -> OperationNotFoundError:
    """The error for a name that is none, not any more, or not for this client."""
    return OperationNotFoundError(
        f"There is no operation {name[:128]!r} that this client may know of. Operations end with their server, also "
        f"when it is started again, and are forgotten a day after their end or after {MAX_KEPT} others; a model that "
        "was written stays.",
        {"name": name[:128]},
    )
