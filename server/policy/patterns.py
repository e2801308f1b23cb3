"""Patterns over names, and which of several patterns decides.

`*` stands for any characters, also none; everything else stands for itself. Of the patterns that match a name, the one
with the most characters other than `*` decides; among equals the one with fewer `*`, and then the one that stands
first. So a name itself goes before every pattern, `support-de-*` before `support-*`, and `*` is for what nothing else
matches.
"""

from collections.abc import Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a name; takes time in proportion to both, whatever they are."""
    first, *parts = pattern.split("*")
    if not parts:
        return pattern == name
    last = parts.pop()
    at, end = len(first), len(name) - len(last)
    if at > end or not name.startswith(first) or not name.endswith(last):
        return False
    for part in parts:
        at = name.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


class PatternTable(Generic[T]):
    """Values by pattern.

    Args:
        entries: in the order in which they were written.
    """

    def __init__(self, entries: Mapping[str, T]) -> None:
        self._entries = dict(entries)
        # Sorting is stable, so what stands first stays first.
        self._patterns = sorted(
            (pattern for pattern in entries if "*" in pattern),
            key=lambda pattern: (pattern.count("*") - len(pattern), pattern.count("*")),
        )

    def get(self, pattern: str) -> T | None:
        """The value of just this pattern."""
        return self._entries.get(pattern)

    def find(self, name: str) -> T | None:
        """The value of the pattern that decides for a name; None if none matches."""
        if name in self._entries and "*" not in name:
            return self._entries[name]
        for pattern in self._patterns:
            if matches(pattern, name):
                return self._entries[pattern]
        return None
