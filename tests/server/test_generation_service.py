"""The generation RPCs over real gRPC in one process, on fakes below: admission, answers, errors, cancellation."""

import asyncio
import threading
import time

import pytest
import structlog
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.errors import AdapterDigestError
from lorikeet.adapters.version import AdapterVersion
from lorikeet.protos.v1 import generation_pb2 as pb
from lorikeet.server.engine.request import Delta, Failed
from lorikeet.server.errors import DeadlineError, QueueFullError

from .fakes import MAX_CONTEXT, VOCAB_SIZE, FakeEngine, error_of, loopback, one_token_each, wait_for


async def test_unary_answer():
    async with loopback() as server:
        call = server.stub.Generate(pb.GenerateRequest(prompt="abc", adapter_id="kjv", request_id="my-id"))
        response = await call
        assert dict(await call.initial_metadata())["x-request-id"] == "my-id"
    assert (response.request_id, response.text, list(response.token_ids)) == ("my-id", "Hello world", [0, 1])
    assert response.adapter == pb.AdapterVersion(adapter_id="kjv", version="d1" * 32)
    assert response.usage == pb.Usage(prompt_tokens=3, cached_tokens=1, generated_tokens=2)
    assert server.calls == [("Generate", "OK", "")]


async def test_stream_is_started_deltas_finished():
    async with loopback() as server:
        messages = [message async for message in server.stub.GenerateStream(pb.GenerateRequest(prompt="abc"))]
    kinds = [message.WhichOneof("event") for message in messages]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) == {"delta"}
    assert messages[0].started.prompt_tokens == 4
    assert "".join(message.delta.text for message in messages) == "Hello world"


async def test_engine_gets_the_checked_request():
    async with loopback() as server:
        started = time.monotonic()
        await server.stub.Generate(
            pb.GenerateRequest(prompt="ab", adapter_id="kjv", sampling=pb.Sampling(temperature=0)), timeout=90
        )
        took_s = time.monotonic() - started
    [request] = server.engine.submitted
    assert request.prompt_token_ids == [1, ord("a"), ord("b")]
    assert request.adapter == Adaptation.single(AdapterVersion("kjv", "d1" * 32))
    assert request.params.greedy
    assert request.params.max_tokens == MAX_CONTEXT - 3
    # gRPC rounds what is left up, to tenths of a second here.
    assert 90 - took_s < request.deadline - request.arrival <= 90.5
    # The engine has the pin now: it gives it back when the request ends.
    assert server.adapters.pins == 1
    assert server.engine.aborted == []


@pytest.mark.parametrize("reference", ["kjv", "prod", "kjv@D1D1"])
@pytest.mark.parametrize("routing_key", ["", "user-7"])
async def test_reference_and_routing_key_decide_which_version_answers(reference, routing_key):
    async with loopback() as server:
        request = pb.GenerateRequest(prompt="ab", adapter_id=reference, routing_key=routing_key)
        response = await server.stub.Generate(request)
        stream = [message async for message in server.stub.GenerateStream(request)]
    # An empty key stays empty: the request id must not decide, or clients that reuse one would get one target only.
    assert server.adapters.resolved == [(reference, routing_key)] * 2
    assert response.adapter == stream[0].started.adapter == pb.AdapterVersion(adapter_id="kjv", version="d1" * 32)


async def test_ambiguous_digest_is_blamed_on_the_field():
    async with loopback() as server:
        server.adapters.fail = AdapterDigestError("kjv@d1d1 fits several versions.")
        error = await error_of(server.stub.Generate(pb.GenerateRequest(prompt="x", adapter_id="kjv@d1d1")))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "ADAPTER_DIGEST_INVALID")
    assert error.metadata["field"] == "adapter_id"


async def test_log_line_says_what_was_asked_and_what_answered():
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        async with loopback() as server:
            await server.stub.Generate(pb.GenerateRequest(prompt="x", adapter_id="prod"))
            await error_of(server.stub.Generate(pb.GenerateRequest(prompt="x", adapter_id="x" * 100_000)))
    assert (logs[0]["reference"], logs[0]["adapter"], logs[0]["version"]) == ("prod", "kjv", "d1" * 6)
    assert len(logs[1]["adapter"]) < 200


async def test_no_deadline_is_none():
    async with loopback() as server:
        await server.stub.Generate(pb.GenerateRequest(prompt="ab"))
    assert server.engine.submitted[0].deadline is None


async def test_chat_goes_through_the_template_without_more_special_tokens():
    async with loopback() as server:
        messages = [pb.Message(role="system", content="A"), pb.Message(role="user", content="B")]
        await server.stub.Generate(pb.GenerateRequest(messages=messages))
    assert server.engine.submitted[0].prompt_token_ids == [ord(c) % VOCAB_SIZE for c in "s:A|u:B|"]


async def test_template_refusal_does_not_leak_its_words():
    async with loopback() as server:
        request = pb.GenerateRequest(messages=[pb.Message(role="assistant", content="x")])
        error = await error_of(server.stub.Generate(request))
    assert (error.code, error.reason, error.metadata["field"]) == ("INVALID_ARGUMENT", "BAD_REQUEST", "messages")
    assert "secret" not in str(error)
    assert "roles: assistant" in error.message


@pytest.mark.parametrize(
    ("request_fields", "code", "reason", "word"),
    [
        ({"prompt": "x", "adapter_id": "nope"}, "NOT_FOUND", "ADAPTER_NOT_FOUND", "nope"),
        ({"prompt": "x", "adapter_id": "../kjv"}, "INVALID_ARGUMENT", "ADAPTER_ID_INVALID", "../kjv"),
        ({"prompt": "x", "adapter_id": "kjv@abc"}, "INVALID_ARGUMENT", "ADAPTER_DIGEST_INVALID", "4 to 64 hex digits"),
        ({"prompt": "x", "routing_key": "x" * 257}, "INVALID_ARGUMENT", "BAD_REQUEST", "routing_key has 257"),
        ({"prompt": "x", "token_ids": [1]}, "INVALID_ARGUMENT", "BAD_REQUEST", "exactly one"),
        (
            {"prompt": "x", "sampling": pb.Sampling(temperature=-1)},
            "INVALID_ARGUMENT",
            "BAD_REQUEST",
            "temperature is -1",
        ),
        ({"prompt": "x" * 64}, "INVALID_ARGUMENT", "PROMPT_TOO_LONG", "65 tokens"),
        ({"prompt": "x", "max_tokens": 63}, "INVALID_ARGUMENT", "PROMPT_TOO_LONG", "lower max_tokens to 62"),
        ({"token_ids": [1, VOCAB_SIZE]}, "INVALID_ARGUMENT", "BAD_REQUEST", "vocabulary is 0 to 99"),
        (
            {"prompt": "x", "stopping": pb.Stopping(stop_token_ids=[100])},
            "INVALID_ARGUMENT",
            "BAD_REQUEST",
            "stopping.stop_token_ids contains 100",
        ),
        ({"prompt": "x", "request_id": "a b"}, "INVALID_ARGUMENT", "BAD_REQUEST", "request_id"),
        ({"prompt": "x", "request_id": "x" * 129}, "INVALID_ARGUMENT", "BAD_REQUEST", "129 characters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_bad_request_gets_its_error_and_never_reaches_the_engine(method, request_fields, code, reason, word):
    async with loopback() as server:
        error = await error_of(getattr(server.stub, method)(pb.GenerateRequest(**request_fields)))
    assert (error.code, error.reason) == (code, reason)
    assert word in error.message
    assert error.request_id
    assert server.engine.submitted == []
    assert server.adapters.pins == 0
    assert server.calls == [(method, code, reason)]


async def test_refused_submission_gives_the_version_back():
    async with loopback(FakeEngine(refuse=QueueFullError("1024 requests wait already."))) as server:
        error = await error_of(server.stub.Generate(pb.GenerateRequest(prompt="x", adapter_id="kjv")))
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert server.adapters.pins == 0


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_failed_request_ends_with_its_status(method):
    script = [Delta("a", (1,)), Failed(DeadlineError("Its deadline passed after 1 token."))]
    async with loopback(FakeEngine(lambda request: script)) as server:
        error = await error_of(getattr(server.stub, method)(pb.GenerateRequest(prompt="x")))
    assert (error.code, error.message) == ("DEADLINE_EXCEEDED", "Its deadline passed after 1 token.")
    assert server.engine.aborted == []


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_cancelled_call_aborts_the_request_once(method):
    async with loopback(FakeEngine(lambda request: [Delta("a", (1,))])) as server:
        call = getattr(server.stub, method)(pb.GenerateRequest(prompt="x"))
        if method == "GenerateStream":
            assert (await call.read()).HasField("started")
        await wait_for(lambda: server.engine.submitted)
        call.cancel()
        await wait_for(lambda: server.calls)
    assert server.engine.aborted == [server.engine.submitted[0].request_id]
    assert server.calls == [(method, "CANCELLED", "CANCELLED")]


async def test_cancel_while_a_message_is_being_written_aborts():
    """grpc.aio does not close a handler's generator that is suspended at a yield; ours must be closed all the same."""
    stop = threading.Event()

    def flood(request):
        while not stop.wait(0.001):
            yield Delta("x" * 100_000, (1,))

    async with loopback(FakeEngine(flood)) as server:
        call = server.stub.GenerateStream(pb.GenerateRequest(prompt="x"))
        await call.read()
        await call.read()
        # Unread messages fill the flow control window, so that the handler hangs in a write.
        await asyncio.sleep(0.3)
        call.cancel()
        await wait_for(lambda: server.engine.aborted)
        stop.set()
        await wait_for(lambda: server.calls)
    assert server.calls == [("GenerateStream", "CANCELLED", "CANCELLED")]


async def test_passed_deadline_is_left_to_the_engine_which_knows_it():
    async with loopback(FakeEngine(lambda request: [])) as server:
        timeout_s = 0.2
        while not server.engine.submitted:  # again, where the time was over before the call arrived
            error = await error_of(server.stub.Generate(pb.GenerateRequest(prompt="x"), timeout=timeout_s))
            assert error.code == "DEADLINE_EXCEEDED"
            timeout_s *= 2
        await wait_for(lambda: server.calls)
    assert server.engine.submitted[0].deadline is not None
    assert server.engine.aborted == []
    assert set(server.calls) == {("Generate", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")}


async def test_equal_request_ids_do_not_collide_in_the_engine():
    async with loopback() as server:
        same = [server.stub.Generate(pb.GenerateRequest(prompt="x", request_id="same")) for _ in range(3)]
        responses = await asyncio.gather(*same)
    assert {response.request_id for response in responses} == {"same"}
    assert len({request.request_id for request in server.engine.submitted}) == 3


async def test_slow_reader_gets_fewer_and_larger_deltas():
    texts = [f"{number} " for number in range(2000)]
    async with loopback(FakeEngine(lambda request: one_token_each(*texts))) as server:
        call = server.stub.GenerateStream(pb.GenerateRequest(prompt="x"))
        messages = [message async for message in call]
    deltas = [message.delta for message in messages if message.HasField("delta")]
    assert "".join(delta.text for delta in deltas) == "".join(texts)
    assert len(deltas) < len(texts)
