"""The interceptor over real gRPC: what clients see of errors, for unary handlers, generators and writing coroutines."""

import asyncio
import json
from contextlib import asynccontextmanager

import grpc
import pytest
import structlog
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status
from lorikeet.adapters.errors import ServingError
from lorikeet.protos.v1 import generation_pb2 as pb
from lorikeet.protos.v1.generation_pb2_grpc import (
    GenerationServiceServicer,
    GenerationServiceStub,
    add_GenerationServiceServicer_to_server,
)
from lorikeet.server.errors import BadRequestError, QueueFullError
from lorikeet.server.interceptors import ErrorInterceptor, current_request_id
from lorikeet.server.status import MAX_MESSAGE_LENGTH, error_status, remote_error

from .fakes import wait_for

MESSAGE = pb.GenerateStreamResponse(delta=pb.Delta(text="x"))


class Service(GenerationServiceServicer):
    """Raises what it is told to; its stream is a generator, or a coroutine that writes."""

    def __init__(self, error=None):
        self.error = error
        self.closed = False
        self.request_ids = []

    async def Generate(self, request, context):
        self.request_ids.append(current_request_id.get())
        if self.error:
            raise self.error
        return pb.GenerateResponse(text="x")

    async def GenerateStream(self, request, context):
        try:
            yield MESSAGE
            if self.error:
                raise self.error
            if request.prompt == "hang":
                await asyncio.sleep(60)
        finally:
            self.closed = True


class WritingService(Service):
    async def GenerateStream(self, request, context):
        await context.write(MESSAGE)
        if self.error:
            raise self.error


@asynccontextmanager
async def serve(service):
    calls: list[tuple[str, str, str]] = []
    server = grpc.aio.server(interceptors=[ErrorInterceptor(lambda *call: calls.append(call))])
    add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield GenerationServiceStub(channel), calls
    finally:
        await server.stop(1)


async def error_of_unary(stub):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(pb.GenerateRequest())
    return caught.value


async def error_of_stream(stub):
    received = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for message in stub.GenerateStream(pb.GenerateRequest()):
            received.append(message)
    assert received == [MESSAGE]
    return caught.value


CASES = pytest.mark.parametrize(
    ("service", "error_of"),
    [(Service, error_of_unary), (Service, error_of_stream), (WritingService, error_of_stream)],
    ids=["unary", "generator", "writing-coroutine"],
)


@CASES
async def test_serving_error_becomes_status_with_details(service, error_of):
    error = BadRequestError("top_k is -1; allowed: 0 or more.", {"field": "sampling.top_k"})
    async with serve(service(error)) as (stub, calls):
        caught = await error_of(stub)
    assert caught.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.details() == "top_k is -1; allowed: 0 or more."
    status = Status.FromString(dict(caught.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (3, caught.details())
    info, bad_request = ErrorInfo(), BadRequest()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("BAD_REQUEST", "lorikeet")
    assert status.details[1].Unpack(bad_request)
    assert bad_request.field_violations[0].field == "sampling.top_k"
    assert [call[1:] for call in calls] == [("INVALID_ARGUMENT", "BAD_REQUEST")]


@CASES
async def test_unknown_exception_is_internal_and_says_only_the_request_id(service, error_of):
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        async with serve(service(RuntimeError("secret detail"))) as (stub, calls):
            caught = await error_of(stub)
    remote = remote_error(caught)
    assert (remote.code, remote.reason) == ("INTERNAL", "INTERNAL")
    assert remote.request_id in remote.message
    assert "secret" not in str(caught.trailing_metadata()) + remote.message
    [entry] = [entry for entry in logs if entry["event"] == "request"]
    assert entry["log_level"] == "error"
    assert str(entry["exc_info"]) == "secret detail"
    assert entry["request_id"] == remote.request_id
    assert calls[0][1:] == ("INTERNAL", "INTERNAL")


async def test_each_call_is_one_log_line_without_content():
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        async with serve(Service()) as (stub, _):
            await stub.Generate(pb.GenerateRequest(prompt="secret prompt", request_id="a"))
            [_ async for _ in stub.GenerateStream(pb.GenerateRequest(prompt="secret prompt", request_id="b"))]
    assert [(entry["event"], entry["method"], entry["code"], entry["request_id"]) for entry in logs] == [
        ("request", "Generate", "OK", "a"),
        ("request", "GenerateStream", "OK", "b"),
    ]
    assert "secret" not in json.dumps(logs, default=str)


async def test_request_id_of_field_metadata_or_made_up():
    service = Service()
    async with serve(service) as (stub, _):
        for field, metadata in (("f", "m"), ("", "m"), ("", None)):
            call = stub.Generate(
                pb.GenerateRequest(request_id=field), metadata=[("x-request-id", metadata)] if metadata else None
            )
            initial = dict(await call.initial_metadata())
            await call
            assert initial["x-request-id"] == service.request_ids[-1]
    assert service.request_ids[:2] == ["f", "m"]
    assert len(service.request_ids[2]) == 32


async def test_cancelled_generator_is_closed_at_once():
    service = Service()
    async with serve(service) as (stub, calls):
        call = stub.GenerateStream(pb.GenerateRequest(prompt="hang"))
        await call.read()
        call.cancel()
        await wait_for(lambda: service.closed and calls)
    assert calls == [("GenerateStream", "CANCELLED", "CANCELLED")]


def test_long_messages_fit_into_trailing_metadata():
    error = QueueFullError("x" * 100_000, {"detail": "y" * 100_000, "field": "prompt"})
    status = error_status(error, "id")
    assert len(status.message) == MAX_MESSAGE_LENGTH
    assert sum(len(value) for _, value in status.trailing_metadata) + len(status.message) < 8000


@pytest.mark.parametrize("kind", ServingError.__subclasses__() + BadRequestError.__subclasses__(), ids=str)
def test_every_error_has_a_code_of_grpc_and_a_reason(kind):
    status = error_status(kind("message"), "id")
    assert status.code.name == kind.code.value
    assert 0 < len(kind.reason) <= 63
    assert kind.reason == kind.reason.upper()
