"""The RPCs about adapters over real gRPC in one process: what reaches the manager, what comes back, what is refused."""

import dataclasses
import time
from pathlib import Path

import pytest
import structlog
from lorikeet.adapters import errors
from lorikeet.adapters.info import AdapterState, LoadOptions, Tier
from lorikeet.protos.v1 import adapters_pb2 as pb
from lorikeet.server import adapter_service

from .fake_manager import KJV, OLD_KJV, FakeManager
from .fakes import call, error_of, serve

ID_CALLS = ["LoadAdapter", "UnloadAdapter", "RollbackAdapter", "PinAdapter", "UnpinAdapter"]
REFERENCE_CALLS = ["GetAdapter", "PrefetchAdapter"]


async def test_adapter_is_described_in_full_with_its_versions():
    async with serve() as (_, channel, _):
        response = await call(channel, "GetAdapter", adapter_id="kjv")
    adapter = response.adapter
    assert (adapter.adapter_id, adapter.version, adapter.size_bytes) == ("kjv", "d" * 64, 12345)
    assert (adapter.state, adapter.tier) == (pb.ADAPTER_STATE_READY, pb.ADAPTER_TIER_DEVICE)
    assert [(s.module, s.rank, s.scaling) for s in adapter.slices] == [("q_proj", 4, 0.5), ("v_proj", 8, 2.0)]
    assert (adapter.max_rank, adapter.in_flight_requests, adapter.error) == (8, 3, "")
    assert (adapter.load_time.seconds, adapter.load_time.nanos) == (1_700_000_000, 250_000_000)
    assert (adapter.source, adapter.method, adapter.warning) == ("kjv-folder", "rsLoRA", "another base")
    assert (adapter.current, adapter.pinned_tier) == (True, pb.ADAPTER_TIER_HOST)
    assert (list(adapter.aliases), adapter.proof) == (["prod", "secret-alias"], "2 prompts replayed")
    assert (adapter.trained_for, adapter.module_count) == ("org/base", 14)
    current, old = response.versions
    assert current == adapter
    assert (old.version, old.state, old.current) == ("0" * 64, pb.ADAPTER_STATE_STORED, False)
    assert old.pinned_tier == pb.ADAPTER_TIER_UNSPECIFIED


def test_every_field_of_an_adapter_is_filled():
    filled = dataclasses.replace(KJV, error="x")
    message = adapter_service.adapter_message(filled, lambda alias: True)
    assert {field.name for field, _ in message.ListFields()} == set(pb.Adapter.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("state", AdapterState)
@pytest.mark.parametrize("tier", Tier)
def test_every_state_and_tier_has_a_value_in_the_proto(state, tier):
    message = adapter_service.adapter_message(dataclasses.replace(KJV, state=state, tier=tier, pinned=tier), bool)
    assert pb.AdapterState.Name(message.state) == f"ADAPTER_STATE_{state.name}"
    assert pb.AdapterTier.Name(message.tier) == f"ADAPTER_TIER_{tier.name}"
    assert message.pinned_tier == message.tier


async def test_one_version_is_described_by_its_digest():
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        response = await call(channel, "GetAdapter", adapter_id="kjv@0000")
    assert response.adapter.version == OLD_KJV.digest
    assert manager.calls == [("describe", "kjv@0000")]


@pytest.mark.parametrize(
    ("fields", "source", "options"),
    [
        ({}, None, LoadOptions()),
        ({"path": "sub/folder"}, Path("sub/folder"), LoadOptions()),
        ({"source": "s3://bucket/x"}, "s3://bucket/x", LoadOptions()),
        ({"allow_zero": True}, None, LoadOptions(allow_zero=True)),
        ({"allow_other_base": True}, None, LoadOptions(allow_other_base=True)),
        ({"expected_version": "AB" * 32}, None, LoadOptions(expected_digest="ab" * 32)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dry_run", [False, True])
async def test_load_hands_every_field_to_the_manager(fields, source, options, dry_run):
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        response = await call(channel, "LoadAdapter", adapter_id="new", dry_run=dry_run, **fields)
    assert manager.calls == [("plan_load" if dry_run else "load", "new", source, options)]
    assert response.adapter.adapter_id == "new"
    assert response.HasField("plan") == dry_run


async def test_dry_run_answers_with_the_plan_and_loads_nothing():
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        response = await call(channel, "LoadAdapter", adapter_id="new", dry_run=True)
    assert response.plan == pb.LoadPlan(
        is_new=True, host_bytes=2**20, device_bytes=3 * 2**20, fits_host=False, fits_device=True,
        evictions=[
            pb.AdapterEviction(adapter_id="devil", version="e" * 64, tier=pb.ADAPTER_TIER_DEVICE),
            pb.AdapterEviction(adapter_id="secret", version="f" * 64, tier=pb.ADAPTER_TIER_DEVICE),
        ],
    )  # fmt: skip
    assert response.adapter.state == pb.ADAPTER_STATE_STORED
    assert manager.infos == [KJV, OLD_KJV]


async def test_unload_and_unload_again():
    async with serve() as (_, channel, _):
        await call(channel, "UnloadAdapter", adapter_id="kjv")
        for method in ("UnloadAdapter", "GetAdapter"):
            error = await error_of(call(channel, method, adapter_id="kjv"))
            assert (error.code, error.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")


@pytest.mark.parametrize(("version", "prefix"), [("", ""), ("0000", "0000"), ("ABCDEF", "abcdef")])
async def test_rollback_to_the_one_before_or_by_digest(version, prefix):
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        response = await call(channel, "RollbackAdapter", adapter_id="kjv", version=version)
    assert manager.calls == [("rollback", "kjv", prefix)]
    assert (response.adapter.version, response.adapter.current) == (OLD_KJV.digest, True)


@pytest.mark.parametrize("method", ["PinAdapter", "PrefetchAdapter"])
@pytest.mark.parametrize(
    ("tier", "wanted"),
    [
        (pb.ADAPTER_TIER_UNSPECIFIED, Tier.DEVICE),
        (pb.ADAPTER_TIER_DEVICE, Tier.DEVICE),
        (pb.ADAPTER_TIER_HOST, Tier.HOST),
    ],
)
async def test_pin_and_prefetch_wait_almost_as_long_as_the_client(method, tier, wanted):
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        started = time.monotonic()
        response = await call(channel, method, adapter_id="kjv", tier=tier, deadline_s=90)
        took_s = time.monotonic() - started
    [(_, name, given, timeout_s)] = manager.calls
    assert (name, given) == ("kjv", wanted)
    # gRPC sends the time that is left rounded up, to tenths of a second here.
    assert 90 - took_s - adapter_service.ANSWER_S < timeout_s <= 90.5 - adapter_service.ANSWER_S
    adapter = response.adapter
    assert (adapter.pinned_tier if method == "PinAdapter" else adapter.tier) == pb.AdapterTier.Value(
        f"ADAPTER_TIER_{wanted.name}"
    )


@pytest.mark.parametrize("method", ["PinAdapter", "PrefetchAdapter"])
async def test_pin_and_prefetch_without_a_deadline_do_not_wait_for_ever(method):
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        await call(channel, method, adapter_id="kjv")
        await call(channel, method, adapter_id="kjv", deadline_s=100_000)
    assert [timeout_s for *_, timeout_s in manager.calls] == [adapter_service.MAX_WAIT_S] * 2


async def test_reason_of_a_wait_in_vain_arrives_before_the_deadline():
    manager = FakeManager(fail=errors.AdapterNotReadyError("Adapter 'kjv' is not on the device yet."))
    async with serve(manager) as (_, channel, _):
        error = await error_of(call(channel, "PinAdapter", adapter_id="kjv", deadline_s=20))
    assert (error.code, error.reason) == ("DEADLINE_EXCEEDED", "ADAPTER_NOT_READY")


async def test_unpin():
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        response = await call(channel, "UnpinAdapter", adapter_id="kjv")
    assert manager.calls == [("unpin", "kjv")]
    assert response.adapter.pinned_tier == pb.ADAPTER_TIER_UNSPECIFIED


@pytest.mark.parametrize("method", ["PinAdapter", "PrefetchAdapter"])
@pytest.mark.parametrize("tier", [pb.ADAPTER_TIER_DISK, 9, -1])
async def test_tier_that_nothing_can_be_brought_to_is_refused(method, tier):
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        error = await error_of(call(channel, method, adapter_id="kjv", tier=tier))
    assert (error.code, error.reason, error.metadata["field"]) == ("INVALID_ARGUMENT", "BAD_REQUEST", "tier")
    assert "ADAPTER_TIER_HOST and ADAPTER_TIER_DEVICE" in error.message
    assert manager.calls == []


@pytest.mark.parametrize("method", ID_CALLS + REFERENCE_CALLS)
@pytest.mark.parametrize("adapter_id", ["", "../kjv", "a/b", ".x", "x" * 129, "käse", "a\n", "a b", "kjv\0", "@abcd"])
async def test_malformed_adapter_id_is_refused_by_every_call(method, adapter_id):
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        error = await error_of(call(channel, method, adapter_id=adapter_id))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "ADAPTER_ID_INVALID")
    assert error.metadata == {"field": "adapter_id"}
    assert manager.calls == []


@pytest.mark.parametrize("method", ID_CALLS)
async def test_version_is_refused_where_an_adapter_is_meant(method):
    async with serve() as (_, channel, _):
        error = await error_of(call(channel, method, adapter_id="kjv@dddd"))
    assert (error.reason, error.metadata["field"]) == ("ADAPTER_ID_INVALID", "adapter_id")


@pytest.mark.parametrize("method", REFERENCE_CALLS)
@pytest.mark.parametrize("prefix", ["", "abc", "xyzw", "a" * 65, "abcd@abcd", "abcd "])
async def test_malformed_digest_prefix_is_refused(method, prefix):
    async with serve() as (_, channel, _):
        error = await error_of(call(channel, method, adapter_id=f"kjv@{prefix}"))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "ADAPTER_DIGEST_INVALID")
    assert error.metadata["field"] == "adapter_id"


@pytest.mark.parametrize(
    ("method", "fields", "field", "reason", "word"),
    [
        ("LoadAdapter", {"path": "x", "source": "hf://o/n"}, "source", "BAD_REQUEST", "both set"),
        ("LoadAdapter", {"source": "folder"}, "source", "ADAPTER_SOURCE_INVALID", "no URI"),
        ("LoadAdapter", {"source": "hf://" + "x" * 5000}, "source", "BAD_REQUEST", "5005 characters"),
        ("LoadAdapter", {"path": "x" * 4097}, "path", "BAD_REQUEST", "4097 characters"),
        ("LoadAdapter", {"expected_version": "ab"}, "expected_version", "ADAPTER_DIGEST_INVALID", "64 hex digits"),
        ("LoadAdapter", {"expected_version": "g" * 64}, "expected_version", "ADAPTER_DIGEST_INVALID", "64 hex digits"),
        ("LoadAdapter", {"expected_version": "a" * 65}, "expected_version", "ADAPTER_DIGEST_INVALID", "65 characters"),
        ("RollbackAdapter", {"version": "abc"}, "version", "ADAPTER_DIGEST_INVALID", "4 to 64 hex digits"),
        ("RollbackAdapter", {"version": "wxyz"}, "version", "ADAPTER_DIGEST_INVALID", "4 to 64 hex digits"),
        ("RollbackAdapter", {"version": "a" * 65}, "version", "ADAPTER_DIGEST_INVALID", "4 to 64 hex digits"),
    ],
    ids=str,
)
async def test_bad_field_is_refused_by_name_before_the_manager_hears_of_it(method, fields, field, reason, word):
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        error = await error_of(call(channel, method, adapter_id="kjv", **fields))
    assert (error.code, error.reason, error.metadata["field"]) == ("INVALID_ARGUMENT", reason, field)
    assert field in error.message
    assert word in error.message
    assert manager.calls == []


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServingError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.reason)
@pytest.mark.parametrize("method", ID_CALLS + REFERENCE_CALLS)
async def test_every_error_of_the_manager_arrives_as_it_is(kind, method):
    async with serve(FakeManager(fail=kind("What is wrong.", {"detail": "x"}))) as (_, channel, _):
        error = await error_of(call(channel, method, adapter_id="kjv"))
    assert (error.code, error.reason, error.message) == (kind.code.value, kind.reason, "What is wrong.")
    assert error.metadata["detail"] == "x"


@pytest.mark.parametrize(
    ("method", "fields", "kind", "field"),
    [
        ("LoadAdapter", {"path": "../x"}, errors.AdapterIdError, "path"),
        ("LoadAdapter", {"source": "s3://other/x"}, errors.AdapterSourceError, "source"),
        ("LoadAdapter", {"source": "s3://x/y", "dry_run": True}, errors.AdapterSourceError, "source"),
        ("LoadAdapter", {}, errors.AdapterIdError, "adapter_id"),
        ("RollbackAdapter", {"version": "abcd"}, errors.AdapterDigestError, "version"),
        ("RollbackAdapter", {}, errors.AdapterIdError, "adapter_id"),
        ("UnloadAdapter", {}, errors.AdapterIdError, "adapter_id"),
        ("PinAdapter", {}, errors.AdapterIdError, "adapter_id"),
        ("UnpinAdapter", {}, errors.AdapterIdError, "adapter_id"),
        ("GetAdapter", {}, errors.AdapterDigestError, "adapter_id"),
        ("PrefetchAdapter", {}, errors.AdapterDigestError, "adapter_id"),
    ],
)
async def test_error_of_the_manager_blames_the_field_that_it_came_from(method, fields, kind, field):
    async with serve(FakeManager(fail=kind("No."))) as (_, channel, _):
        error = await error_of(call(channel, method, adapter_id="kjv", **fields))
    assert error.metadata["field"] == field


async def test_content_is_not_blamed_on_a_field():
    failure = errors.AdapterInvalidError("adapter_config.json is missing.", {"file": "adapter_config.json"})
    async with serve(FakeManager(fail=failure)) as (_, channel, _):
        error = await error_of(call(channel, "LoadAdapter", adapter_id="new", path="half"))
    assert error.metadata == {"file": "adapter_config.json"}


async def test_unexpected_exception_says_nothing_of_itself():
    manager = FakeManager()
    manager.describe = lambda reference: [][1]
    async with serve(manager) as (_, channel, _):
        error = await error_of(call(channel, "GetAdapter", adapter_id="kjv"))
    assert (error.code, error.reason) == ("INTERNAL", "INTERNAL")
    assert "list index" not in str(error)


async def test_log_line_names_the_adapter_of_a_call():
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        async with serve() as (_, channel, _):
            await call(channel, "GetAdapter", adapter_id="kjv@dddd")
            await call(channel, "UnpinAdapter", adapter_id="kjv")
    assert [(entry["method"], entry["adapter"]) for entry in logs] == [
        ("GetAdapter", "kjv@dddd"),
        ("UnpinAdapter", "kjv"),
    ]
