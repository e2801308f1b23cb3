"""The server around the services: health, reflection, keepalive, ports, the adapter RPCs."""

import asyncio
import dataclasses
import socket
import threading
import time
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lorikeet.adapters.errors import AdapterInvalidError, AdapterNotFoundError
from lorikeet.adapters.info import AdapterInfo, AdapterState, Tier
from lorikeet.adapters.scaling import Scaling
from lorikeet.protos.v1 import adapters_pb2 as pb
from lorikeet.protos.v1 import generation_pb2
from lorikeet.protos.v1.adapters_pb2_grpc import AdapterServiceServicer, AdapterServiceStub
from lorikeet.protos.v1.generation_pb2_grpc import GenerationServiceServicer, GenerationServiceStub
from lorikeet.server.adapter_service import AdapterService
from lorikeet.server.addresses import join_address, require_free
from lorikeet.server.errors import ConfigError
from lorikeet.server.event_stream import EventBridge
from lorikeet.server.generation_service import GenerationService
from lorikeet.server.grpc_server import ADAPTER_SERVICE, GENERATION_SERVICE, HEALTH_NAMES, GrpcServer
from lorikeet.server.prompts import PromptEncoder
from lorikeet.server.status import remote_error

from .fakes import MAX_CONTEXT, VOCAB_SIZE, FakeAdapters, FakeEngine, FakeTokenizer, one_token_each

KJV = AdapterInfo(
    adapter_id="kjv", digest="d" * 64, state=AdapterState.READY, tier=Tier.DEVICE, bytes=12345, max_rank=8,
    slices={"v_proj": Scaling(8, 2.0), "q_proj": Scaling(4, 0.5)}, in_flight=3, error=None, warning="another base",
    loaded_at=1_700_000_000.25, source="kjv-folder", method="rsLoRA",
)  # fmt: skip


class FakeManager:
    """Holds infos; loads block until `gate` is set."""

    def __init__(self, *infos):
        self.infos = list(infos)
        self.gate = threading.Event()
        self.gate.set()
        self.threads = []

    def load(self, adapter_id, path):
        self.threads.append(threading.current_thread())
        assert self.gate.wait(10)
        if path is not None:
            raise AdapterInvalidError(f"{path.name}/adapter_config.json is missing.", {"file": "adapter_config.json"})
        return dataclasses.replace(KJV, adapter_id=adapter_id)

    def unload(self, adapter_id):
        self.infos.remove(self.get(adapter_id))

    def get(self, adapter_id):
        for info in self.infos:
            if info.adapter_id == adapter_id:
                return info
        raise AdapterNotFoundError(f"There is no adapter {adapter_id!r}.")

    def list(self):
        return list(self.infos)


@asynccontextmanager
async def serve(manager=None, engine=None, options=None):
    prompts = PromptEncoder(FakeTokenizer(), VOCAB_SIZE)
    generation = GenerationService(
        engine or FakeEngine(), FakeAdapters(), prompts, EventBridge(asyncio.get_running_loop()), MAX_CONTEXT
    )
    adapters = AdapterService(manager or FakeManager(KJV))
    server = GrpcServer(2**20, lambda *call: None)
    port = await server.start("127.0.0.1", 0, generation, adapters)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield server, channel, port
    finally:
        await server.stop(1)
        adapters.close()
        prompts.close()


async def error_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return remote_error(caught.value)


async def test_health_of_each_service_until_it_stops_serving():
    async with serve() as (server, channel, _):
        stub = health_pb2_grpc.HealthStub(channel)

        async def statuses():
            checks = [stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in HEALTH_NAMES]
            return {(await check).status for check in checks}

        assert await statuses() == {health_pb2.HealthCheckResponse.SERVING}
        assert (await error_of(stub.Check(health_pb2.HealthCheckRequest(service="nothing")))).code == "NOT_FOUND"
        await server.stop_serving()
        assert await statuses() == {health_pb2.HealthCheckResponse.NOT_SERVING}


async def test_reflection_lists_and_describes_the_services():
    async with serve() as (_, channel, _):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=GENERATION_SERVICE),
        ]
        listed, described = [response async for response in stub.ServerReflectionInfo(iter(requests))]
    names = {service.name for service in listed.list_services_response.service}
    assert names == {
        GENERATION_SERVICE,
        ADAPTER_SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert b"GenerateStream" in described.file_descriptor_response.file_descriptor_proto[0]


async def test_method_that_does_not_exist_is_unimplemented():
    async with serve() as (_, channel, _):
        error = await error_of(channel.unary_unary("/lorikeet.v1.GenerationService/Nothing")(b""))
    assert error.code == "UNIMPLEMENTED"


async def test_message_above_the_limit_is_refused():
    async with serve() as (_, channel, _):
        call = GenerationServiceStub(channel).Generate(generation_pb2.GenerateRequest(prompt="x" * 2**21))
        assert (await error_of(call)).code == "RESOURCE_EXHAUSTED"


async def test_long_unary_call_survives_a_client_that_pings_often():
    """A client pings once a second at most. gRPC's default ends this call after 4.1 s with GOAWAY too_many_pings."""
    options = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.http2.max_pings_without_data", 0),
    ]

    def slowly(request):
        time.sleep(5)
        return one_token_each("late")

    async with serve(engine=FakeEngine(slowly), options=options) as (_, channel, _):
        response = await GenerationServiceStub(channel).Generate(generation_pb2.GenerateRequest(prompt="x"))
    assert response.text == "late"


async def test_port_in_use_is_named_with_the_flag_that_changes_it():
    async with serve() as (_, _, port):
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*in use.*--port"):
            require_free("gRPC", "127.0.0.1", port, "--")
        second = GrpcServer(2**20, lambda *call: None)
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*in use.*--port"):
            await second.start("127.0.0.1", port, GenerationServiceServicer(), AdapterServiceServicer())


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid"])
def test_address_of_another_machine_is_refused(host):
    with pytest.raises(ConfigError, match="not one of this machine"):
        require_free("/metrics", host, 0, "--metrics-")


def test_free_port_stays_free():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for _ in range(2):
        require_free("gRPC", "127.0.0.1", port, "--")


def test_ipv6_addresses_have_brackets():
    assert (join_address("::1", 1), join_address("localhost", 2)) == ("[::1]:1", "localhost:2")


async def test_adapter_is_described_in_full():
    async with serve() as (_, channel, _):
        response = await AdapterServiceStub(channel).GetAdapter(pb.GetAdapterRequest(adapter_id="kjv"))
    adapter = response.adapter
    assert (adapter.adapter_id, adapter.version, adapter.size_bytes) == ("kjv", "d" * 64, 12345)
    assert (adapter.state, adapter.tier) == (pb.ADAPTER_STATE_READY, pb.ADAPTER_TIER_DEVICE)
    assert [(s.module, s.rank, s.scaling) for s in adapter.slices] == [("q_proj", 4, 0.5), ("v_proj", 8, 2.0)]
    assert (adapter.max_rank, adapter.in_flight_requests, adapter.error) == (8, 3, "")
    assert (adapter.load_time.seconds, adapter.load_time.nanos) == (1_700_000_000, 250_000_000)
    assert (adapter.source, adapter.method, adapter.warning) == ("kjv-folder", "rsLoRA", "another base")


@pytest.mark.parametrize("state", AdapterState)
@pytest.mark.parametrize("tier", Tier)
async def test_every_state_and_tier_has_a_value_in_the_proto(state, tier):
    async with serve(FakeManager(dataclasses.replace(KJV, state=state, tier=tier))) as (_, channel, _):
        response = await AdapterServiceStub(channel).GetAdapter(pb.GetAdapterRequest(adapter_id="kjv"))
    assert pb.AdapterState.Name(response.adapter.state) == f"ADAPTER_STATE_{state.name}"
    assert pb.AdapterTier.Name(response.adapter.tier) == f"ADAPTER_TIER_{tier.name}"


async def test_pages_cover_every_adapter_once_while_some_go():
    infos = [dataclasses.replace(KJV, adapter_id=f"a{number:03}") for number in range(25)]
    draining = dataclasses.replace(infos[9], state=AdapterState.DRAINING, digest="0" * 64)
    manager = FakeManager(draining, *reversed(infos))
    seen, token = [], ""
    async with serve(manager) as (_, channel, _):
        stub = AdapterServiceStub(channel)
        while True:
            page = await stub.ListAdapters(pb.ListAdaptersRequest(page_size=10, page_token=token))
            seen += [(adapter.adapter_id, adapter.state) for adapter in page.adapters]
            manager.infos = [info for info in manager.infos if info.adapter_id != "a003"]
            token = page.next_page_token
            if not token:
                break
    expected = [(info.adapter_id, pb.ADAPTER_STATE_READY) for info in infos]
    expected.insert(10, ("a009", pb.ADAPTER_STATE_DRAINING))
    assert seen == expected


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"page_size": -1}, "page_size"), ({"page_size": 1001}, "page_size"), ({"page_token": "x"}, "page_token")],
)
async def test_bad_page_is_refused(fields, field):
    async with serve() as (_, channel, _):
        error = await error_of(AdapterServiceStub(channel).ListAdapters(pb.ListAdaptersRequest(**fields)))
    assert (error.code, error.metadata["field"]) == ("INVALID_ARGUMENT", field)


@pytest.mark.parametrize("method", ["LoadAdapter", "UnloadAdapter", "GetAdapter"])
async def test_malformed_adapter_id_is_refused(method):
    async with serve() as (_, channel, _):
        request = getattr(pb, f"{method}Request")(adapter_id="../kjv")
        error = await error_of(getattr(AdapterServiceStub(channel), method)(request))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "ADAPTER_ID_INVALID")


async def test_load_unload_and_their_errors():
    async with serve() as (_, channel, _):
        stub = AdapterServiceStub(channel)
        assert (await stub.LoadAdapter(pb.LoadAdapterRequest(adapter_id="new"))).adapter.adapter_id == "new"
        error = await error_of(stub.LoadAdapter(pb.LoadAdapterRequest(adapter_id="new", path="half")))
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "ADAPTER_INVALID")
        assert error.metadata == {"file": "adapter_config.json"}
        await stub.UnloadAdapter(pb.UnloadAdapterRequest(adapter_id="kjv"))
        for call in (
            stub.UnloadAdapter(pb.UnloadAdapterRequest(adapter_id="kjv")),
            stub.GetAdapter(pb.GetAdapterRequest(adapter_id="kjv")),
        ):
            assert (await error_of(call)).code == "NOT_FOUND"


async def test_slow_load_does_not_hold_up_the_event_loop():
    manager = FakeManager(KJV)
    manager.gate.clear()
    async with serve(manager) as (_, channel, _):
        load = AdapterServiceStub(channel).LoadAdapter(pb.LoadAdapterRequest(adapter_id="new"))
        response = await GenerationServiceStub(channel).Generate(generation_pb2.GenerateRequest(prompt="x"), timeout=5)
        assert response.text == "Hello world"
        manager.gate.set()
        await load
    assert manager.threads[0] is not threading.current_thread()
