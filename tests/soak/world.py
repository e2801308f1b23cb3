"""What all actors of a soak share: the server's parts, a gate to pause at, tallies, and what was found to be wrong."""

import faulthandler
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lorikeet.adapters.watcher import AdapterWatcher
from lorikeet.server.app import App

from .contents import Content
from .faults import Faults
from .ledger import Ledger
from .logs import Logs
from .references import References

# An operation that takes longer has been forgotten by the server.
HANG_S: Final = 60.0
MAX_PROBLEMS: Final = 20
# What everything may end with once the server's parts are being closed.
CLOSING: Final = frozenset({"DRAINING", "ADAPTER_UNLOADED", "ADAPTER_STATE"})


class Gate:
    """Operations pass through it; `closed` waits until none is under way and lets none begin."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_closed = False

    @contextmanager
    def passing(self) -> Iterator[None]:
        """One operation."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Nothing is under way inside."""
        with self._changed:
            self._is_closed = True
            if not self._changed.wait_for(lambda: not self._inside, HANG_S):
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                raise AssertionError(f"{self._inside} operations have not ended within {HANG_S} s")
        try:
            yield
        finally:
            with self._changed:
                self._is_closed = False
                self._changed.notify_all()


@dataclass
class World:
    """See the module.

    Attributes:
        app: running.
        watcher: of `root`, quicker to settle than the server's own.
        root: the adapter directory.
        contents: what is in the root's hidden folder `.staged`, to be loaded by call.
        references: what they answer.
        faults: that are injected.
        ledger: what owned names may lead to.
        logs: what the server logs.
    """

    app: App
    watcher: AdapterWatcher
    root: Path
    contents: list[Content]
    references: References
    faults: Faults
    ledger: Ledger
    logs: Logs

    def __post_init__(self) -> None:
        """Begin with clean sheets."""
        self.gate = Gate()
        self.stopping = threading.Event()
        self.problems: list[str] = []
        self.operations: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.is_closing = False
        self.live = 0  # requests that were accepted and have not ended
        self.by_digest = {content.digest: content for content in self.contents}
        self.never_served: set[str] = set()  # digests that may be read and kept, but must be refused
        self._lock = threading.Lock()

    def report(self, problem: str) -> None:
        """Something is wrong; the soak ends soon."""
        with self._lock:
            if len(self.problems) < MAX_PROBLEMS:
                self.problems.append(problem)
        self.stopping.set()

    def report_exception(self, who: str) -> None:
        """The exception being handled was not expected."""
        self.report(f"{who}: {traceback.format_exc()}")

    def was_lost(self, adapter_id: str) -> bool:
        """Whether a version of the id ever left memory and could not be read again; then it failed, until a load."""
        return adapter_id in self.logs.lost or adapter_id in self.logs.forsaken

    def count(self, operation: str) -> None:
        """One more."""
        with self._lock:
            self.operations[operation] += 1

    def count_error(self, operation: str, reason: str) -> None:
        """It ended with this."""
        with self._lock:
            self.errors[f"{operation}: {reason}"] += 1

    def add_live(self, change: int) -> None:
        """Requests come and end."""
        with self._lock:
            self.live += change

    def check_reason(self, operation: str, reason: str, message: str, allowed: Collection[str]) -> None:
        """Count an error of an operation, and report it unless it is among what may come of it."""
        self.count_error(operation, reason)
        if reason not in allowed and not (self.is_closing and reason in CLOSING):
            self.report(f"{operation} ended with {reason}: {message}; expected was one of {sorted(allowed)}")

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = HANG_S) -> None:
        """Poll until it holds; if it does not, what all threads do is on stderr.

        Raises:
            AssertionError: it does not come to hold.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                raise AssertionError(f"not within {seconds} s: {what}; {self.app.manager.list()}")
            time.sleep(0.01)
