"""From logits to one drawn token on a CPU: what `distribution.py` does for all rows at once, one row after the other.

A row stays in the core's cache from one operation to the next, and what no filter can keep is left out early: only
top-p without top-k, and no filter at all, need every token's weight. Results are the same but for rounding: weights are
added up in another order, and compared instead of their logarithms.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from .largest import Floats, columns_of_largest, columns_of_nucleus, largest_values, least_of_nucleus
from .sampling_params import SamplingParams

# Where many tokens are kept, they are drawn in two stages: which run of this many, then which token in it.
_RUN: Final = 256
_MANY: Final = 4096
# Of a logarithm.
_ROUNDING: Final = 1e-5


class HostDraws:
    """Draws. Keeps a buffer: to get a new one for each row takes about as long as to fill it. Step thread only."""

    def __init__(self) -> None:
        self._allocate(0)

    def draw(
        self, logits: Tensor, params: Sequence[SamplingParams], inverse: Sequence[float], uniform: Sequence[float]
    ) -> Tensor:
        """Draw one token per row by inverting its cumulative distribution: int64 [n].

        Args:
            logits: float32 [n, vocab].
            params: of each row, not greedy.
            inverse: temperatures, finite.
            uniform: in [0, 1).

        A row whose largest logit is not finite gives some token of the vocabulary.
        """
        if logits.shape[-1] != len(self._row):
            self._allocate(logits.shape[-1])
        rows = zip(logits, params, inverse, uniform, strict=True)
        return torch.tensor([self._draw_row(*row) for row in rows])

    def _allocate(self, vocab: int) -> None:
        self._runs = torch.zeros(-(-vocab // _RUN), _RUN)
        self._row = self._runs.view(-1)[:vocab]  # one for scaled logits and then their weights: a cache is small

    def _draw_row(self, logits: Tensor, params: SamplingParams, inverse: float, uniform: float) -> int:
        largest = float(logits.numpy().max())
        if not math.isfinite(largest):
            return 0
        row = torch.sub(logits, largest, out=self._row)  # as `scale` does it
        if inverse != 1.0:
            row.mul_(inverse)
        values, columns, least = row.numpy(), None, 0.0
        if 0 < params.top_k < len(row):
            columns = columns_of_largest(values, params.top_k)
            weights = _exp(values[columns])
            few = largest_values(weights, params.top_k)
            least = least_of_nucleus(few, float(few.sum()), params.top_p)
        elif params.top_p < 1.0:
            total = row.exp_().sum().item()
            columns = columns_of_nucleus(values, total, params.top_p)
            weights = values if columns is None else values[columns]
            least = least_of_nucleus(weights, total, params.top_p)
        elif params.min_p:
            columns = np.flatnonzero(values >= math.log(params.min_p) - _ROUNDING)
            weights = _exp(values[columns])
        else:
            row.exp_()
            return self._draw_of_runs(uniform)
        # min_p is a share of the largest probability, whose weight is 1 here.
        kept = np.flatnonzero(weights >= max(least, params.min_p))
        weights, columns = weights[kept], kept if columns is None else columns[kept]
        if len(kept) > _MANY:
            values.fill(0.0)
            values[columns] = weights
            return self._draw_of_runs(uniform)
        return int(columns[_invert(weights, uniform)[0]])

    def _draw_of_runs(self, uniform: float) -> int:
        # float32 sums of a run are exact to 1e-7 of the run; what adds up over the vocabulary is float64.
        run, rest = _invert(self._runs.sum(-1).numpy(), uniform)
        token, _ = _invert(self._runs[run].numpy(), rest)
        return run * _RUN + token


def _exp(values: Floats) -> Floats:
    """torch's, as of a whole row; used up."""
    weights: Floats = torch.from_numpy(values).exp_().numpy()
    return weights


def _invert(weights: Floats, uniform: float) -> tuple[int, float]:
    """The first column where the cumulative weight exceeds `uniform` of the total, and how far into it that falls.

    Args:
        weights: [n], not negative, one positive.
        uniform: in [0, 1).

    Returns:
        A column of a positive weight, and a number in [0, 1).
    """
    mass = np.cumsum(weights, dtype=np.float64)
    total = float(mass[-1])
    # Rounding must not lift the target to the total: it would fall behind the last token.
    target = min(uniform * total, math.nextafter(total, 0.0))
    column = int(mass.searchsorted(target, side="right"))
    width = float(weights[column])
    rest = (target - (float(mass[column]) - width)) / width
    return column, min(max(rest, 0.0), 1.0 - 2.0**-53)
