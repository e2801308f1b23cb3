"""The server around the services: health, reflection, keepalive, ports."""

import socket
import time

import pytest
from google.longrunning.operations_pb2_grpc import OperationsServicer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lorikeet.protos.v1 import generation_pb2
from lorikeet.protos.v1.adapters_pb2_grpc import AdapterServiceServicer
from lorikeet.protos.v1.generation_pb2_grpc import GenerationServiceServicer, GenerationServiceStub
from lorikeet.protos.v1.merges_pb2_grpc import MergeServiceServicer
from lorikeet.server.addresses import join_address, require_free
from lorikeet.server.errors import ConfigError
from lorikeet.server.grpc_server import GENERATION_SERVICE, HEALTH_NAMES, MERGE_SERVICE, SERVICES, GrpcServer

from .fakes import FakeEngine, error_of, one_token_each, serve


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
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=MERGE_SERVICE),
        ]
        listed, described, merging = [response async for response in stub.ServerReflectionInfo(iter(requests))]
    names = {service.name for service in listed.list_services_response.service}
    assert names == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert len(SERVICES) == 4
    assert b"MergeAdapter" in merging.file_descriptor_response.file_descriptor_proto[0]
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
        ("grpc.keepalive_timeout_ms", 90_000),
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
            services = (
                GenerationServiceServicer(), AdapterServiceServicer(), MergeServiceServicer(), OperationsServicer(),
            )  # fmt: skip
            await second.start("127.0.0.1", port, *services)


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
