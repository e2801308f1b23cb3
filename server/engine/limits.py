"""What the operator allows each adapter: its weight, its caps, and the tokens it has left. Imports no torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import AdapterRateError

_SECONDS = 60.0  # a bucket holds a minute's tokens
_ROUNDING = 1e-6  # tokens
_SMALL = 64


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """Limits of one adapter, over all its versions. None: no cap.

    Attributes:
        weight: its share of the device relative to others', above 0.
        max_running: requests in a step at most, at least 1; more wait, and hold nobody else up.
        max_waiting: requests that may wait, at least 1; more are refused.
        tokens_per_minute: prompt and generated tokens, at least 1; requests are refused while they are used up.
    """

    weight: float = 1.0
    max_running: int | None = None
    max_waiting: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight ({self.weight}) must be above 0")
        for cap in (self.max_running, self.max_waiting, self.tokens_per_minute):
            if cap is not None and cap < 1:
                raise ValueError(f"a cap ({cap}) must be 1 or more")


# Limits by adapter id ("" is the base). Called on any thread; returns at once and keeps nothing of ids it is asked for.
LimitsOf = Callable[[str], AdapterLimits]

_UNLIMITED = AdapterLimits()


def unlimited(_: str) -> AdapterLimits:
    """Every adapter: weight 1, no caps."""
    return _UNLIMITED


@dataclass(slots=True)
class _Bucket:
    """Tokens that are left (below 0: a debt) at a second, and how they come back."""

    left: float
    at: float
    per_minute: int

    def refill(self, now: float) -> None:
        back = max(0.0, now - self.at) * self.per_minute / _SECONDS
        self.left = min(float(self.per_minute), self.left + back)
        self.at = now


class TokenRates:
    """A token bucket for each adapter with `tokens_per_minute`. Not thread-safe: its owner holds a lock.

    What a request generates is known only afterwards, so a bucket may fall below zero: a request is accepted while one
    token is left, and the debt is paid back before the next. A full bucket says nothing and is forgotten.
    """

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}
        self._sweep_at = _SMALL

    def __len__(self) -> int:
        return len(self._buckets)

    def check(self, adapter_id: str, per_minute: int, now: float) -> None:
        """Refuse a request of an adapter that has used its tokens up.

        Raises:
            AdapterRateError: says when one token will be there again.
        """
        bucket = self._buckets.get(adapter_id)
        if bucket is None:
            return
        bucket.per_minute = per_minute
        bucket.refill(now)
        if bucket.left < 1 - _ROUNDING:  # who comes back after exactly the time told is not too early
            retry_after_s = math.ceil((1 - bucket.left) * _SECONDS / per_minute * 1000) / 1000
            whose = f"Adapter {adapter_id!r}" if adapter_id else "The base model"
            raise AdapterRateError(
                f"{whose} has used up its {per_minute} tokens a minute. Try again in {retry_after_s:.3f} seconds.",
                {
                    "adapter_id": adapter_id,
                    "tokens_per_minute": str(per_minute),
                    "retry_after_s": f"{retry_after_s:.3f}",
                },
            )

    def accept(self, adapter_id: str, per_minute: int, prompt_tokens: int, now: float) -> None:
        """Take the prompt of an accepted request."""
        bucket = self._buckets.get(adapter_id)
        if bucket is None:
            if len(self._buckets) >= self._sweep_at:
                self._sweep(now)
            bucket = self._buckets[adapter_id] = _Bucket(per_minute, now, per_minute)
        bucket.left -= prompt_tokens

    def spend(self, generated: Mapping[str, int], now: float) -> None:
        """Take generated tokens, by adapter id; adapters without a bucket have no limit."""
        for adapter_id, tokens in generated.items():
            bucket = self._buckets.get(adapter_id)
            if bucket is not None:
                bucket.refill(now)  # before: what comes back to a full bucket is lost
                bucket.left -= tokens

    def _sweep(self, now: float) -> None:
        for adapter_id, bucket in list(self._buckets.items()):
            bucket.refill(now)
            if bucket.left >= bucket.per_minute:
                del self._buckets[adapter_id]
        self._sweep_at = max(_SMALL, 2 * len(self._buckets))
