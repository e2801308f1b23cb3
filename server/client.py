"""A thin, typed client of a Lorikeet server. The CLI uses it; so can any Python program.

    with LorikeetClient("127.0.0.1:50051") as client:
        for event in client.stream(prompt="In the beginning", adapter_id="kjv", max_tokens=64):
            print(event.delta.text, end="", flush=True)
        client.generate(prompt="In the beginning", adapters={"kjv": 0.7, "devil": 0.3})
        client.set_alias("prod", {"kjv@3f9c": 9, "kjv@81d0": 1})
        client.merges.follow(client.merges.start({"kjv": 1.0}, "kjv-merged", texts=[held_out]))

Importing it costs no torch and no server code. One client serves any number of threads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..protos.v1 import adapters_pb2, generation_pb2
from ..protos.v1.adapters_pb2_grpc import AdapterServiceStub
from ..protos.v1.generation_pb2_grpc import GenerationServiceStub
from .access import CLIENT_KEY, check_client_name
from .addresses import DEFAULT_ADDRESS
from .client_merges import MergeCalls
from .status import remote_error

_CHANNEL_OPTIONS = [
    # Ping while a call waits, so that a server that vanished is noticed; the server holds no ping against us.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A long output with log probabilities outgrows gRPC's 4 MiB.
    ("grpc.max_receive_message_length", 64 * 2**20),
]

# Where PrefetchAdapter and PinAdapter bring an adapter to.
TierName = Literal["host", "device"]

# Each an id or `id@digest-prefix`, with its share of the requests relative to the rest.
AliasTargets = Mapping[str, float] | Sequence[tuple[str, float]]

# Each an id, an alias or `id@digest-prefix`, with what its delta is multiplied by.
WeightedAdapters = Mapping[str, float] | Sequence[tuple[str, float]]


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of a generation; each is the field of that name in generation.proto, which documents it.

    Exactly one of `prompt`, `messages` (role, content) and `token_ids` is given.
    """

    prompt: str
    messages: Sequence[tuple[str, str]]
    token_ids: Sequence[int]
    adapter_id: str
    strength: float
    adapters: WeightedAdapters
    routing_key: str
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


class ScoreOptions(TypedDict, total=False):
    """Keyword arguments of a score; each is the field of that name in generation.proto, which documents it.

    Exactly one of `text` and `token_ids` is given.
    """

    text: str
    token_ids: Sequence[int]
    adapter_id: str
    strength: float
    adapters: WeightedAdapters
    routing_key: str
    request_id: str
    first: int
    top_logprobs: int


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of a load; each is the field of that name in adapters.proto, which documents it."""

    source: str
    expected_version: str
    allow_zero: bool
    allow_other_base: bool


def generate_request(**options: Unpack[GenerateOptions]) -> generation_pb2.GenerateRequest:
    """The request message of these options."""
    fields: dict[str, Any] = dict(options)
    messages = [generation_pb2.Message(role=role, content=content) for role, content in fields.pop("messages", ())]
    adapters = _weighted(fields.pop("adapters", ()))
    parts: dict[str, dict[str, Any]] = {"sampling": {}, "stopping": {}}
    for name, message in (("sampling", generation_pb2.Sampling), ("stopping", generation_pb2.Stopping)):
        for field in message.DESCRIPTOR.fields_by_name:
            if field in fields:
                parts[name][field] = fields.pop(field)
    return generation_pb2.GenerateRequest(
        messages=messages,
        adapters=adapters,
        sampling=generation_pb2.Sampling(**parts["sampling"]),
        stopping=generation_pb2.Stopping(**parts["stopping"]),
        **fields,
    )


def score_request(**options: Unpack[ScoreOptions]) -> generation_pb2.ScoreRequest:
    """The request message of these options."""
    fields: dict[str, Any] = dict(options)
    return generation_pb2.ScoreRequest(adapters=_weighted(fields.pop("adapters", ())), **fields)


class LorikeetClient:
    """A connection to one server. Use it in a `with` block, or close it.

    Every method raises RemoteError (status.py) when the server answers with an error or not at all.

    Args:
        address: `host:port` of the server.
        timeout_s: deadline of each call in seconds; None waits for as long as it takes.
        client_name: who calls, for the server's policy file; printable ASCII. Empty: nobody in particular.

    Attributes:
        merges: starts and follows merges.

    Raises:
        ValueError: client_name cannot be sent.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_s: float | None = None, client_name: str = ""
    ) -> None:
        metadata = ((CLIENT_KEY, check_client_name(client_name)),) if client_name else ()
        self._options: dict[str, Any] = {"timeout": timeout_s, "metadata": metadata}
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        # The stubs' types know the async channel only.
        self._generation: Any = GenerationServiceStub(self._channel)
        self._adapters: Any = AdapterServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self.merges = MergeCalls(self._channel, self._call)

    def generate(self, **options: Unpack[GenerateOptions]) -> generation_pb2.GenerateResponse:
        """The whole output at once."""
        response: generation_pb2.GenerateResponse = self._call(self._generation.Generate, generate_request(**options))
        return response

    def stream(self, **options: Unpack[GenerateOptions]) -> Iterator[generation_pb2.GenerateStreamResponse]:
        """`started`, `delta`s and `finished` as they come; closing the iterator cancels the request."""
        with _errors():
            call = self._generation.GenerateStream(generate_request(**options), **self._options)
            try:
                yield from call
            finally:
                call.cancel()

    def score(self, **options: Unpack[ScoreOptions]) -> generation_pb2.ScoreResponse:
        """The log probability of each token of a text, given those before it."""
        response: generation_pb2.ScoreResponse = self._call(self._generation.Score, score_request(**options))
        return response

    def tokenize(self, text: str, adapter_id: str = "") -> generation_pb2.TokenizeResponse:
        """The tokens of a text as `score` and `generate` read it, and how many a request may have."""
        request = generation_pb2.TokenizeRequest(text=text, adapter_id=adapter_id)
        response: generation_pb2.TokenizeResponse = self._call(self._generation.Tokenize, request)
        return response

    def load_adapter(self, adapter_id: str, path: str = "", **options: Unpack[LoadOptions]) -> adapters_pb2.Adapter:
        """Load, or load again, an adapter.

        Args:
            adapter_id: the id to publish it under.
            path: its folder inside one of the server's adapter directories; empty: the one named adapter_id, or
                `source` if that is given.
            options: other fields of the request.
        """
        request = adapters_pb2.LoadAdapterRequest(adapter_id=adapter_id, path=path, **options)
        response: adapters_pb2.LoadAdapterResponse = self._call(self._adapters.LoadAdapter, request)
        return response.adapter

    def plan_load(
        self, adapter_id: str, path: str = "", **options: Unpack[LoadOptions]
    ) -> adapters_pb2.LoadAdapterResponse:
        """Have everything read and checked that `load_adapter` would, and change nothing; the answer has a plan."""
        request = adapters_pb2.LoadAdapterRequest(adapter_id=adapter_id, path=path, dry_run=True, **options)
        response: adapters_pb2.LoadAdapterResponse = self._call(self._adapters.LoadAdapter, request)
        return response

    def unload_adapter(self, adapter_id: str) -> None:
        """Make an adapter unknown to later requests."""
        self._call(self._adapters.UnloadAdapter, adapters_pb2.UnloadAdapterRequest(adapter_id=adapter_id))

    def rollback_adapter(self, adapter_id: str, version: str = "") -> adapters_pb2.Adapter:
        """Make an earlier version current again.

        Args:
            adapter_id: whose version.
            version: digest or its beginning, 4 digits or more; empty: the version that was current before.
        """
        request = adapters_pb2.RollbackAdapterRequest(adapter_id=adapter_id, version=version)
        response: adapters_pb2.RollbackAdapterResponse = self._call(self._adapters.RollbackAdapter, request)
        return response.adapter

    def get_adapter(self, reference: str) -> adapters_pb2.Adapter:
        """Describe one adapter: an id, in its current version, or `id@digest-prefix`."""
        return self.describe_adapter(reference).adapter

    def describe_adapter(self, reference: str) -> adapters_pb2.GetAdapterResponse:
        """Describe one adapter, as `get_adapter`, and all known versions of its id."""
        request = adapters_pb2.GetAdapterRequest(adapter_id=reference)
        response: adapters_pb2.GetAdapterResponse = self._call(self._adapters.GetAdapter, request)
        return response

    def list_adapters(self) -> list[adapters_pb2.Adapter]:
        """Describe all adapters, in the order of their ids; fetches every page."""
        adapters: list[adapters_pb2.Adapter] = []
        for page in self._pages(self._adapters.ListAdapters, adapters_pb2.ListAdaptersRequest):
            adapters.extend(page.adapters)
        return adapters

    def prefetch_adapter(self, reference: str, tier: TierName = "device") -> adapters_pb2.Adapter:
        """Bring a version into a tier without keeping it there, and return when it is there.

        Args:
            reference: an id, an alias with one target, or `id@digest-prefix`.
            tier: where to.
        """
        request = adapters_pb2.PrefetchAdapterRequest(adapter_id=reference, tier=_tier_value(tier))
        response: adapters_pb2.PrefetchAdapterResponse = self._call(self._adapters.PrefetchAdapter, request)
        return response.adapter

    def pin_adapter(self, adapter_id: str, tier: TierName = "device") -> adapters_pb2.Adapter:
        """Keep an adapter, in whatever version is current, in a tier, and return when it is there."""
        request = adapters_pb2.PinAdapterRequest(adapter_id=adapter_id, tier=_tier_value(tier))
        response: adapters_pb2.PinAdapterResponse = self._call(self._adapters.PinAdapter, request)
        return response.adapter

    def unpin_adapter(self, adapter_id: str) -> adapters_pb2.Adapter:
        """Let a pinned adapter be evicted again."""
        request = adapters_pb2.UnpinAdapterRequest(adapter_id=adapter_id)
        response: adapters_pb2.UnpinAdapterResponse = self._call(self._adapters.UnpinAdapter, request)
        return response.adapter

    def set_alias(self, name: str, targets: str | AliasTargets) -> adapters_pb2.Alias:
        """Create an alias, or move it at once.

        Args:
            name: what requests may name then.
            targets: one, or several with their weights.

        Raises:
            ValueError: a weight is 0, which on the wire would mean 1.
        """
        if isinstance(targets, str):
            targets = {targets: 1.0}
        pairs = targets.items() if isinstance(targets, Mapping) else targets
        if not all(weight for _, weight in pairs):
            raise ValueError("a weight is above 0; leave a target out that shall get no requests")
        messages = [adapters_pb2.AliasTarget(adapter_id=target, weight=weight) for target, weight in pairs]
        request = adapters_pb2.SetAliasRequest(alias=adapters_pb2.Alias(name=name, targets=messages))
        response: adapters_pb2.SetAliasResponse = self._call(self._adapters.SetAlias, request)
        return response.alias

    def delete_alias(self, name: str) -> None:
        """Make an alias unknown to later requests."""
        self._call(self._adapters.DeleteAlias, adapters_pb2.DeleteAliasRequest(name=name))

    def list_aliases(self) -> list[adapters_pb2.Alias]:
        """Describe all aliases, in the order of their names; fetches every page."""
        aliases: list[adapters_pb2.Alias] = []
        for page in self._pages(self._adapters.ListAliases, adapters_pb2.ListAliasesRequest):
            aliases.extend(page.aliases)
        return aliases

    def is_serving(self, service: str = "") -> bool:
        """Whether the server reports SERVING.

        Args:
            service: full name of a service; "" is the server as a whole.
        """
        response = self._call(self._health.Check, health_pb2.HealthCheckRequest(service=service))
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

    def _call(self, method: Callable[..., Any], request: Message) -> Any:
        with _errors():
            return method(request, **self._options)

    def _pages(self, method: Callable[..., Any], request: Callable[..., Message]) -> Iterator[Any]:
        token = ""
        while True:
            page = self._call(method, request(page_token=token))
            yield page
            token = page.next_page_token
            if not token:
                return


def _weighted(adapters: WeightedAdapters) -> list[generation_pb2.WeightedAdapter]:
    pairs = adapters.items() if isinstance(adapters, Mapping) else adapters
    return [generation_pb2.WeightedAdapter(adapter_id=reference, weight=weight) for reference, weight in pairs]


def _tier_value(tier: TierName) -> "adapters_pb2.AdapterTier.ValueType":
    return adapters_pb2.AdapterTier.Value(f"ADAPTER_TIER_{tier.upper()}")


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise remote_error(error) from error
