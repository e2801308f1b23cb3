"""GenerationService: one request from its protobuf message to its last event. Runs on the event loop's thread.

Nothing here knows how tokens are made: a request is checked, tokenized, bound to the adapter's current version and
handed to the engine; what comes back is written out. However a call ends, the engine hears of it.
"""

import dataclasses
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import structlog

from ..adapters.version import AdapterVersion
from ..protos.v1 import generation_pb2 as pb
from ..protos.v1.generation_pb2_grpc import GenerationServiceServicer
from . import convert
from .access import Access, OpenAccess
from .call_deadline import call_deadline
from .engine.request import Delta, Finished, Request
from .event_stream import EventBridge, EventStream
from .field_errors import blaming
from .interceptors import Context, current_request_id
from .prompts import PromptEncoder

# gRPC's clock for a deadline and ours may differ by this much.
DEADLINE_SLACK_S = 0.05
# Of an adapter reference that may be malformed: as long as a well-formed one can be.
MAX_LOGGED = 128 + 1 + 64  # characters


class EngineClient(Protocol):
    """What is used of the engine; both may be called on any thread and return at once."""

    def submit(self, request: Request) -> None:
        """Hand a request over. Raises a ServingError when it is not accepted."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request; nothing happens if it has ended."""
        ...


class AdapterResolver(Protocol):
    """What is used of the adapter manager; neither blocks on disk."""

    def resolve(self, reference: str, routing_key: str) -> AdapterVersion:
        """Pin the version that a new request gets.

        Args:
            reference: an id, an alias or `id@digest-prefix`.
            routing_key: decides among the targets of an alias; empty: one is drawn.

        Raises:
            AdapterNotFoundError, AdapterIdError, AdapterDigestError: there is none, or not just one.
        """
        ...

    def release(self, version: AdapterVersion) -> None:
        """Give one pin back."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Admitted:
    """A request that the engine has accepted."""

    version: AdapterVersion | None
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
                    return convert.unary_response(current_request_id.get(), admitted.version, deltas, event)
                deltas.append(event)
        raise AssertionError("the events of a request end with Finished or raise")

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Answer with `started`, deltas and `finished`."""
        async with self._admit(request, context) as admitted:
            yield convert.started(current_request_id.get(), admitted.version, admitted.prompt_tokens)
            async for event in admitted.events:
                yield convert.stream_response(event)

    @asynccontextmanager
    async def _admit(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[Admitted]:
        """Have a request accepted by the engine, and aborted if the block ends before it does."""
        arrival = time.monotonic()
        structlog.contextvars.bind_contextvars(adapter=request.adapter_id[:MAX_LOGGED])
        generation = convert.parse_generation(request)
        self._access.may_use(generation.name)  # "": the base
        self._prompts.check_vocabulary("stopping.stop_token_ids", generation.params.stop_token_ids)
        prompt = await self._prompts.encode(generation.prompt)
        max_tokens = convert.fit_max_tokens(generation.max_tokens, len(prompt), self._max_context)
        params = dataclasses.replace(generation.params, max_tokens=max_tokens)

        # From here to `submit` there is no await: nothing can cancel the call while only it holds the version.
        version = None
        if generation.reference:
            with blaming("adapter_id"):
                version = self._adapters.resolve(generation.reference, generation.routing_key)
        events = EventStream()
        # Clients choose request ids freely; the engine's are unique.
        engine_id = f"{current_request_id.get()}#{next(self._numbers)}"
        deadline = call_deadline(context)
        try:
            self._engine.submit(
                Request(
                    request_id=engine_id,
                    prompt_token_ids=prompt,
                    params=params,
                    adapter=version,
                    emit=self._bridge.deliver_to(events),
                    deadline=deadline,
                    arrival=arrival,
                )
            )
        except BaseException:
            if version is not None:
                self._adapters.release(version)
            raise

        structlog.contextvars.bind_contextvars(prompt_tokens=len(prompt))
        if version is not None:
            structlog.contextvars.bind_contextvars(
                adapter=version.adapter_id, version=version.digest[:12], reference=generation.reference
            )
        try:
            yield Admitted(version, len(prompt), events)
        finally:
            # A call that gRPC cancels because its deadline has come is left to the engine, which knows the deadline and
            # counts the request as late; aborted, it would count as cancelled.
            if not events.ended and (deadline is None or time.monotonic() < deadline - DEADLINE_SLACK_S):
                self._engine.abort(engine_id)
            structlog.contextvars.bind_contextvars(**events.summary(arrival))
