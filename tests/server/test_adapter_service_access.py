"""What a client may not do is refused before anything is looked up, so that nothing shows what exists."""

import dataclasses

import pytest
from lorikeet.adapters.info import AliasInfo, AliasTarget
from lorikeet.protos.v1 import adapters_pb2 as pb
from lorikeet.protos.v1 import generation_pb2
from lorikeet.protos.v1.generation_pb2_grpc import GenerationServiceStub

from .fake_manager import KJV, OLD_KJV, FakeManager
from .fakes import FakeEngine, OnlyAccess, call, error_of, loopback, serve


def set_alias(name, *targets):
    return {"alias": pb.Alias(name=name, targets=[pb.AliasTarget(adapter_id=target) for target in targets])}


MANAGED = [
    ("LoadAdapter", "adapter_id"),
    ("UnloadAdapter", "adapter_id"),
    ("RollbackAdapter", "adapter_id"),
    ("PinAdapter", "adapter_id"),
    ("UnpinAdapter", "adapter_id"),
    ("DeleteAlias", "name"),
]


@pytest.mark.parametrize(("method", "field"), MANAGED)
async def test_change_needs_the_right_to_manage(method, field):
    manager, access = FakeManager(), OnlyAccess(uses=["kjv"], sees=["kjv"])
    async with serve(manager, access=access) as (_, channel, _):
        error = await error_of(call(channel, method, **{field: "kjv"}))
    assert (error.code, error.reason) == ("PERMISSION_DENIED", "CLIENT_NOT_ALLOWED")
    assert access.asked == [("manage", "kjv")]
    assert manager.calls == []


@pytest.mark.parametrize(("method", "field"), MANAGED)
async def test_who_may_manage_may_change(method, field):
    manager = FakeManager(aliases={"kjv": AliasInfo("kjv", ())})
    async with serve(manager, access=OnlyAccess(manages=["kjv"])) as (_, channel, _):
        await call(channel, method, **{field: "kjv"})
    assert len(manager.calls) == 1


async def test_dry_run_needs_the_right_to_manage_too():
    manager = FakeManager()
    async with serve(manager, access=OnlyAccess(uses=["kjv"])) as (_, channel, _):
        error = await error_of(call(channel, "LoadAdapter", adapter_id="kjv", dry_run=True))
    assert error.code == "PERMISSION_DENIED"
    assert manager.calls == []


@pytest.mark.parametrize("reference", ["kjv", "kjv@dddd"])
async def test_prefetch_needs_the_right_to_use_the_name_without_its_version(reference):
    manager, access = FakeManager(), OnlyAccess(manages=["kjv"])
    async with serve(manager, access=access) as (_, channel, _):
        error = await error_of(call(channel, "PrefetchAdapter", adapter_id=reference))
        assert error.code == "PERMISSION_DENIED"
        assert manager.calls == []
        access.uses = ["kjv"]
        await call(channel, "PrefetchAdapter", adapter_id=reference)
    assert access.asked == [("use", "kjv")] * 2


@pytest.mark.parametrize("manages", [["prod"], ["prod", "kjv"], ["kjv", "devil"], []])
async def test_alias_needs_the_right_to_manage_it_and_every_target(manages):
    """Or a client could hand an adapter on, under another name, to those who may not use it."""
    manager = FakeManager()
    async with serve(manager, access=OnlyAccess(manages=manages)) as (_, channel, _):
        error = await error_of(call(channel, "SetAlias", **set_alias("prod", "kjv@dddd", "devil")))
    assert error.code == "PERMISSION_DENIED"
    assert manager.calls == []


async def test_alias_is_set_by_who_may_manage_it_and_its_targets():
    access = OnlyAccess(manages=["prod", "kjv"])
    async with serve(access=access) as (_, channel, _):
        await call(channel, "SetAlias", **set_alias("prod", "kjv@dddd"))
    assert access.asked == [("manage", "prod"), ("manage", "kjv")]


@pytest.mark.parametrize(
    ("method", "field"), [*MANAGED, ("GetAdapter", "adapter_id"), ("PrefetchAdapter", "adapter_id")]
)
async def test_refused_name_looks_the_same_whether_it_exists_or_not(method, field):
    async with serve(access=OnlyAccess()) as (_, channel, _):
        known = await error_of(call(channel, method, **{field: "kjv"}))
        unknown = await error_of(call(channel, method, **{field: "xyz"}))
    assert (known.code, known.reason) == (unknown.code, unknown.reason)
    assert known.message == unknown.message.replace("xyz", "kjv")
    assert known.metadata == {key: value.replace("xyz", "kjv") for key, value in unknown.metadata.items()}


async def test_what_may_not_be_seen_is_not_found():
    manager, access = FakeManager(), OnlyAccess(sees=["devil"])
    async with serve(manager, access=access) as (_, channel, _):
        for reference in ("kjv", "kjv@dddd", "nothing"):
            error = await error_of(call(channel, "GetAdapter", adapter_id=reference))
            assert (error.code, error.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert manager.calls == []


async def test_lists_show_only_what_may_be_seen_in_full_pages():
    infos = [dataclasses.replace(KJV, adapter_id=name) for name in ("a", "b", "c", "d")]
    aliases = {name: AliasInfo(name, (AliasTarget("a", "d" * 64, 1.0),)) for name in ("x", "y", "z")}
    access = OnlyAccess(sees=["b", "d", "x", "z", "prod"])
    async with serve(FakeManager(infos, aliases), access=access) as (_, channel, _):
        page = await call(channel, "ListAdapters", page_size=2)
        assert [adapter.adapter_id for adapter in page.adapters] == ["b", "d"]
        assert page.next_page_token == ""
        assert [list(adapter.aliases) for adapter in page.adapters] == [["prod"], ["prod"]]
        found = await call(channel, "ListAliases", page_size=2)
        assert [alias.name for alias in found.aliases] == ["x", "z"]
        assert found.next_page_token == ""


async def test_aliases_that_may_not_be_seen_are_left_out_of_descriptions():
    access = OnlyAccess(sees=["kjv", "prod"], manages=["kjv"], uses=["kjv"])
    async with serve(FakeManager([KJV, OLD_KJV]), access=access) as (_, channel, _):
        got = await call(channel, "GetAdapter", adapter_id="kjv")
        pinned = await call(channel, "PinAdapter", adapter_id="kjv")
        fetched = await call(channel, "PrefetchAdapter", adapter_id="kjv")
    for adapter in (got.adapter, got.versions[0], pinned.adapter, fetched.adapter):
        assert list(adapter.aliases) == ["prod"]


async def test_alias_gives_nothing_away_about_an_adapter_that_may_not_be_seen():
    manager = FakeManager([dataclasses.replace(KJV, adapter_id="prod"), OLD_KJV])
    manager.get = lambda reference: KJV  # what `prod` leads to
    async with serve(manager, access=OnlyAccess(uses=["prod"], sees=["prod"])) as (_, channel, _):
        error = await error_of(call(channel, "GetAdapter", adapter_id="prod"))
        assert (error.code, error.message) == ("NOT_FOUND", "There is no adapter 'prod' that this client may see.")
        adapter = (await call(channel, "PrefetchAdapter", adapter_id="prod")).adapter
    # No more than the answer to a request tells: which version it is. And where it is now.
    assert adapter == pb.Adapter(
        adapter_id="kjv", version=KJV.digest, state=pb.ADAPTER_STATE_READY, tier=pb.ADAPTER_TIER_DEVICE
    )


async def test_plan_hides_whose_copies_would_go():
    async with serve(access=OnlyAccess(manages=["new"], sees=["devil"])) as (_, channel, _):
        response = await call(channel, "LoadAdapter", adapter_id="new", dry_run=True)
    assert [(eviction.adapter_id, eviction.version) for eviction in response.plan.evictions] == [
        ("devil", "e" * 64),
        ("", ""),
    ]


async def test_decisions_are_made_in_the_context_of_the_call():
    """So that an Access can find out who calls: also in lists, which are made on another thread."""
    access = OnlyAccess(manages=["kjv"])
    manager = FakeManager(aliases={"prod": AliasInfo("prod", ())})
    async with serve(manager, access=access) as (_, channel, _):
        for method, fields in (("UnpinAdapter", {"adapter_id": "kjv"}), ("ListAdapters", {}), ("ListAliases", {})):
            access.request_ids.clear()
            await call(channel, method, request_id=f"id-of-{method}", **fields)
            assert access.request_ids == {f"id-of-{method}"}


@pytest.mark.parametrize("reference", ["kjv", "kjv@d1d1", "nothing", "prod"])
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_request_for_an_adapter_needs_the_right_to_use_it(reference, method):
    async with loopback(access=OnlyAccess(uses=["other"])) as server:
        stream = getattr(server.stub, method)(generation_pb2.GenerateRequest(prompt="x", adapter_id=reference))
        error = await error_of(stream if method == "Generate" else stream.read())
    assert (error.code, error.reason) == ("PERMISSION_DENIED", "CLIENT_NOT_ALLOWED")
    assert server.engine.submitted == []
    assert (server.adapters.resolved, server.adapters.pins) == ([], 0)


async def test_right_to_use_an_alias_does_not_need_the_right_to_use_its_targets():
    access = OnlyAccess(uses=["prod"])
    async with loopback(access=access) as server:
        response = await server.stub.Generate(generation_pb2.GenerateRequest(prompt="x", adapter_id="prod"))
    assert response.adapter.adapter_id == "kjv"
    assert access.asked == [("use", "prod")]


async def test_base_is_asked_about_too():
    access = OnlyAccess([""])
    async with serve(access=access, engine=FakeEngine()) as (_, channel, _):
        response = await GenerationServiceStub(channel).Generate(generation_pb2.GenerateRequest(prompt="x"))
    assert response.text == "Hello world"
    assert access.asked == [("use", "")]
