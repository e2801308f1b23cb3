"""A request as the engine sees it, and the events it emits. Imports no torch.

A `Request` is created on the event loop's thread, handed over once by `Engine.submit`, and from then on touched only by
the step thread. `emit` is called on the step thread; the service wraps it in `loop.call_soon_threadsafe`.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from ...adapters.adaptation import Adaptation
from ...adapters.errors import ServingError
from .sampling_params import SamplingParams
from .scored_text import ScoredText
from .token_counts import TokenCounts
from .token_rules import TokenRules

if TYPE_CHECKING:
    from torch import Tensor

NO_SLOT = -1


class FinishReason(StrEnum):
    """Why a request that ended well ended."""

    STOP = "stop"  # a stop string, a stop token or the model's end of sequence
    LENGTH = "length"  # max_tokens or the end of the context
    SCORED = "scored"  # every token of a given text was scored


class Phase(StrEnum):
    """Where a request is. It only moves along WAITING -> RUNNING (-> WAITING when preempted) -> FINISHED."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log probability of one chosen or given token, and of the likeliest alternatives (natural, raw logits')."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New output. `text` can be empty while bytes of a character or a possible stop string are held back.

    Of a text that is scored it has tokens and their log probabilities, and no text.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """Terminal: the request ended well. `stop` names the stop string or token id that ended it, if one did."""

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    stop: str | int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: the request ended with an error."""

    error: ServingError


Event = Delta | Finished | Failed


@dataclass(slots=True, eq=False)
class Request:
    """One generation, or one text to score.

    Attributes:
        request_id: unique among live requests.
        prompt_token_ids: at least one token.
        params: validated.
        adapter: the versions pinned at admission, and their weights; None for the base.
        emit: receives Delta..., then exactly one Finished or Failed; called on the step thread.
        deadline: `time.monotonic()` second after which the request fails with DeadlineError, or None.
        arrival: `time.monotonic()` second of submission.
        phase, output_token_ids, num_computed_tokens, num_cached_tokens, block_table, slot: owned by the scheduler.
            num_computed_tokens counts tokens whose KV is in the cache; block_table lists its KV blocks in order;
            slot is the adapter's batch slot while running (NO_SLOT: base): a device slot, or what stands for several
            (adapters/composition.py).
        order: rank by submission, unique, set by the scheduler. Lower is older; a preempted request keeps it.
        seed: of this request's random numbers: the client's, or a fresh one.
        takes_likeliest: that of `params`, which every token asks for.
        token_counts: what penalties need, kept by the sampler; None until the first token of a request with penalties.
        tokens: what token ids mean, where the adapter brought a tokenizer of its own; None: what they mean to the base.
        scored: the text to score; nothing is generated then, and `params` mean nothing. None: a generation.
        capture: for the server's own requests (server/proof.py), which the observer does not hear of: receives the
            logits that the first token is sampled from, float32 [vocab] on the CPU; called on the step thread.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    adapter: Adaptation | None
    emit: Callable[[Event], None]
    deadline: float | None = None
    arrival: float = field(default_factory=time.monotonic)

    phase: Phase = Phase.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    slot: int = NO_SLOT
    order: int = -1
    seed: int = field(init=False)
    takes_likeliest: bool = field(init=False)
    token_counts: TokenCounts | None = None
    tokens: TokenRules | None = None
    scored: ScoredText | None = None
    capture: "Callable[[Tensor], None] | None" = None
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        """Fix the seed, so that a preempted request draws on where it was."""
        self.takes_likeliest = self.params.takes_likeliest
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed

    @property
    def adapter_id(self) -> str:
        """Its adapter's id, those of several joined by "+"; "" is the base."""
        return self.adapter.adapter_id if self.adapter is not None else ""

    @property
    def adapter_ids(self) -> tuple[str, ...]:
        """Every adapter that is charged for it, and whose caps hold for it; ("",) is the base."""
        return self.adapter.adapter_ids if self.adapter is not None else ("",)

    @property
    def num_tokens(self) -> int:
        """Prompt plus output so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_reusable_tokens(self) -> int:
        """Tokens, from the first on, that need not be computed if their KV is there: what follows is for its logits."""
        return self.num_tokens - 1 if self.scored is None else self.scored.next - 1

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt followed by output."""
        n = len(self.prompt_token_ids)
        if stop <= n:
            return self.prompt_token_ids[start:stop]
        if start >= n:
            return self.output_token_ids[start - n : stop - n]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - n]
