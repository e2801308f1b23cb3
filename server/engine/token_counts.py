"""Which tokens a request has seen, and how often it said them. Imports no torch; the sampler's, on the step thread.

Grown by one token a step instead of rebuilt: a prompt of 8,000 tokens would otherwise be counted again for each token.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


class TokenCounts:
    """Distinct tokens of prompt and output, each with its number of occurrences in the output.

    Args:
        prompt: token ids; they count as seen, zero times said.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt)
        self._position = {token: i for i, token in enumerate(distinct)}
        self._size = len(distinct)
        self._ids = np.zeros(max(64, 2 * self._size), np.int64)
        self._ids[: self._size] = list(distinct)
        self._said = np.zeros_like(self._ids)
        self._num_outputs = 0

    def update(self, output: Sequence[int]) -> None:
        """Count what was appended to `output` since the last call."""
        for i in range(self._num_outputs, len(output)):
            position = self._position.setdefault(output[i], self._size)
            if position == self._size:
                self._append(output[i])
            self._said[position] += 1
        self._num_outputs = len(output)

    def _append(self, token: int) -> None:
        if self._size == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._said = np.concatenate([self._said, np.zeros_like(self._said)])
        self._ids[self._size] = token
        self._size += 1

    @property
    def ids(self) -> Int64Array:
        """Distinct token ids seen in prompt or output, int64 [n]; a view."""
        return self._ids[: self._size]

    @property
    def said(self) -> Int64Array:
        """Occurrences of each of `ids` in the output, int64 [n]; a view."""
        return self._said[: self._size]
