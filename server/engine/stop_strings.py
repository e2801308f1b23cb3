"""Finds stop strings in text that arrives in pieces; holds back what may be the beginning of one. Imports no torch."""

from collections.abc import Sequence


class StopStrings:
    """One request's stop strings.

    Each string is followed by a Knuth-Morris-Pratt automaton, a character at a time. So it does not matter how the text
    is cut into pieces, and the one found first is the one whose last character comes first (of several, the longest).

    Args:
        stops: not empty strings.
        include_stop: whether the text keeps the one that was found.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool) -> None:
        self.found: str | None = None
        self._stops = sorted(stops, key=len, reverse=True)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop that the text so far ends with
        self._held = ""
        self._include_stop = include_stop

    def push(self, text: str) -> str:
        """Add text; returns what can be shown by now. After a stop string was found, nothing more comes."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        held = self._held + text
        for end in range(len(self._held) + 1, len(held) + 1):
            stop = self._advance(held[end - 1])
            if stop is not None:
                self.found = stop
                self._held = ""
                return held[: end if self._include_stop else end - len(stop)]
        cut = len(held) - max(self._matched)
        self._held = held[cut:]
        return held[:cut]

    def flush(self) -> str:
        """What is still held back: no stop string came of it."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> str | None:
        """Feed one character; the longest stop string that it completes."""
        found = None
        for i, stop in enumerate(self._stops):
            matched = self._matched[i]
            while matched and stop[matched] != character:
                matched = self._fallbacks[i][matched - 1]
            matched += stop[matched] == character
            if matched == len(stop):
                found = found or stop
                matched = self._fallbacks[i][matched - 1]
            self._matched[i] = matched
        return found


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper suffix that is a prefix too."""
    lengths = [0] * len(stop)
    for i in range(1, len(stop)):
        length = lengths[i - 1]
        while length and stop[length] != stop[i]:
            length = lengths[length - 1]
        lengths[i] = length + (stop[length] == stop[i])
    return lengths
