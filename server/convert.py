"""Between protobuf messages and the plain types of the engine. With the services, the only code that sees protobuf."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..adapters.adaptation import Adaptation
from ..adapters.composition import Wish
from ..adapters.version import AdapterVersion
from ..protos.v1 import generation_pb2 as pb
from .adapter_wishes import is_composed, parse_wishes
from .engine.request import Delta, Finished, FinishReason, TokenLogprob
from .engine.sampling_params import SamplingParams
from .errors import BadRequestError, PromptTooLongError
from .prompts import ChatPrompt, Prompt, TextPrompt, TokenPrompt

# How much a request without max_tokens may generate, if the context has room for it; stated in generation.proto.
DEFAULT_MAX_TOKENS = 256
MAX_ROUTING_KEY = 256  # characters

_REASONS = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}

# Where the fields of SamplingParams are in the request, for error details.
_FIELD_PATHS = {
    name: f"{message.DESCRIPTOR.name.lower()}.{name}"
    for message in (pb.Sampling, pb.Stopping)
    for name in message.DESCRIPTOR.fields_by_name
}


@dataclass(frozen=True, slots=True)
class Generation:
    """A checked GenerateRequest.

    Attributes:
        prompt: in one of its three forms.
        wishes: the adapters that answer; none: the base.
        is_composed: whether the answer says what was applied with which weights.
        routing_key: decides among the targets of an alias; empty: one is drawn.
        params: its `max_tokens` is a default while `max_tokens` is None: see `fit_max_tokens`.
        max_tokens: as the client gave it.
    """

    prompt: Prompt
    wishes: tuple[Wish, ...]
    is_composed: bool
    routing_key: str
    params: SamplingParams
    max_tokens: int | None


def parse_generation(request: pb.GenerateRequest) -> Generation:
    """Check everything that can be checked without the base.

    Raises:
        BadRequestError: names the field, what was given and what is allowed.
        AdapterIdError, AdapterDigestError: what names an adapter is no reference.
    """
    return Generation(
        prompt=_prompt(request),
        wishes=parse_wishes(request),
        is_composed=is_composed(request),
        routing_key=routing_key(request),
        params=_params(request),
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
    )


def fit_max_tokens(max_tokens: int | None, prompt_tokens: int, max_context: int) -> int:
    """How many tokens a request may generate.

    Args:
        max_tokens: as the client gave it; None: up to DEFAULT_MAX_TOKENS, as far as the context has room.
        prompt_tokens: length of the prompt.
        max_context: most tokens of prompt plus output.

    Raises:
        PromptTooLongError: they do not fit.
    """
    room = max_context - prompt_tokens
    if (max_tokens or 1) > room:
        asked = "at least one token" if max_tokens is None else f"max_tokens {max_tokens}"
        remedy = f"lower max_tokens to {room} or shorten the prompt" if room > 0 else "shorten the prompt"
        raise PromptTooLongError(
            f"The prompt has {prompt_tokens} tokens; with {asked} to generate that is "
            f"{prompt_tokens + (max_tokens or 1)}, and the context holds {max_context}. To fit, {remedy}.",
            {
                "field": "max_tokens" if room > 0 else "prompt",
                "prompt_tokens": str(prompt_tokens),
                "max_context": str(max_context),
            },
        )
    return min(DEFAULT_MAX_TOKENS, room) if max_tokens is None else max_tokens


@dataclass(frozen=True, slots=True)
class Answering:
    """What answers a request, as the answer says it: one adapter (the empty message is the base), or a list.

    Attributes:
        adapter: None where there is a list.
        adapters: in the order of their ids.
    """

    adapter: pb.AdapterVersion | None
    adapters: tuple[pb.AppliedAdapter, ...]

    @property
    def versions(self) -> str:
        """Shortened digests, for the log."""
        found = [each.adapter for each in self.adapters] if self.adapter is None else [self.adapter]
        return "+".join(each.version[:12] for each in found)


def answering(adaptation: Adaptation | None, *, is_composed: bool) -> Answering:
    """What answers; `is_composed` is that of the request."""
    if not is_composed:
        return Answering(pb.AdapterVersion() if adaptation is None else _version(adaptation.versions[0]), ())
    members = () if adaptation is None else adaptation.members
    applied = [pb.AppliedAdapter(adapter=_version(member.version), weight=member.weight) for member in members]
    return Answering(None, tuple(sorted(applied, key=lambda each: (each.adapter.adapter_id, each.adapter.version))))


def started(request_id: str, by: Answering, prompt_tokens: int) -> pb.GenerateStreamResponse:
    """The first message of a stream."""
    return pb.GenerateStreamResponse(
        started=pb.Started(request_id=request_id, adapter=by.adapter, adapters=by.adapters, prompt_tokens=prompt_tokens)
    )


def stream_response(event: Delta | Finished) -> pb.GenerateStreamResponse:
    """A later message of a stream."""
    if isinstance(event, Delta):
        delta = pb.Delta(text=event.text, token_ids=event.token_ids, logprobs=logprobs(event.logprobs))
        return pb.GenerateStreamResponse(delta=delta)
    finished = pb.Finished(finish_reason=_REASONS[event.reason], usage=usage(event))
    if isinstance(event.stop, str):
        finished.stop_string = event.stop
    elif event.stop is not None:
        finished.stop_token_id = event.stop
    return pb.GenerateStreamResponse(finished=finished)


def unary_response(request_id: str, by: Answering, deltas: Sequence[Delta], end: Finished) -> pb.GenerateResponse:
    """The whole output at once."""
    response = pb.GenerateResponse(
        request_id=request_id,
        adapter=by.adapter,
        adapters=by.adapters,
        text="".join(delta.text for delta in deltas),
        finish_reason=_REASONS[end.reason],
        usage=usage(end),
    )
    for delta in deltas:
        response.token_ids.extend(delta.token_ids)
        response.logprobs.extend(logprobs(delta.logprobs))
    if isinstance(end.stop, str):
        response.stop_string = end.stop
    elif end.stop is not None:
        response.stop_token_id = end.stop
    return response


def usage(end: Finished) -> pb.Usage:
    """Token counts of a request."""
    return pb.Usage(
        prompt_tokens=end.prompt_tokens, cached_tokens=end.cached_tokens, generated_tokens=end.output_tokens
    )


def logprobs(entries: Sequence[TokenLogprob]) -> list[pb.TokenLogprob]:
    """Log probabilities of tokens."""
    return [
        pb.TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=[pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top],
        )
        for entry in entries
    ]


def _version(version: AdapterVersion) -> pb.AdapterVersion:
    return pb.AdapterVersion(adapter_id=version.adapter_id, version=version.digest)


def _prompt(request: pb.GenerateRequest) -> Prompt:
    given: dict[str, Prompt] = {}
    if request.HasField("prompt"):
        given["prompt"] = TextPrompt(request.prompt)
    if request.messages:
        given["messages"] = ChatPrompt(tuple((message.role, message.content) for message in request.messages))
    if request.token_ids:
        given["token_ids"] = TokenPrompt(tuple(request.token_ids))
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise BadRequestError(
            f"A request has exactly one of prompt, messages and token_ids; this one has {found}.",
            {"field": list(given)[-1] if given else "prompt"},
        )
    prompt = next(iter(given.values()))
    if prompt == TextPrompt(""):
        raise BadRequestError("prompt is empty; give at least one character.", {"field": "prompt"})
    if isinstance(prompt, ChatPrompt):
        for index, (role, _) in enumerate(prompt.messages):
            if not role:
                raise BadRequestError(
                    f"messages[{index}].role is empty; give system, user, assistant or tool.",
                    {"field": f"messages[{index}].role"},
                )
    return prompt


def routing_key(request: pb.GenerateRequest | pb.ScoreRequest | pb.TokenizeRequest) -> str:
    """What decides among the targets of an alias.

    Raises:
        BadRequestError: it is too long or has characters that do not belong into a log.
    """
    key = request.routing_key
    if len(key) > MAX_ROUTING_KEY or not key.isprintable():
        raise BadRequestError(
            f"routing_key has {len(key)} characters; allowed: at most {MAX_ROUTING_KEY}, all of them printable.",
            {"field": "routing_key"},
        )
    return key


def _params(request: pb.GenerateRequest) -> SamplingParams:
    """Sampling and stopping; a field that was not set gets SamplingParams' default, which generation.proto states."""
    values: dict[str, object] = {
        field.name: value for message in (request.sampling, request.stopping) for field, value in message.ListFields()
    }
    for name in ("stop", "stop_token_ids"):
        if name in values:
            values[name] = tuple(getattr(request.stopping, name))
    if request.HasField("logprobs"):
        values["logprobs"] = request.logprobs
    values["max_tokens"] = request.max_tokens if request.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    try:
        return SamplingParams(**values)  # type: ignore[arg-type]  # names and types are those of the proto
    except BadRequestError as error:
        name = error.metadata.get("field", "")
        error.metadata["field"] = _FIELD_PATHS.get(name, name)
        raise
