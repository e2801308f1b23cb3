"""GenerationService: one request from its protobuf message to its last event. Runs on the event loop's thread.

Nothing here knows how tokens are made: a request is checked, bound to the current versions of its adapters, tokenized
and handed to the engine; what comes back is written out. However a call ends, the engine hears of it.
"""

import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import structlog

from ..adapters.adaptation import Adaptation
from ..adapters.adapter_tokenizer import AdapterVocabulary
from ..adapters.composition import Wish
from ..adapters.reference import parse_reference
from ..protos.v1 import generation_pb2 as pb
from ..protos.v1.generation_pb2_grpc import GenerationServiceServicer
from . import convert
from .access import Access, OpenAccess
from .adapter_wishes import logged_wishes
from .call_deadline import call_deadline
from .engine.request import Delta, Finished, Request
from .event_stream import EventBridge, EventStream
from .interceptors import Context, current_request_id
from .prompts import PromptEncoder

# gRPC's clock for a deadline and ours may differ by this much.
DEADLINE_SLACK_S = 0.05


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


@dataclasses.dataclass(frozen=True, slots=True)
class Admitted:
    """A request that the engine has accepted."""

    by: convert.Answering
    prompt_tokens: int
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
        async with self._admit(request, context) as admitted:
            deltas: list[Delta] = []
            async for event in admitted.events:
                if isinstance(event, Finished):
                    return convert.unary_response(current_request_id.get(), admitted.by, deltas, event)
                deltas.append(event)
        raise AssertionError("the events of a request end with Finished or raise")

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Answer with `started`, deltas and `finished`."""
        async with self._admit(request, context) as admitted:
            yield convert.started(current_request_id.get(), admitted.by, admitted.prompt_tokens)
            async for event in admitted.events:
                yield convert.stream_response(event)

    @asynccontextmanager
    async def _admit(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[Admitted]:
        """Have a request accepted by the engine, and aborted if the block ends before it does."""
        arrival = time.monotonic()
        structlog.contextvars.bind_contextvars(adapter=logged_wishes(request))
        generation = convert.parse_generation(request)
        for name in dict.fromkeys(parse_reference(wish.reference).name for wish in generation.wishes) or ("",):
            self._access.may_use(name)  # "": the base
        # Before the prompt is tokenized: an adapter can bring a tokenizer of its own.
        adaptation = None
        if generation.wishes:
            adaptation = self._adapters.resolve(generation.wishes, generation.routing_key)
        events = EventStream()
        # Clients choose request ids freely; the engine's are unique.
        engine_id = f"{current_request_id.get()}#{next(self._numbers)}"
        deadline = call_deadline(context)
        try:
            vocabulary = self._adapters.vocabulary(adaptation)
            self._prompts.check_vocabulary("stopping.stop_token_ids", generation.params.stop_token_ids, vocabulary)
            prompt = await self._prompts.encode(generation.prompt, vocabulary)
            max_tokens = convert.fit_max_tokens(generation.max_tokens, len(prompt), self._max_context)
            # From here to the end of `submit` there is no await: nothing can cancel the call in between.
            self._engine.submit(
                Request(
                    request_id=engine_id,
                    prompt_token_ids=prompt,
                    params=dataclasses.replace(generation.params, max_tokens=max_tokens),
                    adapter=adaptation,
                    emit=self._bridge.deliver_to(events),
                    deadline=deadline,
                    arrival=arrival,
                    tokens=self._prompts.rules(vocabulary),
                )
            )
        except BaseException:
            if adaptation is not None:
                self._adapters.release(adaptation)
            raise

        structlog.contextvars.bind_contextvars(prompt_tokens=len(prompt))
        by = convert.answering(adaptation, is_composed=generation.is_composed)
        if adaptation is not None:
            structlog.contextvars.bind_contextvars(
                adapter=adaptation.adapter_id, version=by.versions, reference=logged_wishes(request)
            )
        try:
            yield Admitted(by, len(prompt), events)
        finally:
            # A call that gRPC cancels because its deadline has come is left to the engine, which knows the deadline and
            # counts the request as late; aborted, it would count as cancelled.
            if not events.ended and (deadline is None or time.monotonic() < deadline - DEADLINE_SLACK_S):
                self._engine.abort(engine_id)
            structlog.contextvars.bind_contextvars(**events.summary(arrival))
