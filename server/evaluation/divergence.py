"""How far two models' next-token distributions are apart, row by row, in float32; rows are taken in pieces."""

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from .divergence_result import Divergence
from .errors import EvaluationError

# Rows whose float32 log-softmax exists at a time: two of 64 rows of a vocabulary of 128,000 take 64 MiB.
_ROWS: Final = 64


def logprobs_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The log probability of each row's target.

    Args:
        logits: [n, vocab], any float type.
        targets: int64 [n], on the device of the logits.

    Returns:
        float32 [n].
    """
    found = [
        rows.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        for rows, chosen in zip(_pieces(logits), targets.split(_ROWS), strict=True)
    ]
    return torch.cat(found)


class DivergenceMeter:
    """Takes the logits of two models as they come."""

    def __init__(self) -> None:
        self._divergences: list[float] = []
        self._agreements = 0

    def add(self, p: Tensor, q: Tensor) -> None:
        """Compare further rows.

        Args:
            p: [n, vocab], of the reference.
            q: [n, vocab], on any device.

        Raises:
            EvaluationError: the vocabularies differ.
        """
        if p.shape != q.shape:
            raise EvaluationError(
                f"The two models have vocabularies of {p.shape[-1]} and {q.shape[-1]} tokens; their distributions "
                "cannot be compared.",
                {"field": "model"},
            )
        for rows_p, rows_q in zip(_pieces(p), _pieces(q), strict=True):
            log_p = rows_p.log_softmax(-1)
            log_q = rows_q.to(log_p.device).log_softmax(-1)
            self._agreements += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            # Where p is 0 the term is 0, whatever q is.
            terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
            self._divergences += terms.sum(-1, dtype=torch.float64).clamp_(min=0.0).tolist()

    def result(self) -> Divergence:
        """Of everything so far; at least one row."""
        count = len(self._divergences)
        return Divergence(count, math.fsum(self._divergences) / count, max(self._divergences), self._agreements / count)


def _pieces(logits: Tensor) -> Iterator[Tensor]:
    """Some rows at a time, in float32."""
    for rows in logits.split(_ROWS):
        yield rows.float()
