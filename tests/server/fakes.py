"""Stand-ins for what the services sit on, and a client and server in one process. The manager: fake_manager.py."""

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import structlog
from lorikeet.adapters.adapter_tokenizer import BASE_VOCABULARY, AdapterVocabulary
from lorikeet.adapters.composition import CompositionPort
from lorikeet.adapters.errors import AdapterNotFoundError, ServingError
from lorikeet.adapters.reference import parse_reference
from lorikeet.adapters.version import AdapterVersion
from lorikeet.protos.v1 import adapters_pb2
from lorikeet.protos.v1.adapters_pb2_grpc import AdapterServiceStub
from lorikeet.protos.v1.generation_pb2_grpc import GenerationServiceStub, add_GenerationServiceServicer_to_server
from lorikeet.server.access import Access
from lorikeet.server.adapter_service import AdapterService
from lorikeet.server.engine.request import Delta, Event, Failed, Finished, FinishReason, Request
from lorikeet.server.errors import CancelledError, ClientNotAllowedError
from lorikeet.server.event_stream import EventBridge
from lorikeet.server.generation_service import GenerationService
from lorikeet.server.grpc_server import GrpcServer
from lorikeet.server.interceptors import ErrorInterceptor, current_request_id
from lorikeet.server.operations_service import OperationsService
from lorikeet.server.prompts import PromptEncoder
from lorikeet.server.status import RemoteError, remote_error

from .fake_manager import FakeManager
from .fake_merges import FakeMerges

# Of whatever is waited for: a machine that is far too busy is not what is tested.
PATIENCE_S = 90.0
VOCAB_SIZE = 100
MAX_CONTEXT = 64
VERSIONS = {
    "kjv": AdapterVersion("kjv", "d1" * 32),
    "prod": AdapterVersion("kjv", "d1" * 32),
    "devil": AdapterVersion("devil", "d2" * 32),
}


class FakeTokenizer:
    """A token for each character; a beginning-of-sequence token 1 if special tokens are wanted."""

    chat_template: str | None = "yes"

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [1] * add_special_tokens + [ord(character) % VOCAB_SIZE for character in text]

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        if conversation[0]["role"] == "assistant":
            raise ValueError("secret words of the template")
        return "".join(f"{turn['role'][0]}:{turn['content']}|" for turn in conversation)


def one_token_each(*texts: str) -> list[Event]:
    """What a request that writes these texts emits."""
    events: list[Event] = [Delta(text, (index,)) for index, text in enumerate(texts)]
    return [*events, Finished(FinishReason.STOP, 3, 1, len(texts))]


async def wait_for(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Poll until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.005)


@dataclass
class FakeEngine:
    """Plays `script` from a thread of its own for each request; an empty script waits for `abort`."""

    script: Callable[[Request], list[Event]] = lambda request: one_token_each("Hello", " world")
    refuse: ServingError | None = None
    submitted: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    on_abort: threading.Event = field(default_factory=threading.Event)

    def submit(self, request: Request) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.submitted.append(request)
        threading.Thread(target=self._play, args=(request,)).start()

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.on_abort.set()
        for request in self.submitted:
            if request.request_id == request_id:
                request.emit(Failed(CancelledError("The request was cancelled.")))

    def _play(self, request: Request) -> None:
        for event in self.script(request):
            request.emit(event)


@dataclass
class FakeAdapters:
    """Knows the adapters `kjv`, with its alias `prod`, and `devil`."""

    pins: int = 0
    fail: ServingError | None = None
    resolved: list[tuple[str, str]] = field(default_factory=list)

    refuse: ServingError | None = None  # compositions
    composition: CompositionPort = field(init=False)
    on_ready: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.composition = CompositionPort(self, 4)

    def resolve(self, reference: str, routing_key: str) -> AdapterVersion:
        if self.fail is not None:
            raise self.fail
        name = parse_reference(reference).name
        if name not in VERSIONS:
            raise AdapterNotFoundError(f"There is no adapter {name!r}.", {"adapter_id": name})
        self.resolved.append((reference, routing_key))
        self.pins += 1
        return VERSIONS[name]

    def check_composition(self, members: Sequence[tuple[AdapterVersion, float]]) -> None:
        if self.refuse is not None:
            raise self.refuse

    def vocabulary(self, versions: Iterable[AdapterVersion]) -> AdapterVocabulary:
        return BASE_VOCABULARY

    def release(self, version: AdapterVersion) -> None:
        self.pins -= 1


@dataclass
class OnlyAccess:
    """Allows these names; writes down what it was asked, and during which call."""

    uses: Sequence[str] = ()
    manages: Sequence[str] = ()
    sees: Sequence[str] = ()
    asked: list[tuple[str, str]] = field(default_factory=list)
    request_ids: set[str] = field(default_factory=set)

    def may_use(self, name: str) -> None:
        self._decide("use", name, self.uses)

    def may_manage(self, name: str) -> None:
        self._decide("manage", name, self.manages)

    def may_see(self, name: str) -> bool:
        self.request_ids.add(current_request_id.get())
        return name in self.sees

    def _decide(self, what: str, name: str, names: Sequence[str]) -> None:
        self.asked.append((what, name))
        self.request_ids.add(current_request_id.get())
        if name not in names:
            raise ClientNotAllowedError(f"This client may not {what} {name!r}.")


@dataclass
class Loopback:
    """A GenerationService on fakes, and a client of it."""

    engine: FakeEngine
    adapters: FakeAdapters
    calls: list[tuple[str, str, str]]
    stub: GenerationServiceStub


@asynccontextmanager
async def loopback(engine: FakeEngine | None = None, access: Access | None = None) -> AsyncIterator[Loopback]:
    """Serve generation alone on a free port of this process."""
    engine = engine or FakeEngine()
    adapters = FakeAdapters()
    calls: list[tuple[str, str, str]] = []
    prompts = PromptEncoder(FakeTokenizer(), VOCAB_SIZE)
    bridge = EventBridge(asyncio.get_running_loop())
    server = grpc.aio.server(interceptors=[ErrorInterceptor(lambda *call: calls.append(call))])
    service = GenerationService(engine, adapters.composition, prompts, bridge, MAX_CONTEXT, access)
    add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Loopback(engine, adapters, calls, GenerationServiceStub(channel))
    finally:
        await server.stop(1)
        prompts.close()


@asynccontextmanager
async def serve(
    manager: FakeManager | None = None,
    engine: FakeEngine | None = None,
    access: Access | None = None,
    options: Sequence[tuple[str, int]] | None = None,
    merges: FakeMerges | None = None,
) -> AsyncIterator[tuple[GrpcServer, grpc.aio.Channel, int]]:
    """A whole server on a free port of this process, and a channel with these options to it."""
    prompts = PromptEncoder(FakeTokenizer(), VOCAB_SIZE)
    bridge = EventBridge(asyncio.get_running_loop())
    composition = FakeAdapters().composition
    generation = GenerationService(engine or FakeEngine(), composition, prompts, bridge, MAX_CONTEXT, access)
    manager = manager or FakeManager()
    adapters = AdapterService(manager, access)
    merging = (merges or FakeMerges()).service(manager, access)
    operations = OperationsService(merging.operations, access)
    server = GrpcServer(2**20, lambda *call: None)
    port = await server.start("127.0.0.1", 0, generation, adapters, merging, operations)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield server, channel, port
    finally:
        await server.stop(1)
        await merging.close()
        adapters.close()
        prompts.close()


@contextmanager
def serve_on_thread(**parts: Any) -> Iterator[str]:
    """The same on a thread of its own, for clients that block: the address."""
    loop = asyncio.new_event_loop()
    started = threading.Event()
    stop = asyncio.Event()
    addresses = []

    async def run() -> None:
        async with serve(**parts) as (_, _, port):
            addresses.append(f"127.0.0.1:{port}")
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    with structlog.testing.capture_logs():  # by default they go to standard output, where the commands print
        thread.start()
        try:
            assert started.wait(PATIENCE_S)
            yield addresses[0]
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
    loop.close()


async def call(
    channel: grpc.aio.Channel, method: str, deadline_s: float | None = None, request_id: str = "", **fields: Any
) -> Any:
    """Call a method of AdapterService with these fields of its request."""
    request = getattr(adapters_pb2, f"{method}Request")(**fields)
    metadata = (("x-request-id", request_id),) if request_id else ()
    return await getattr(AdapterServiceStub(channel), method)(request, timeout=deadline_s, metadata=metadata)


async def error_of(call: Awaitable[object] | AsyncIterable[object]) -> RemoteError:
    """What a call that must fail answers, with one message or a stream of them."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if isinstance(call, AsyncIterable):
            [message async for message in call]
        else:
            await call
    return remote_error(caught.value)
