"""What the server may answer for a name at this moment, as those who change it know."""

import threading
from collections.abc import Collection
from typing import NamedTuple, Self


class Entry(NamedTuple):
    """What a name may lead to.

    Attributes:
        stamp: grows with every change.
        digests: any of these; None among them: it may be unknown.
    """

    stamp: int
    digests: frozenset[str | None]


class Ledger:
    """Entries of names that only one thread changes. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._stamps = 0

    def names(self) -> list[str]:
        """Names with an entry."""
        with self._lock:
            return sorted(self._entries)

    def __getitem__(self, name: str) -> Entry | None:
        with self._lock:
            return self._entries.get(name)

    def set(self, name: str, digests: Collection[str | None]) -> None:
        """The state is known."""
        with self._lock:
            self._stamps += 1
            self._entries[name] = Entry(self._stamps, frozenset(digests))

    def changing(self, name: str, *digests: str | None) -> "Change":
        """A change to these begins; ends with the `with` block."""
        entry = self[name]
        assert entry is not None
        return Change(self, name, entry.digests, frozenset(digests))


class Change:
    """While it is under way both the old and the new state are right, then only its outcome.

    Args:
        ledger: where it is noted.
        name: what changes.
        before, after: what it may lead to.
    """

    def __init__(self, ledger: Ledger, name: str, before: frozenset[str | None], after: frozenset[str | None]) -> None:
        self._ledger, self._name = ledger, name
        self._before, self._after = before, after
        self._result = before

    def __enter__(self) -> Self:
        """It begins."""
        self._ledger.set(self._name, self._before | self._after)
        return self

    def __exit__(self, *_: object) -> None:
        """It has happened, or not."""
        self._ledger.set(self._name, self._result)

    def acknowledged(self) -> None:
        """It has happened."""
        self._result = self._after
