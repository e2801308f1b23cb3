"""GenerationService: one request from its protobuf message to its last event. Runs on the event loop's thread.

Nothing here knows how tokens are made: a request is checked, bound to the current versions of its adapters, tokenized
and handed to the engine; what comes back is written out. However a call ends, the engine hears of it.
"""

import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, Protocol

import structlog

from ..adapters.adaptation import Adaptation
from ..adapters.adapter_tokenizer import AdapterVocabulary
from ..adapters.composition import Wish
from ..adapters.reference import parse_reference
from ..protos.v1 import generation_pb2 as pb
from ..protos.v1.generation_pb2_grpc import GenerationServiceServicer
from . import convert
from .access import Access, OpenAccess
from .adapter_wishes import MAX_LOGGED, logged_wishes, parse_wishes
from .call_deadline import call_deadline
from .engine.request import Request
from .engine.sampling_params import SamplingParams
from .engine.scored_text import ScoredText
from .engine.token_rules import TokenRules
from .event_stream import EventBridge, EventStream
from .interceptors import Context, current_request_id
from .prompts import PromptEncoder
from .score_requests import parse_scoring, score_response, scored_text, text_prompt

# gRPC's clock for a deadline and ours may differ by this much.
DEADLINE_SLACK_S = 0.05
# Of a request that generates nothing.
_UNUSED: Final = SamplingParams()


class EngineClient(Protocol):
    """What is used of the engine; both may be called on any thread and return at once."""

    def submit(self, request: Request) -> None:
        """Hand a request over. Raises a ServingError when it is not accepted."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request; nothing happens if it has ended."""
        ...


class AdapterResolver(Protocol):
    """What is used of the adapters (a `CompositionPort`); nothing blocks on disk."""

    def resolve(self, wishes: Sequence[Wish], routing_key: str) -> Adaptation:
        """Pin the versions that a new request gets.

        Args:
            wishes: what it names, at least one.
            routing_key: decides among the targets of an alias; empty: one is drawn.

        Raises:
            AdapterNotFoundError, AdapterIdError, AdapterDigestError: there is no such version, or not just one.
            AdapterCompositionError, AdapterMemoryError: they cannot answer together, or not with these weights.
        """
        ...

    def vocabulary(self, adaptation: Adaptation | None) -> AdapterVocabulary:
        """The token ids that pinned versions, or the base, know."""
        ...

    def release(self, adaptation: Adaptation) -> None:
        """Give the pins of one `resolve` back."""
        ...


class Addressed(Protocol):
    """Whom a checked request is for."""

    @property
    def wishes(self) -> tuple[Wish, ...]:
        """The adapters that answer; none: the base."""
        ...

    @property
    def is_composed(self) -> bool:
        """Whether the answer says what was applied with which weights."""
        ...

    @property
    def routing_key(self) -> str:
        """Decides among the targets of an alias; empty: one is drawn."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What the engine is to do; the fields are those of its `Request`."""

    prompt_token_ids: list[int]
    params: SamplingParams
    tokens: TokenRules | None = None
    scored: ScoredText | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Admitted:
    """A request that the engine has accepted."""

    by: convert.Answering
    work: Work
    events: EventStream


class GenerationService(GenerationServiceServicer):
    """The RPCs of GenerationService.

    Args:
        engine: runs requests, and gives each version back when its request ends.
        adapters: knows the versions.
        prompts: tokenizes.
        bridge: carries events from the step thread.
        max_context: most tokens of prompt plus output.
        access: decides what each client may use; None: everything.
    """

    def __init__(
        self,
        engine: EngineClient,
        adapters: AdapterResolver,
        prompts: PromptEncoder,
        bridge: EventBridge,
        max_context: int,
        access: Access | None = None,
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._prompts = prompts
        self._bridge = bridge
        self._max_context = max_context
        self._access = OpenAccess() if access is None else access
        self._numbers = itertools.count()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """Answer with the whole output at once."""
        async with self._generate(request, context) as admitted:
            output, end = await admitted.events.whole()
            return convert.unary_response(current_request_id.get(), admitted.by, [output], end)

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Answer with `started`, deltas and `finished`."""
        async with self._generate(request, context) as admitted:
            yield convert.started(current_request_id.get(), admitted.by, len(admitted.work.prompt_token_ids))
            async for event in admitted.events:
                yield convert.stream_response(event)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Answer with the log probability of each token."""
        structlog.contextvars.bind_contextvars(adapter=logged_wishes(request))
        scoring = parse_scoring(request)

        async def prepare(vocabulary: AdapterVocabulary) -> Work:
            token_ids = await self._prompts.encode(scoring.text, vocabulary)
            text = scored_text(scoring, token_ids, self._max_context)
            return Work(text.prompt_token_ids, _UNUSED, scored=text)

        async with self._admit(scoring, logged_wishes(request), prepare, context) as admitted:
            num_tokens = len(admitted.work.prompt_token_ids) + 1
            output, end = await admitted.events.whole()
            return await score_response(current_request_id.get(), admitted.by, num_tokens, output, end)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Answer with the tokens of a text."""
        structlog.contextvars.bind_contextvars(adapter=request.adapter_id[:MAX_LOGGED])
        routing_key = convert.routing_key(request)
        text = text_prompt(request.text)
        wishes = parse_wishes(pb.ScoreRequest(adapter_id=request.adapter_id))
        adaptation = self._resolve(wishes, routing_key)
        try:
            token_ids = await self._prompts.encode(text, self._adapters.vocabulary(adaptation))
        finally:
            if adaptation is not None:
                self._adapters.release(adaptation)
        return pb.TokenizeResponse(
            request_id=current_request_id.get(),
            adapter=convert.answering(adaptation, is_composed=False).adapter,
            token_ids=token_ids,
            max_context=self._max_context,
        )

    @asynccontextmanager
    async def _generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[Admitted]:
        """Have a generation accepted, as `_admit`."""
        structlog.contextvars.bind_contextvars(adapter=logged_wishes(request))
        generation = convert.parse_generation(request)

        async def prepare(vocabulary: AdapterVocabulary) -> Work:
            self._prompts.check_vocabulary("stopping.stop_token_ids", generation.params.stop_token_ids, vocabulary)
            prompt = await self._prompts.encode(generation.prompt, vocabulary)
            max_tokens = convert.fit_max_tokens(generation.max_tokens, len(prompt), self._max_context)
            params = dataclasses.replace(generation.params, max_tokens=max_tokens)
            return Work(prompt, params, self._prompts.rules(vocabulary))

        async with self._admit(generation, logged_wishes(request), prepare, context) as admitted:
            yield admitted

    def _resolve(self, wishes: Sequence[Wish], routing_key: str) -> Adaptation | None:
        """Pin what a request names, after asking whether this client may use it; None: the base."""
        for name in dict.fromkeys(parse_reference(wish.reference).name for wish in wishes) or ("",):
            self._access.may_use(name)  # "": the base
        return self._adapters.resolve(wishes, routing_key) if wishes else None

    @asynccontextmanager
    async def _admit(
        self,
        addressed: Addressed,
        reference: str,
        prepare: Callable[[AdapterVocabulary], Awaitable[Work]],
        context: Context,
    ) -> AsyncIterator[Admitted]:
        """Have a request accepted by the engine, and aborted if the block ends before it does.

        Args:
            addressed: the checked request.
            reference: what it names, for the log.
            prepare: makes it the engine's, with the token ids that its adapters know.
            context: of the call.
        """
        arrival = time.monotonic()
        # Before the prompt is tokenized: an adapter can bring a tokenizer of its own.
        adaptation = self._resolve(addressed.wishes, addressed.routing_key)
        # Clients choose request ids freely; the engine's are unique.
        engine_id = f"{current_request_id.get()}#{next(self._numbers)}"
        deadline = call_deadline(context)
        try:
            work = await prepare(self._adapters.vocabulary(adaptation))
            events = EventStream(is_scored=work.scored is not None)
            # From here to the end of `submit` there is no await: nothing can cancel the call in between.
            self._engine.submit(
                Request(
                    request_id=engine_id,
                    prompt_token_ids=work.prompt_token_ids,
                    params=work.params,
                    adapter=adaptation,
                    emit=self._bridge.deliver_to(events),
                    deadline=deadline,
                    arrival=arrival,
                    tokens=work.tokens,
                    scored=work.scored,
                )
            )
        except BaseException:
            if adaptation is not None:
                self._adapters.release(adaptation)
            raise

        structlog.contextvars.bind_contextvars(prompt_tokens=len(work.prompt_token_ids))
        by = convert.answering(adaptation, is_composed=addressed.is_composed)
        if adaptation is not None:
            structlog.contextvars.bind_contextvars(
                adapter=adaptation.adapter_id, version=by.versions, reference=reference
            )
        try:
            yield Admitted(by, work, events)
        finally:
            # A call that gRPC cancels because its deadline has come is left to the engine, which knows the deadline and
            # counts the request as late; aborted, it would count as cancelled.
            if not events.ended and (deadline is None or time.monotonic() < deadline - DEADLINE_SLACK_S):
                self._engine.abort(engine_id)
            structlog.contextvars.bind_contextvars(**events.summary(arrival))
