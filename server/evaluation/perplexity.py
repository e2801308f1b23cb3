"""Perplexity, from the log probabilities of a text's tokens. Imports no torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a text was predicted.

    Attributes:
        tokens: that were scored.
        loss: mean of -log p, in nats.
        error: standard error of that mean, as if tokens were independent; 0 for a single token.
    """

    tokens: int
    loss: float
    error: float

    @property
    def value(self) -> float:
        """The perplexity, e to the loss; infinite where a token was impossible."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class PerplexityMeter:
    """Takes the log probabilities of a text as they come."""

    def __init__(self) -> None:
        self._losses: list[float] = []

    def add(self, logprobs: Iterable[float]) -> None:
        """Log probabilities of further tokens, natural."""
        self._losses.extend(-logprob for logprob in logprobs)

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return len(self._losses)

    def result(self) -> Perplexity:
        """Of everything so far; at least one token."""
        count = len(self._losses)
        loss = math.fsum(self._losses) / count
        error = 0.0
        if count > 1 and math.isfinite(loss):
            variance = math.fsum((each - loss) ** 2 for each in self._losses) / (count - 1)
            error = math.sqrt(variance / count)
        return Perplexity(count, loss, error)
