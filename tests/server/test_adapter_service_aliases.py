"""The RPCs about aliases over real gRPC in one process."""

import math

import pytest
from lorikeet.adapters import errors
from lorikeet.protos.v1 import adapters_pb2 as pb

from .fake_manager import KJV, OLD_KJV, FakeManager
from .fakes import call, error_of, serve


def alias(name, *targets):
    return pb.Alias(name=name, targets=[target(each) if isinstance(each, str) else each for each in targets])


def target(adapter_id="kjv", **fields):
    return pb.AliasTarget(adapter_id=adapter_id, **fields)


@pytest.mark.parametrize(
    ("message", "reference", "weight"),
    [
        (target(), "kjv", 1.0),
        (target("kjv@DDDD"), "kjv@DDDD", 1.0),
        (target(weight=0.25), "kjv", 0.25),
        (target(weight=-0.0), "kjv", 1.0),
        (target(version="D" * 64, weight=3), f"kjv@{'d' * 64}", 3.0),
        (target("kjv@dddd", version="d" * 64), f"kjv@{'d' * 64}", 1.0),
    ],
    ids=str,
)
async def test_set_alias_names_versions_to_the_manager(message, reference, weight):
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        response = await call(channel, "SetAlias", alias=alias("prod", message))
    assert manager.calls == [("set_alias", "prod", [(reference.lower(), weight)])]
    assert response.alias == pb.Alias(
        name="prod", targets=[pb.AliasTarget(adapter_id="kjv", version=KJV.digest, weight=weight)]
    )


async def test_canary_of_two_versions():
    async with serve() as (_, channel, _):
        wanted = alias("prod", target("kjv@dddd", weight=9), target("kjv@0000", weight=1))
        response = await call(channel, "SetAlias", alias=wanted)
        listed = await call(channel, "ListAliases")
    assert [(t.version, t.weight) for t in response.alias.targets] == [(KJV.digest, 9), (OLD_KJV.digest, 1)]
    assert list(listed.aliases) == [response.alias]


async def test_delete_alias_and_delete_it_again():
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        await call(channel, "SetAlias", alias=alias("prod", "kjv"))
        await call(channel, "DeleteAlias", name="prod")
        error = await error_of(call(channel, "DeleteAlias", name="prod"))
    assert (error.code, error.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert manager.aliases == {}


@pytest.mark.parametrize(
    ("message", "field", "reason"),
    [
        (alias("", "kjv"), "alias.name", "ADAPTER_ID_INVALID"),
        (alias("a/b", "kjv"), "alias.name", "ADAPTER_ID_INVALID"),
        (alias("prod@dddd", "kjv"), "alias.name", "ADAPTER_ID_INVALID"),
        (alias("prod"), "alias.targets", "BAD_REQUEST"),
        (alias("prod", *(f"a{n}" for n in range(9))), "alias.targets", "BAD_REQUEST"),
        (alias("prod", "a", "../b"), "alias.targets[1].adapter_id", "ADAPTER_ID_INVALID"),
        (alias("prod", "a", ""), "alias.targets[1].adapter_id", "ADAPTER_ID_INVALID"),
        (alias("prod", "a@abc"), "alias.targets[0].adapter_id", "ADAPTER_DIGEST_INVALID"),
        (alias("prod", target(version="abcd")), "alias.targets[0].version", "ADAPTER_DIGEST_INVALID"),
        (alias("prod", target("kjv@0000", version="d" * 64)), "alias.targets[0].version", "BAD_REQUEST"),
        (alias("prod", target(weight=-1)), "alias.targets[0].weight", "BAD_REQUEST"),
        (alias("prod", target(weight=math.nan)), "alias.targets[0].weight", "BAD_REQUEST"),
        (alias("prod", target(weight=math.inf)), "alias.targets[0].weight", "BAD_REQUEST"),
        (alias("prod", target(weight=1e308), target("b", weight=1e308)), "alias.targets", "BAD_REQUEST"),
        (alias("prod", "kjv", "b", "kjv"), "alias.targets[2]", "BAD_REQUEST"),
        (alias("prod", "kjv@dddd", "kjv@DDDDD"), "alias.targets[1]", "BAD_REQUEST"),
        (alias("prod", target(version="d" * 64), "kjv@dddd"), "alias.targets[1]", "BAD_REQUEST"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_alias_is_refused_by_field(message, field, reason):
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        error = await error_of(call(channel, "SetAlias", alias=message))
    assert (error.code, error.reason, error.metadata["field"]) == ("INVALID_ARGUMENT", reason, field)
    assert manager.calls == []


async def test_request_without_an_alias_is_refused():
    async with serve() as (_, channel, _):
        error = await error_of(call(channel, "SetAlias"))
    assert error.metadata["field"] == "alias.name"


async def test_current_and_an_older_version_of_one_adapter_may_share():
    async with serve() as (_, channel, _):
        response = await call(channel, "SetAlias", alias=alias("prod", "kjv", "kjv@0000"))
    assert len(response.alias.targets) == 2


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, "prod@abcd"])
async def test_delete_of_a_malformed_name_is_refused(name):
    async with serve() as (_, channel, _):
        error = await error_of(call(channel, "DeleteAlias", name=name))
    assert (error.reason, error.metadata["field"]) == ("ADAPTER_ID_INVALID", "name")


@pytest.mark.parametrize(
    "kind",
    [errors.AdapterNotFoundError, errors.AdapterExistsError, errors.AdapterDigestError, errors.AdapterMemoryError],
)
@pytest.mark.parametrize(
    ("method", "fields"), [("SetAlias", {"alias": alias("prod", "kjv")}), ("DeleteAlias", {"name": "prod"})]
)
async def test_error_of_the_manager_arrives(kind, method, fields):
    async with serve(FakeManager(fail=kind("What is wrong."))) as (_, channel, _):
        error = await error_of(call(channel, method, **fields))
    assert (error.code, error.reason, error.message) == (kind.code.value, kind.reason, "What is wrong.")
    if method == "SetAlias" and kind is errors.AdapterDigestError:
        assert error.metadata["field"] == "alias.targets"
