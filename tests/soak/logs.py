"""What the server logs during a soak: nothing is printed, and what should never be logged is found."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import structlog

# Errors that injected faults lead to.
_EXPECTED: Final = frozenset({"adapter_copy_failed", "event_not_delivered"})
_SERIOUS: Final = frozenset({"error", "critical", "exception"})


class Logs:
    """Counts events by name.

    Attributes:
        unexpected: errors that nobody injected, as they were logged; the first few.
        lost: ids of which a version left memory and could not be read again, because of a fault.
        forsaken: the same, but its files are gone or others now.
    """

    def __init__(self) -> None:
        self.unexpected: list[str] = []
        self.lost: set[str] = set()
        self.forsaken: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def counts(self) -> Counter[str]:
        """So far."""
        with self._lock:
            return self._counts.copy()

    def __call__(self, logger: object, method: str, event: dict[str, Any]) -> dict[str, Any]:
        """A structlog processor."""
        with self._lock:
            name = str(event["event"])
            self._counts[name] += 1
            if name == "adapter_reread_failed":
                adapter_id = str(event.get("version")).partition("@")[0]
                (self.lost if "disk reported" in str(event.get("message")) else self.forsaken).add(adapter_id)
            if method in _SERIOUS and name not in _EXPECTED and len(self.unexpected) < 10:
                formatted = structlog.processors.format_exc_info(logger, method, dict(event))
                self.unexpected.append(f"{method}: {formatted}")
        raise structlog.DropEvent


@contextmanager
def watched_logs() -> Iterator[Logs]:
    """Every log line goes there meanwhile."""
    logs, before = Logs(), structlog.get_config()
    structlog.configure(processors=[logs])
    try:
        yield logs
    finally:
        structlog.configure(**before)
