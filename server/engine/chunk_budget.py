"""How many tokens of prompts a step takes beside decodes, so that these don't wait much longer for their next token.

What a step of decodes alone takes is measured, and what tokens of prompts added to the last steps. Imports no torch; on
the step thread. Where steps run as they are, the next one has as many tokens more or fewer as what they added was too
little or too much. So it comes to the number that adds just what it may, also where a part of it is there for any
number. Where steps are padded to sizes, all tokens up to a size take the same time: a step fills the largest one whose
measured time is within the bound.

Prompts never starve: a step has room for at least a sixteenth of its tokens, but for single ones, never two in a row,
that are left to decodes where it isn't known (any more) what those take alone.
"""

import math
from collections.abc import Sequence
from typing import Final, Protocol

# Steps with prompts after which decodes alone are to be measured again.
_STALE: Final = 64
# Weight of the last steps beside a new one, and of a new time where it is shorter or longer than the last ones: a step
# for which something was compiled is soon forgotten.
_KEPT: Final = 0.8
_SHORTER, _LONGER = 0.5, 0.1
# Steps with prompts after which a size that took too long is tried again.
_FORGOTTEN: Final = 512
# Seconds that a size added, and when: steps that had been recorded by then.
_UNKNOWN: Final[tuple[float | None, int]] = (None, 0)


class ChunkBudget:
    """See the module.

    Args:
        slowdown: how many times as long as decodes alone a step with tokens of prompts may take, above 1; 0: any.
        step_tokens: of a step at most.
        padded_sizes: tokens to which steps with tokens of prompts are padded, ascending; none: they are not.
    """

    def __init__(self, slowdown: float, step_tokens: int, padded_sizes: Sequence[int] = ()) -> None:
        if slowdown != 0 and not slowdown > 1:
            raise ValueError(f"slowdown ({slowdown}) must be above 1, or 0 for no bound")
        self._slowdown = slowdown
        self._most = step_tokens
        least = max(1, step_tokens // 16)
        sizes = [size for size in padded_sizes if size <= step_tokens]
        self._costs: _Costs = _SizeCosts(sizes, least) if sizes else _TokenCosts(least, step_tokens)
        # By the order of magnitude of the number of decodes.
        self._alone: dict[int, float] = {}
        self._age: dict[int, int] = {}
        self._left_out = False

    @property
    def is_bounded(self) -> bool:
        """Whether there is a bound, for which steps have to be recorded."""
        return self._slowdown != 0

    def allow(self, num_decodes: int) -> int:
        """Most tokens of prompts in the next step, beside so many decodes."""
        if not self._slowdown or not num_decodes:
            return self._most
        kind = num_decodes.bit_length()
        if not self._left_out and self._age.get(kind, _STALE) >= _STALE:
            self._left_out = True
            return 0
        self._left_out = False
        alone = self._alone.get(kind)
        return self._costs.fitting(num_decodes, None if alone is None else (self._slowdown - 1) * alone)

    def record(self, num_decodes: int, prompt_tokens: int, seconds: float) -> None:
        """What a step took."""
        if not self._slowdown or not num_decodes:
            return
        kind = num_decodes.bit_length()
        alone = self._alone.get(kind)
        if not prompt_tokens:
            self._alone[kind], self._age[kind] = _smoothed(alone, seconds), 0
            return
        self._age[kind] = self._age.get(kind, _STALE) + 1
        if alone is not None:
            self._costs.record(num_decodes, prompt_tokens, max(0.0, seconds - alone))


class _Costs(Protocol):
    """What tokens of prompts add to a step."""

    def fitting(self, num_decodes: int, seconds: float | None) -> int:
        """Most tokens that add no more than that, but no fewer than the least there is; None: it is not known."""
        ...

    def record(self, num_decodes: int, prompt_tokens: int, seconds: float) -> None:
        """What the tokens of a step added."""
        ...


class _TokenCosts(_Costs):
    """Of steps that run as they are: seconds a token.

    Args:
        least, most: tokens of prompts in a step.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        # Weighted sums over steps: tokens of prompts, and the seconds that they added.
        self._tokens, self._seconds = 0.0, 0.0

    def fitting(self, num_decodes: int, seconds: float | None) -> int:
        if seconds is None:
            return self._least
        if not self._seconds:
            return self._most if self._tokens else self._least
        return min(max(math.ceil(seconds * self._tokens / self._seconds), self._least), self._most)

    def record(self, num_decodes: int, prompt_tokens: int, seconds: float) -> None:
        self._tokens = _KEPT * self._tokens + prompt_tokens
        self._seconds = _KEPT * self._seconds + seconds


class _SizeCosts(_Costs):
    """Of steps that are padded: seconds by size, for each order of magnitude of the number of decodes.

    Args:
        sizes: tokens of a step, decodes included, ascending.
        least: tokens of prompts in a step, at least.
    """

    def __init__(self, sizes: Sequence[int], least: int) -> None:
        self._sizes, self._least = sizes, least
        # As `_UNKNOWN`.
        self._found: dict[tuple[int, int], tuple[float | None, int]] = {}
        self._recorded = 0

    def fitting(self, num_decodes: int, seconds: float | None) -> int:
        kind = num_decodes.bit_length()
        sizes = [size for size in self._sizes if size - num_decodes >= self._least]
        if not sizes:  # more decodes than steps are padded for
            return self._least
        best = sizes[0]
        for size in sizes[1:]:
            added, _ = self._found.get((kind, best), _UNKNOWN)
            with_more, at = self._found.get((kind, size), _UNKNOWN)
            if seconds is None or added is None or added > seconds:
                break
            # A size that isn't known is tried once, and one that took too long not soon again.
            if with_more is not None and with_more > seconds and self._recorded - at < _FORGOTTEN:
                break
            best = size
        return best - num_decodes

    def record(self, num_decodes: int, prompt_tokens: int, seconds: float) -> None:
        self._recorded += 1
        size = next((size for size in self._sizes if size >= num_decodes + prompt_tokens), None)
        if size is not None:
            key = num_decodes.bit_length(), size
            before, _ = self._found.get(key, _UNKNOWN)
            self._found[key] = _smoothed(before, seconds), self._recorded


def _smoothed(before: float | None, seconds: float) -> float:
    if before is None:
        return seconds
    return before + (seconds - before) * (_SHORTER if seconds < before else _LONGER)
