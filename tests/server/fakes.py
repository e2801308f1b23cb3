"""Stand-ins for what the services sit on, and a client and server in one process."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from lorikeet.adapters.errors import AdapterNotFoundError, ServingError
from lorikeet.adapters.version import AdapterVersion
from lorikeet.protos.v1.generation_pb2_grpc import GenerationServiceStub, add_GenerationServiceServicer_to_server
from lorikeet.server.engine.request import Delta, Event, Failed, Finished, FinishReason, Request
from lorikeet.server.errors import CancelledError
from lorikeet.server.event_stream import EventBridge
from lorikeet.server.generation_service import GenerationService
from lorikeet.server.interceptors import ErrorInterceptor
from lorikeet.server.prompts import PromptEncoder

VOCAB_SIZE = 100
MAX_CONTEXT = 64


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


async def wait_for(condition: Callable[[], object], timeout_s: float = 10) -> None:
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
    """Knows one adapter, `kjv`."""

    pins: int = 0

    def resolve(self, adapter_id: str) -> AdapterVersion:
        if adapter_id != "kjv":
            raise AdapterNotFoundError(f"There is no adapter {adapter_id!r}.", {"adapter_id": adapter_id})
        self.pins += 1
        return AdapterVersion("kjv", "d1" * 32)

    def release(self, version: AdapterVersion) -> None:
        self.pins -= 1


@dataclass
class Loopback:
    """A GenerationService on fakes, and a client of it."""

    engine: FakeEngine
    adapters: FakeAdapters
    calls: list[tuple[str, str, str]]
    stub: GenerationServiceStub


@asynccontextmanager
async def loopback(engine: FakeEngine | None = None) -> AsyncIterator[Loopback]:
    """Serve on a free port of this process."""
    engine = engine or FakeEngine()
    adapters = FakeAdapters()
    calls: list[tuple[str, str, str]] = []
    prompts = PromptEncoder(FakeTokenizer(), VOCAB_SIZE)
    bridge = EventBridge(asyncio.get_running_loop())
    server = grpc.aio.server(interceptors=[ErrorInterceptor(lambda *call: calls.append(call))])
    service = GenerationService(engine, adapters, prompts, bridge, MAX_CONTEXT)
    add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Loopback(engine, adapters, calls, GenerationServiceStub(channel))
    finally:
        await server.stop(1)
        prompts.close()
