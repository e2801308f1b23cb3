"""Requests with several adapters, or with a strength, over real gRPC on fakes: bad input, answers, policy, log."""

import math

import pytest
import structlog
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.errors import AdapterCompositionError, AdapterDigestError, AdapterMemoryError
from lorikeet.protos.v1 import generation_pb2 as pb
from lorikeet.server.errors import QueueFullError

from .fakes import VERSIONS, FakeEngine, OnlyAccess, error_of, loopback

KJV, DEVIL = VERSIONS["kjv"], VERSIONS["devil"]
METHODS = pytest.mark.parametrize("method", ["Generate", "GenerateStream"])


def weighted(*members) -> pb.GenerateRequest:
    """(reference, weight or None) of each member."""
    adapters = [pb.WeightedAdapter(adapter_id=reference, weight=weight) for reference, weight in members]
    return pb.GenerateRequest(prompt="ab", adapters=adapters)


def applied(adapter_id: str, digest: str, weight: float) -> pb.AppliedAdapter:
    return pb.AppliedAdapter(adapter=pb.AdapterVersion(adapter_id=adapter_id, version=digest * 32), weight=weight)


async def test_composition_answers_and_says_so():
    request = weighted(("prod", 0.75), ("devil@d2d2", None))
    async with loopback() as server:
        whole = await server.stub.Generate(request)
        stream = [message async for message in server.stub.GenerateStream(request)]
    for answer in (whole, stream[0].started):
        assert list(answer.adapters) == [applied("devil", "d2", 1.0), applied("kjv", "d1", 0.75)]
        assert not answer.HasField("adapter")
    assert [request.adapter for request in server.engine.submitted] == [Adaptation.of([(KJV, 0.75), (DEVIL, 1.0)])] * 2
    assert server.adapters.pins == 4, "the engine has them now"


async def test_order_of_members_does_not_matter():
    async with loopback() as server:
        answers = [
            await server.stub.Generate(weighted(*members))
            for members in ([("kjv", 0.5), ("devil", -2)], [("devil", -2), ("kjv", 0.5)])
        ]
    assert list(answers[0].adapters) == list(answers[1].adapters)
    assert server.engine.submitted[0].adapter == server.engine.submitted[1].adapter


@pytest.mark.parametrize(
    ("request_", "weight"),
    [
        (pb.GenerateRequest(prompt="a", adapter_id="kjv", strength=0.5), 0.5),
        (pb.GenerateRequest(prompt="a", adapter_id="kjv", strength=0), 0.0),
        (pb.GenerateRequest(prompt="a", adapter_id="kjv", strength=-0.0), 0.0),
        (pb.GenerateRequest(prompt="a", adapter_id="kjv", strength=1), 1.0),
        (weighted(("kjv", None)), 1.0),
        (weighted(("kjv", -100)), -100.0),
    ],
    ids=str,
)
async def test_strength_of_one(request_, weight):
    async with loopback() as server:
        answer = await server.stub.Generate(request_)
    assert list(answer.adapters) == [applied("kjv", "d1", weight)]
    [submitted] = server.engine.submitted
    assert submitted.adapter == Adaptation.of([(KJV, weight)])
    assert math.copysign(1, submitted.adapter.members[0].weight) > 0 or weight < 0
    assert submitted.adapter.is_plain == (weight == 1.0)


BAD = [
    ({"adapter_id": "kjv", "adapters": [("devil", 1)]}, "INVALID_ARGUMENT", "BAD_REQUEST", "adapter_id"),
    ({"adapters": [("devil", 1)], "strength": 1}, "INVALID_ARGUMENT", "BAD_REQUEST", "strength"),
    ({"strength": 1}, "INVALID_ARGUMENT", "BAD_REQUEST", "strength"),
    ({"adapter_id": "kjv", "strength": math.nan}, "INVALID_ARGUMENT", "BAD_REQUEST", "strength"),
    ({"adapter_id": "kjv", "strength": 100.1}, "INVALID_ARGUMENT", "BAD_REQUEST", "strength"),
    ({"adapters": [("kjv", 1)] * 9}, "INVALID_ARGUMENT", "BAD_REQUEST", "adapters"),
    ({"adapters": [("kjv", 1), ("devil", math.nan)]}, "INVALID_ARGUMENT", "BAD_REQUEST", "adapters[1].weight"),
    ({"adapters": [("kjv", math.inf), ("devil", 1)]}, "INVALID_ARGUMENT", "BAD_REQUEST", "adapters[0].weight"),
    ({"adapters": [("kjv", 1), ("devil", -math.inf)]}, "INVALID_ARGUMENT", "BAD_REQUEST", "adapters[1].weight"),
    ({"adapters": [("kjv", 1e30)]}, "INVALID_ARGUMENT", "BAD_REQUEST", "adapters[0].weight"),
    ({"adapters": [("kjv", 1), ("", 1)]}, "INVALID_ARGUMENT", "BAD_REQUEST", "adapters[1].adapter_id"),
    ({"adapters": [("kjv", 1), ("../x", 1)]}, "INVALID_ARGUMENT", "ADAPTER_ID_INVALID", "adapters[1].adapter_id"),
    ({"adapters": [("kjv", 1), ("a+b", 1)]}, "INVALID_ARGUMENT", "ADAPTER_ID_INVALID", "adapters[1].adapter_id"),
    ({"adapters": [("kjv:1", 1)]}, "INVALID_ARGUMENT", "ADAPTER_ID_INVALID", "adapters[0].adapter_id"),
    ({"adapters": [("kjv@xy", 1)]}, "INVALID_ARGUMENT", "ADAPTER_DIGEST_INVALID", "adapters[0].adapter_id"),
    ({"adapters": [("kjv", 1), ("nope", 1), ("devil", 1)]}, "NOT_FOUND", "ADAPTER_NOT_FOUND", None),
]


@METHODS
@pytest.mark.parametrize(("fields", "code", "reason", "field"), BAD, ids=[str(case[0]) for case in BAD])
async def test_bad_adapters_are_refused_by_field_and_nothing_stays_pinned(method, fields, code, reason, field):
    members = [pb.WeightedAdapter(adapter_id=name, weight=weight) for name, weight in fields.get("adapters", ())]
    request = pb.GenerateRequest(prompt="x", **(fields | {"adapters": members}))
    async with loopback() as server:
        error = await error_of(getattr(server.stub, method)(request))
    assert (error.code, error.reason) == (code, reason)
    assert error.metadata.get("field") == field
    assert server.engine.submitted == [] and server.adapters.pins == 0


@pytest.mark.parametrize("refusal", [AdapterCompositionError("Both change lm_head."), AdapterMemoryError("Too large.")])
async def test_members_that_cannot_answer_together_are_refused(refusal):
    async with loopback() as server:
        server.adapters.refuse = refusal
        for request in (weighted(("kjv", 1), ("devil", 1)), weighted(("kjv", 0.5))):
            error = await error_of(server.stub.Generate(request))
            assert (error.code, error.reason, error.message) == (refusal.code, refusal.reason, refusal.message)
        await server.stub.Generate(pb.GenerateRequest(prompt="x", adapter_id="kjv"))  # alone it may
    assert server.adapters.pins == 1


async def test_ambiguous_digest_is_blamed_on_its_member():
    async with loopback() as server:
        server.adapters.fail = AdapterDigestError("kjv@d1d1 fits several versions.")
        error = await error_of(server.stub.Generate(weighted(("kjv@d1d1", 1), ("devil", 1))))
    assert (error.reason, error.metadata["field"]) == ("ADAPTER_DIGEST_INVALID", "adapters[0].adapter_id")


async def test_every_member_must_be_allowed_and_is_asked_before_it_is_looked_up():
    access = OnlyAccess(uses=["kjv"])
    async with loopback(access=access) as server:
        error = await error_of(server.stub.Generate(weighted(("kjv", 1), ("nope", 1), ("devil", 1))))
        alone = await error_of(server.stub.Generate(pb.GenerateRequest(prompt="x", adapter_id="nope")))
    assert (error.code, error.reason, error.message) == (alone.code, alone.reason, alone.message)
    assert server.adapters.resolved == [] and server.adapters.pins == 0


async def test_refused_submission_and_bad_prompt_give_every_version_back():
    async with loopback(FakeEngine(refuse=QueueFullError("1024 requests wait already."))) as server:
        assert (await error_of(server.stub.Generate(weighted(("kjv", 1), ("devil", 1))))).reason == "QUEUE_FULL"
        request = weighted(("kjv", 1), ("devil", 1))
        request.prompt = "x" * 1000
        assert (await error_of(server.stub.Generate(request))).reason == "PROMPT_TOO_LONG"
    assert server.adapters.pins == 0


async def test_log_line_names_the_members_their_versions_and_weights():
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        async with loopback() as server:
            await server.stub.Generate(weighted(("prod", 0.5), ("devil", None)))
            await error_of(server.stub.Generate(weighted(*[("x" * 100_000, 1)] * 9)))
    assert (logs[0]["adapter"], logs[0]["version"]) == ("devil+kjv", f"{'d2' * 6}+{'d1' * 6}")
    assert logs[0]["reference"] == "prod:0.5 + devil:1"
    assert len(logs[1]["adapter"]) < 2000
