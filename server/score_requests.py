"""Between the messages of Score and Tokenize and the plain types of the engine; beside `convert.py`."""

import asyncio
from dataclasses import dataclass
from typing import Final

from ..adapters.composition import Wish
from ..protos.v1 import generation_pb2 as pb
from . import convert
from .adapter_wishes import is_composed, parse_wishes
from .engine.request import Delta, Finished
from .engine.sampling_params import MAX_LOGPROBS
from .engine.scored_text import ScoredText
from .errors import BadRequestError, PromptTooLongError
from .prompts import TextPrompt, TokenPrompt

# Log probabilities of one answer, alternatives included. Each takes 18 bytes at most (a message's header and length, a
# varint of 32 bit, a double), so an answer stays below the 4 MiB that gRPC clients receive unless told otherwise.
MOST_LOGPROBS: Final = 200_000
# Tokens after which other calls get their turn on the event loop: the messages of thousands take it a good while.
_SLICE: Final = 64


@dataclass(frozen=True, slots=True)
class Scoring:
    """A checked ScoreRequest.

    Attributes:
        text: in one of its two forms.
        wishes: the adapters that answer; none: the base.
        is_composed: whether the answer says what was applied with which weights.
        routing_key: decides among the targets of an alias; empty: one is drawn.
        first: as the client gave it; None: all tokens but the very first are scored.
        top_logprobs: likeliest alternatives of each token.
    """

    text: TextPrompt | TokenPrompt
    wishes: tuple[Wish, ...]
    is_composed: bool
    routing_key: str
    first: int | None
    top_logprobs: int


def parse_scoring(request: pb.ScoreRequest) -> Scoring:
    """Check everything that can be checked without the base.

    Raises:
        BadRequestError: names the field, what was given and what is allowed.
        AdapterIdError, AdapterDigestError: what names an adapter is no reference.
    """
    if not 0 <= request.top_logprobs <= MAX_LOGPROBS:
        raise BadRequestError(
            f"top_logprobs is {request.top_logprobs}; allowed: 0 to {MAX_LOGPROBS}.", {"field": "top_logprobs"}
        )
    return Scoring(
        text=_text(request),
        wishes=parse_wishes(request),
        is_composed=is_composed(request),
        routing_key=convert.routing_key(request),
        first=request.first if request.HasField("first") else None,
        top_logprobs=request.top_logprobs,
    )


def scored_text(scoring: Scoring, token_ids: list[int], max_context: int) -> ScoredText:
    """What the engine is to score.

    Args:
        scoring: checked.
        token_ids: of its text.
        max_context: most tokens of a request.

    Raises:
        BadRequestError: there are too few tokens, `first` is not one of them, or the answer would be too large.
        PromptTooLongError: there are too many.
    """
    count = len(token_ids)
    field = "text" if isinstance(scoring.text, TextPrompt) else "token_ids"
    if count < 2:
        raise BadRequestError(
            f"{field} has {count} token; give 2 or more. Nothing comes before the first, so it has no probability.",
            {"field": field},
        )
    if count > max_context:
        raise PromptTooLongError(
            f"{field} has {count} tokens, and the context holds {max_context}. Score it in windows of at most "
            f"{max_context} tokens, with `first` behind those that a window repeats for context.",
            {"field": field, "prompt_tokens": str(count), "max_context": str(max_context)},
        )
    first = 1 if scoring.first is None else scoring.first
    if not 1 <= first < count:
        raise BadRequestError(
            f"first is {first}; {field} has {count} tokens, so allowed: 1 to {count - 1}.", {"field": "first"}
        )
    wanted = (count - first) * (1 + scoring.top_logprobs)
    if wanted > MOST_LOGPROBS:
        raise BadRequestError(
            f"{count - first} tokens with top_logprobs {scoring.top_logprobs} are {wanted} log probabilities, and an "
            f"answer holds {MOST_LOGPROBS}. Score it in windows, with `first` behind the tokens that are only context, "
            "or ask for fewer top_logprobs.",
            {"field": "top_logprobs" if scoring.top_logprobs else field},
        )
    return ScoredText(token_ids, first, scoring.top_logprobs)


async def score_response(
    request_id: str, by: convert.Answering, num_tokens: int, output: Delta, end: Finished
) -> pb.ScoreResponse:
    """The answer; `num_tokens` is the length of the text."""
    scores = output.logprobs
    response = pb.ScoreResponse(
        request_id=request_id,
        adapter=by.adapter,
        adapters=by.adapters,
        first=num_tokens - len(scores),
        num_tokens=num_tokens,
        cached_tokens=end.cached_tokens,
    )
    for start in range(0, len(scores), _SLICE):
        response.logprobs.extend(convert.logprobs(scores[start : start + _SLICE]))
        await asyncio.sleep(0)
    return response


def _text(request: pb.ScoreRequest) -> TextPrompt | TokenPrompt:
    given = [name for name, is_set in (("text", request.HasField("text")), ("token_ids", request.token_ids)) if is_set]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise BadRequestError(
            f"A request has exactly one of text and token_ids; this one has {found}.",
            {"field": given[-1] if given else "text"},
        )
    return text_prompt(request.text) if given == ["text"] else TokenPrompt(tuple(request.token_ids))


def text_prompt(text: str) -> TextPrompt:
    """A text that a field of that name brought.

    Raises:
        BadRequestError: it is empty.
    """
    if not text:
        raise BadRequestError("text is empty; give at least one character.", {"field": "text"})
    return TextPrompt(text, field="text")
