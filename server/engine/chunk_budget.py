"""How many tokens of prompts a step takes beside decodes, so that these don't wait much longer for their next token.

What a step of decodes alone takes is measured, and what tokens of prompts added to the last steps. The next one has as
many more or fewer as that was too little or too much. So it comes to the number that adds just what it may, also where
a part of it is there for any number. Imports no torch; on the step thread.

Prompts never starve: a step has room for at least an eighth of its tokens, but for single ones, never two in a row,
that are left to decodes where it isn't known (any more) what those take alone.
"""

import math
from typing import Final

# Steps with prompts after which decodes alone are to be measured again.
_STALE: Final = 64
# Weight of the last steps beside a new one, and of a new time of decodes alone where it is shorter or longer: a step
# for which something was compiled is soon forgotten.
_KEPT: Final = 0.8
_SHORTER, _LONGER = 0.5, 0.1


class ChunkBudget:
    """See the module.

    Args:
        slowdown: how many times as long as decodes alone a step with tokens of prompts may take, above 1; 0: any.
        step_tokens: of a step at most.
    """

    def __init__(self, slowdown: float, step_tokens: int) -> None:
        if slowdown != 0 and not slowdown > 1:
            raise ValueError(f"slowdown ({slowdown}) must be above 1, or 0 for no bound")
        self._slowdown = slowdown
        self._most = step_tokens
        self._least = max(1, step_tokens // 8)
        # By the order of magnitude of the number of decodes.
        self._alone: dict[int, float] = {}
        self._age: dict[int, int] = {}
        self._left_out = False
        # Weighted sums over steps: tokens of prompts, and the seconds that they added.
        self._tokens, self._seconds = 0.0, 0.0

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
        if alone is None:
            return self._least
        if not self._seconds:
            return self._most if self._tokens else self._least
        fitting = math.ceil((self._slowdown - 1) * alone * self._tokens / self._seconds)
        return min(max(fitting, self._least), self._most)

    def record(self, num_decodes: int, prompt_tokens: int, seconds: float) -> None:
        """What a step took."""
        if not self._slowdown or not num_decodes:
            return
        kind = num_decodes.bit_length()
        alone = self._alone.get(kind)
        if not prompt_tokens:
            if alone is not None:
                seconds = alone + (seconds - alone) * (_SHORTER if seconds < alone else _LONGER)
            self._alone[kind], self._age[kind] = seconds, 0
            return
        self._age[kind] = self._age.get(kind, _STALE) + 1
        if alone is not None:
            self._tokens = _KEPT * self._tokens + prompt_tokens
            self._seconds = _KEPT * self._seconds + max(0.0, seconds - alone)
