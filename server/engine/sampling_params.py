"""Per-request sampling and stopping parameters, validated once at the edge. Imports no torch."""

import math
from dataclasses import dataclass

from ..errors import BadRequestError

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when a request ends.

    Attributes:
        temperature: 0 is greedy; allowed 0 to 100.
        top_k: keep the k likeliest tokens; 0 is off.
        top_p: nucleus mass, in (0, 1]; 1 is off.
        min_p: drop tokens below min_p x the largest probability, in [0, 1]; 0 is off.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output,
            more than 0 to 100; 1 is off.
        presence_penalty: subtracted once from logits of tokens seen in the output, -2 to 2; 0 is off.
        frequency_penalty: subtracted per occurrence in the output, -2 to 2; 0 is off.
        seed: makes a sampled request repeatable; None draws a fresh seed.
        max_tokens: tokens to generate at most, >= 1.
        min_tokens: no stop token, stop string or end-of-sequence before that many, 0 to max_tokens.
        stop: stop strings; output is cut before the first one found (or after it with include_stop).
        stop_token_ids: token ids that end the request, beside the model's own.
        include_stop: whether the text keeps the stop string that ended it.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        logprobs: how many alternatives to return per token; None returns none, 0 only the chosen token's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 128
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def takes_likeliest(self) -> bool:
        """Whether nothing but the likeliest token is ever asked for."""
        return self.greedy and not self.min_tokens and self.logprobs is None and not self.has_penalties

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that were seen are made less or more likely."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
            BadRequestError: names the field, what was given and what is allowed.
        """
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.top_k < 0:
            raise _bad("top_k", self.top_k, "0 (off) or more")
        if self.max_tokens < 1:
            raise _bad("max_tokens", self.max_tokens, "1 or more")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise _bad("min_tokens", self.min_tokens, f"0 to max_tokens ({self.max_tokens})")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise _bad("logprobs", self.logprobs, f"0 to {MAX_LOGPROBS}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise _bad("seed", self.seed, "0 to 2^64 - 1")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise _bad("stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS}")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise _bad("stop", f"a string of {len(text)} characters", f"1 to {MAX_STOP_LENGTH} characters each")
        if any(t < 0 for t in self.stop_token_ids):
            raise _bad("stop_token_ids", min(self.stop_token_ids), "token ids of 0 or more")


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
    if not inside:
        raise _bad(name, value, f"{'more than ' if open_low else ''}{low:g} to {high:g}")


def _bad(name: str, given: object, allowed: str) -> BadRequestError:
    return BadRequestError(f"{name} is {given}; allowed: {allowed}.", {"field": name})
