"""A thin, typed client of a Lorikeet server. The CLI uses it; so can any Python program.

    with LorikeetClient("127.0.0.1:50051") as client:
        for event in client.stream(prompt="In the beginning", adapter_id="kjv", max_tokens=64):
            print(event.delta.text, end="", flush=True)

Importing it costs no torch and no server code. One client serves any number of threads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..protos.v1 import adapters_pb2, generation_pb2
from ..protos.v1.adapters_pb2_grpc import AdapterServiceStub
from ..protos.v1.generation_pb2_grpc import GenerationServiceStub
from .addresses import DEFAULT_ADDRESS
from .status import remote_error

_CHANNEL_OPTIONS = [
    # Ping while a call waits, so that a server that vanished is noticed; the server holds no ping against us.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A long output with log probabilities outgrows gRPC's 4 MiB.
    ("grpc.max_receive_message_length", 64 * 2**20),
]


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of a generation; each is the field of that name in generation.proto, which documents it.

    Exactly one of `prompt`, `messages` (role, content) and `token_ids` is given.
    """

    prompt: str
    messages: Sequence[tuple[str, str]]
    token_ids: Sequence[int]
    adapter_id: str
    request_id: str
    max_tokens: int
    logprobs: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    min_tokens: int


def generate_request(**options: Unpack[GenerateOptions]) -> generation_pb2.GenerateRequest:
    """The request message of these options."""
    fields: dict[str, Any] = dict(options)
    messages = [generation_pb2.Message(role=role, content=content) for role, content in fields.pop("messages", ())]
    parts: dict[str, dict[str, Any]] = {"sampling": {}, "stopping": {}}
    for name, message in (("sampling", generation_pb2.Sampling), ("stopping", generation_pb2.Stopping)):
        for field in message.DESCRIPTOR.fields_by_name:
            if field in fields:
                parts[name][field] = fields.pop(field)
    return generation_pb2.GenerateRequest(
        messages=messages,
        sampling=generation_pb2.Sampling(**parts["sampling"]),
        stopping=generation_pb2.Stopping(**parts["stopping"]),
        **fields,
    )


class LorikeetClient:
    """A connection to one server. Use it in a `with` block, or close it.

    Every method raises RemoteError (status.py) when the server answers with an error or not at all.

    Args:
        address: `host:port` of the server.
        timeout_s: deadline of each call in seconds; None waits for as long as it takes.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout_s: float | None = None) -> None:
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        # The stubs' types know the async channel only.
        self._generation: Any = GenerationServiceStub(self._channel)
        self._adapters: Any = AdapterServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def generate(self, **options: Unpack[GenerateOptions]) -> generation_pb2.GenerateResponse:
        """The whole output at once."""
        with _errors():
            response: generation_pb2.GenerateResponse = self._generation.Generate(
                generate_request(**options), timeout=self._timeout_s
            )
            return response

    def stream(self, **options: Unpack[GenerateOptions]) -> Iterator[generation_pb2.GenerateStreamResponse]:
        """`started`, `delta`s and `finished` as they come; closing the iterator cancels the request."""
        with _errors():
            call = self._generation.GenerateStream(generate_request(**options), timeout=self._timeout_s)
            try:
                yield from call
            finally:
                call.cancel()

    def load_adapter(self, adapter_id: str, path: str = "") -> adapters_pb2.Adapter:
        """Load, or load again, an adapter from the server's disk."""
        with _errors():
            request = adapters_pb2.LoadAdapterRequest(adapter_id=adapter_id, path=path)
            response: adapters_pb2.LoadAdapterResponse = self._adapters.LoadAdapter(request, timeout=self._timeout_s)
            return response.adapter

    def unload_adapter(self, adapter_id: str) -> None:
        """Make an adapter unknown to later requests."""
        with _errors():
            request = adapters_pb2.UnloadAdapterRequest(adapter_id=adapter_id)
            self._adapters.UnloadAdapter(request, timeout=self._timeout_s)

    def get_adapter(self, adapter_id: str) -> adapters_pb2.Adapter:
        """Describe one adapter."""
        with _errors():
            request = adapters_pb2.GetAdapterRequest(adapter_id=adapter_id)
            response: adapters_pb2.GetAdapterResponse = self._adapters.GetAdapter(request, timeout=self._timeout_s)
            return response.adapter

    def list_adapters(self) -> list[adapters_pb2.Adapter]:
        """Describe all adapters, in the order of their ids; fetches every page."""
        adapters: list[adapters_pb2.Adapter] = []
        token = ""
        with _errors():
            while True:
                request = adapters_pb2.ListAdaptersRequest(page_token=token)
                page: adapters_pb2.ListAdaptersResponse = self._adapters.ListAdapters(request, timeout=self._timeout_s)
                adapters.extend(page.adapters)
                token = page.next_page_token
                if not token:
                    return adapters

    def is_serving(self, service: str = "") -> bool:
        """Whether the server reports SERVING.

        Args:
            service: full name of a service; "" is the server as a whole.
        """
        with _errors():
            request = health_pb2.HealthCheckRequest(service=service)
            response = self._health.Check(request, timeout=self._timeout_s)
            return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection."""
        self.close()


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise remote_error(error) from error
