"""How a client says who it is, over real gRPC, and what it hears when it may not or has to come back later."""

import grpc
import pytest
import structlog
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from lorikeet.protos.v1 import generation_pb2 as pb
from lorikeet.server.errors import AdapterRateError
from lorikeet.server.interceptors import current_client
from lorikeet.server.policy.holder import PolicyHolder
from lorikeet.server.status import remote_error

from ..fakes import FakeEngine, loopback, one_token_each

KEY = "x-lorikeet-client"


async def generate(server, *metadata: tuple[str, str], **fields):
    return await server.stub.Generate(pb.GenerateRequest(prompt="x", **fields), metadata=metadata or None)


async def error_of(server, *metadata: tuple[str, str], **fields):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(server, *metadata, **fields)
    return caught.value


class Spy:
    """Access that writes down whose call it is asked in."""

    def __init__(self) -> None:
        self.clients: list[str | None] = []

    def may_use(self, name: str) -> None:
        self.clients.append(current_client.get())

    def may_manage(self, name: str) -> None: ...

    def may_see(self, name: str) -> bool:
        return True


async def test_client_is_known_during_its_call_only_and_in_its_log_line():
    spy = Spy()
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        async with loopback(access=spy) as server:
            await generate(server, (KEY, "alice"), adapter_id="kjv")
            await generate(server, adapter_id="kjv")
            await generate(server, (KEY, ""), adapter_id="kjv")
            await generate(server, (KEY, "Team A (test)"), adapter_id="kjv")
    assert spy.clients == ["alice", None, None, "Team A (test)"]
    lines = [entry.get("client") for entry in logs if entry["event"] == "request"]
    assert lines == ["alice", None, None, "Team A (test)"]


@pytest.mark.parametrize(
    ("metadata", "word"), [([(KEY, "x" * 129)], "129 characters"), ([(KEY, "alice"), (KEY, "bob")], "2 times")]
)
async def test_name_that_is_none_is_refused(metadata, word):
    async with loopback() as server:
        error = remote_error(await error_of(server, *metadata))
    assert (error.code, error.reason, error.metadata["field"]) == ("INVALID_ARGUMENT", "BAD_REQUEST", KEY)
    assert word in error.message
    assert server.engine.submitted == []


async def test_refusal_is_the_same_whether_the_adapter_exists(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text('[clients.alice]\nuse = ["*"]\n[clients."*"]\n')
    async with loopback(access=PolicyHolder(path)) as server:
        assert (await generate(server, (KEY, "alice"), adapter_id="kjv")).text
        errors = [
            remote_error(await error_of(server, *metadata, adapter_id=name))
            for metadata in ([], [(KEY, "bob")])
            for name in ("kjv", "zzz")
        ]
    assert {(error.code, error.reason) for error in errors} == {("PERMISSION_DENIED", "CLIENT_NOT_ALLOWED")}
    for existing, missing in (errors[:2], errors[2:]):
        assert existing.message.replace("kjv", "zzz") == missing.message
    assert len(server.engine.submitted) == 1
    assert server.adapters.pins == 1


async def test_rate_error_says_when_to_come_back_for_machines_too():
    error = AdapterRateError("Try again in 1.500 seconds.", {"adapter_id": "kjv", "retry_after_s": "1.500"})
    async with loopback(FakeEngine(lambda _: one_token_each("x"), refuse=error)) as server:
        caught = await error_of(server)
    remote = remote_error(caught)
    assert (remote.code, remote.reason) == ("RESOURCE_EXHAUSTED", "ADAPTER_RATE")
    assert remote.metadata["retry_after_s"] == "1.500"
    status = Status.FromString(dict(caught.trailing_metadata())["grpc-status-details-bin"])
    retry = RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (1, 500_000_000)
