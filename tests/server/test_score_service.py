"""Score and Tokenize over real gRPC in one process, on fakes: what reaches the engine, comes back, is refused."""

import asyncio

import pytest
from lorikeet.protos.v1 import generation_pb2 as pb
from lorikeet.server.client import score_request
from lorikeet.server.convert import Answering
from lorikeet.server.engine.request import Delta, Failed, Finished, FinishReason, Request, TokenLogprob
from lorikeet.server.errors import BadRequestError, DeadlineError
from lorikeet.server.score_requests import parse_scoring, score_response, scored_text

from .fakes import MAX_CONTEXT, VOCAB_SIZE, FakeEngine, OnlyAccess, error_of, loopback, wait_for


def scores(request: Request) -> list[object]:
    """A delta for each token; the log probability is its index, negative."""
    text = request.scored
    assert text is not None
    tokens = list(enumerate(text.token_ids))[text.next :]
    deltas = [
        Delta("", (token,), (TokenLogprob(token, -float(i), ((token, -0.5),) * text.num_top),)) for i, token in tokens
    ]
    return [*deltas, Finished(FinishReason.SCORED, len(text.token_ids) - 1, 2, 0)]


def scoring_engine() -> FakeEngine:
    return FakeEngine(script=scores)


async def test_text_is_tokenized_and_scored():
    async with loopback(engine=scoring_engine()) as server:
        request = pb.ScoreRequest(text="abc", adapter_id="prod", request_id="mine", top_logprobs=2)
        response = await server.stub.Score(request, timeout=30)
    [submitted] = server.engine.submitted
    assert submitted.prompt_token_ids == [1, ord("a"), ord("b")]
    assert submitted.scored.token_ids == [1, ord("a"), ord("b"), ord("c")]
    assert submitted.deadline is not None
    assert (response.request_id, response.first, response.num_tokens, response.cached_tokens) == ("mine", 1, 4, 2)
    assert response.adapter == pb.AdapterVersion(adapter_id="kjv", version="d1" * 32)
    assert [(each.token_id, each.logprob) for each in response.logprobs] == [(97, -1.0), (98, -2.0), (99, -3.0)]
    assert [len(each.top) for each in response.logprobs] == [2, 2, 2]
    assert server.calls == [("Score", "OK", "")]


async def test_first_leaves_context_out():
    async with loopback(engine=scoring_engine()) as server:
        response = await server.stub.Score(pb.ScoreRequest(token_ids=[5, 6, 7, 8], first=3))
    assert (response.first, [each.token_id for each in response.logprobs]) == (3, [8])
    assert response.adapter == pb.AdapterVersion()


async def test_several_adapters_are_named_in_the_answer():
    async with loopback(engine=scoring_engine()) as server:
        request = score_request(token_ids=[5, 6], adapters={"kjv": 0.5, "devil": 2.0})
        response = await server.stub.Score(request)
    assert not response.HasField("adapter")
    assert [(each.adapter.adapter_id, each.weight) for each in response.adapters] == [("devil", 2.0), ("kjv", 0.5)]


@pytest.mark.parametrize(
    ("fields", "reason", "field", "word"),
    [
        ({}, "BAD_REQUEST", "text", "none of them"),
        ({"text": "ab", "token_ids": [1, 2]}, "BAD_REQUEST", "token_ids", "exactly one"),
        ({"text": ""}, "BAD_REQUEST", "text", "empty"),
        ({"token_ids": [7]}, "BAD_REQUEST", "token_ids", "2 or more"),
        ({"token_ids": [7, VOCAB_SIZE]}, "BAD_REQUEST", "token_ids", "vocabulary is 0 to 99"),
        ({"token_ids": [7] * (MAX_CONTEXT + 1)}, "PROMPT_TOO_LONG", "token_ids", "Score it in windows"),
        ({"text": "x" * MAX_CONTEXT}, "PROMPT_TOO_LONG", "text", "65 tokens"),
        ({"token_ids": [7, 8], "first": 0}, "BAD_REQUEST", "first", "1 to 1"),
        ({"token_ids": [7, 8], "first": 2}, "BAD_REQUEST", "first", "1 to 1"),
        ({"token_ids": [7, 8], "top_logprobs": 21}, "BAD_REQUEST", "top_logprobs", "0 to 20"),
        ({"token_ids": [7, 8], "top_logprobs": -1}, "BAD_REQUEST", "top_logprobs", "0 to 20"),
        ({"token_ids": [7, 8], "strength": 2.0}, "BAD_REQUEST", "strength", "adapter_id"),
        ({"token_ids": [7, 8], "routing_key": "x" * 257}, "BAD_REQUEST", "routing_key", "257"),
    ],
    ids=lambda value: None,
)
async def test_bad_requests_are_blamed_on_their_field(fields, reason, field, word):
    async with loopback(engine=scoring_engine()) as server:
        error = await error_of(server.stub.Score(pb.ScoreRequest(**fields)))
    assert (error.code, error.reason, error.metadata["field"]) == ("INVALID_ARGUMENT", reason, field)
    assert word in error.message
    assert not server.engine.submitted and server.adapters.pins == 0


async def test_a_long_answer_is_built_in_slices_while_others_have_their_turn():
    count = 300
    scored = [TokenLogprob(i, -float(i), ((i, -0.5), (7, -1.0))) for i in range(count)]
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    end = Finished(FinishReason.SCORED, count, 0, 0)
    output = Delta("", tuple(range(count)), tuple(scored))
    response = await score_response("mine", Answering(pb.AdapterVersion(), ()), count + 1, output, end)
    task.cancel()
    assert turns >= count // 64
    assert (response.first, [each.token_id for each in response.logprobs]) == (1, list(range(count)))
    assert all([top.token_id for top in each.top] == [i, 7] for i, each in enumerate(response.logprobs))


@pytest.mark.parametrize(("num_tokens", "top", "field"), [(200_002, 0, "token_ids"), (9_525, 20, "top_logprobs")])
def test_an_answer_that_clients_could_not_receive_is_refused(num_tokens: int, top: int, field: str):
    request = pb.ScoreRequest(token_ids=[2**20] * num_tokens, top_logprobs=top)
    with pytest.raises(BadRequestError, match=r"200000. Score it in windows") as refused:
        scored_text(parse_scoring(request), list(request.token_ids), 2**30)
    assert refused.value.metadata["field"] == field
    fits = scored_text(parse_scoring(request), list(request.token_ids)[:-1], 2**30)
    assert len(fits.token_ids) == num_tokens - 1
    alternative = pb.TopLogprob(token_id=2**32 - 1, logprob=-1.5)
    largest = pb.TokenLogprob(token_id=2**32 - 1, logprob=-1.5, top=[alternative] * top)
    answer = pb.ScoreResponse(logprobs=[largest] * (num_tokens - 2))
    assert answer.ByteSize() < 0.9 * 4 * 2**20


async def test_unknown_adapter_and_client_that_may_not():
    async with loopback(engine=scoring_engine(), access=OnlyAccess(uses=["kjv", "nope"])) as server:
        unknown = await error_of(server.stub.Score(pb.ScoreRequest(token_ids=[1, 2], adapter_id="nope")))
        base = await error_of(server.stub.Score(pb.ScoreRequest(token_ids=[1, 2])))
        other = await error_of(server.stub.Tokenize(pb.TokenizeRequest(text="ab", adapter_id="devil")))
    assert (unknown.code, unknown.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert {base.reason, other.reason} == {"CLIENT_NOT_ALLOWED"}


async def test_failure_after_some_scores_is_the_error():
    engine = FakeEngine(script=lambda request: [*scores(request)[:1], Failed(DeadlineError("too late"))])
    async with loopback(engine=engine) as server:
        error = await error_of(server.stub.Score(pb.ScoreRequest(token_ids=[1, 2, 3])))
    assert error.reason == "DEADLINE_EXCEEDED"


async def test_cancelled_call_aborts_the_request():
    async with loopback(engine=FakeEngine(script=lambda request: [])) as server:
        call = server.stub.Score(pb.ScoreRequest(token_ids=[1, 2, 3]))
        await wait_for(lambda: server.engine.submitted)
        call.cancel()
        await wait_for(lambda: server.engine.aborted)


async def test_tokenize_says_tokens_and_context_and_pins_nothing():
    async with loopback() as server:
        response = await server.stub.Tokenize(pb.TokenizeRequest(text="ab", adapter_id="kjv"))
        empty = await error_of(server.stub.Tokenize(pb.TokenizeRequest()))
    assert (list(response.token_ids), response.max_context) == ([1, 97, 98], MAX_CONTEXT)
    assert response.adapter.adapter_id == "kjv"
    assert empty.metadata["field"] == "text"
    assert server.adapters.pins == 0 and not server.engine.submitted
