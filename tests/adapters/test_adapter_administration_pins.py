"""Pins and prefetches through the manager: what is kept in a tier, what is brought there, and who waits how long."""

import shutil
import time

import pytest
import torch
from lorikeet.adapters.errors import (
    AdapterDigestError,
    AdapterIdError,
    AdapterMemoryError,
    AdapterNotFoundError,
    AdapterNotReadyError,
    AdapterUnloadedError,
    ServingError,
)
from lorikeet.adapters.info import AdapterState, Tier
from lorikeet.adapters.state.state_dir import open_state_dir
from peft import LoraConfig

from .managing import PLAIN_BYTES, activate, checked, end, serve, start, wait_until

NO_TIME_S = 0.05


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def many(lora_dir, clone_adapter):
    """Six adapters a0 ... a5 of the same size."""
    return [clone_adapter(f"a{i}", 1.0 + i).name for i in range(6)]


@pytest.fixture
def manager(make_manager, many):
    """Room for three on the device and for three in host memory; all are loaded."""
    manager = make_manager(host_budget_bytes=3 * PLAIN_BYTES, device_budget_bytes=3 * PLAIN_BYTES)
    for name in many:
        manager.load(name)
    return manager


@pytest.fixture
def large(save_adapter, tmp_path):
    """An adapter of twice the size."""
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    save_adapter(config, tmp_path / "adapters" / "large")
    return "large"


def tiers(manager):
    return {info.adapter_id: info.tier for info in manager.list() if info.state is AdapterState.READY}


def occupy(manager, *names):
    """Run requests on adapters until the test ends them."""
    versions = [manager.resolve(name) for name in names]
    for version in versions:
        activate(manager, version)
    return versions


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DEVICE])
def test_pinned_adapter_is_never_evicted(tier, manager, many):
    info = manager.pin("a0", tier)
    assert (info.pinned, info.tier, info.in_flight) == (tier, tier, 0)
    for _ in range(2):
        for name in many[1:]:
            serve(manager, name)
            assert tiers(manager)["a0"] is tier
    assert manager.unpin("a0").pinned is None
    for name in many[1:]:
        serve(manager, name)
    assert tiers(manager)["a0"] is not tier
    assert manager.unpin("a0").pinned is None, "again: nothing happens"


def test_pin_moves_to_the_version_that_replaces(manager, many, edit_config, tmp_path):
    manager.pin("a0", Tier.DEVICE)
    running = manager.resolve("a0")
    activate(manager, running)
    edit_config(tmp_path / "adapters" / "a0", lora_alpha=5)
    digest = manager.load("a0").digest
    wait_until(lambda: manager.get("a0").tier is Tier.DEVICE, "the new version, without any request for it")
    new, old = manager.describe("a0").versions
    assert (new.digest, new.pinned, old.pinned, old.state) == (digest, Tier.DEVICE, None, AdapterState.DRAINING)
    end(manager, running)
    for name in many[1:]:
        serve(manager, name)
    assert tiers(manager)["a0"] is Tier.DEVICE
    assert manager.rollback("a0").pinned is Tier.DEVICE
    wait_until(lambda: manager.get("a0").tier is Tier.DEVICE, "the version before")


def test_pin_to_the_other_tier_replaces_the_pin(manager, many):
    manager.pin("a0", Tier.DEVICE)
    manager.pin("a0", Tier.HOST)
    for name in many[1:]:
        serve(manager, name)
    assert (manager.get("a0").pinned, manager.get("a0").tier) == (Tier.HOST, Tier.HOST)
    manager.pin("a0", Tier.DEVICE)
    assert manager.get("a0").tier is Tier.DEVICE


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DEVICE])
def test_pins_leave_room_for_the_largest_other(tier, manager, many, large):
    """Or its requests would wait for ever."""
    manager.pin("a0", tier), manager.pin("a1", tier)
    with pytest.raises(AdapterMemoryError, match="Unpin one"):
        manager.pin("a2", tier)
    assert manager.get("a2").pinned is None
    for call in (manager.load, manager.plan_load):
        with pytest.raises(AdapterMemoryError, match="pinned adapters would take"):
            call(large)
    manager.unpin("a1")
    assert manager.load(large).state is AdapterState.READY
    with pytest.raises(AdapterMemoryError):
        manager.pin("a1", tier)
    serve(manager, large)
    manager.unpin("a0")
    manager.unload(large)


def test_slots_are_room_too(make_manager, many):
    manager = make_manager(max_slots=2)
    for name in many:
        manager.load(name)
    manager.pin("a0", Tier.DEVICE)
    with pytest.raises(AdapterMemoryError):
        manager.pin("a1", Tier.DEVICE)
    for name in many:
        serve(manager, name)


def test_pin_waits_and_stays_when_its_time_is_over(manager):
    versions = occupy(manager, "a0", "a1", "a2")
    with pytest.raises(AdapterNotReadyError, match="did not come into device memory in time"):
        manager.pin("a3", Tier.DEVICE, NO_TIME_S)
    info = manager.get("a3")
    assert (info.pinned, info.in_flight, info.state) == (Tier.DEVICE, 0, AdapterState.READY)
    end(manager, versions[0])
    wait_until(lambda: manager.get("a3").tier is Tier.DEVICE, "the pinned one, although nobody waits any more")
    end(manager, versions[1]), end(manager, versions[2])


def test_pin_returns_when_room_comes(manager):
    versions = occupy(manager, "a0", "a1", "a2")
    pinning = start(manager.pin, "a3", Tier.DEVICE)
    wait_until(lambda: manager.snapshot().wanted == 1, "the wish")
    assert not pinning.done() and manager.get("a3").in_flight == 0
    for version in versions:
        end(manager, version)
    assert pinning.result(20).tier is Tier.DEVICE


def test_pin_of_what_is_not_there(manager):
    for name, error in (("nope", AdapterNotFoundError), ("../a0", AdapterIdError)):
        for call in (manager.unpin, lambda n: manager.pin(n, Tier.HOST)):
            with pytest.raises(error):
                call(name)


def test_pinned_adapter_whose_version_failed_can_be_unpinned_and_unloaded(make_manager, many, tmp_path):
    """Its files went, and so did its last copy: the pin must not make the id immortal."""
    state = open_state_dir(None, tmp_path / "state", 0)
    manager = make_manager(state=state, host_budget_bytes=PLAIN_BYTES, device_budget_bytes=3 * PLAIN_BYTES)
    manager.load("a0"), manager.load("a1")
    shutil.rmtree(tmp_path / "adapters" / "a0")
    with pytest.raises(AdapterUnloadedError):
        manager.pin("a0", Tier.DEVICE)
    assert manager.get("a0").state is AdapterState.FAILED
    with pytest.raises(ServingError, match="unpin it first"):
        manager.unload("a0")
    assert manager.unpin("a0").state is AdapterState.FAILED
    manager.unload("a0")
    assert list(tiers(manager)) == ["a1"]
    manager.close()
    state.close()


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DEVICE])
def test_prefetch_brings_in_and_pins_nothing(tier, manager, many):
    assert manager.get("a0").tier is Tier.DISK
    info = manager.prefetch("a0", tier)
    assert (info.tier, info.pinned, info.in_flight) == (tier, None, 0)
    assert manager.prefetch("a0", tier).tier is tier
    for name in many[1:]:
        serve(manager, name)
    assert tiers(manager)["a0"] is Tier.DISK


def test_prefetch_by_every_kind_of_reference(manager, edit_config, tmp_path):
    old = manager.get("a0").digest
    manager.set_alias("prod", [("a0", 1.0)])
    edit_config(tmp_path / "adapters" / "a0", lora_alpha=5)
    new = manager.load("a0").digest
    for reference, digest in (("prod", old), (f"a0@{old[:6]}", old), (f"a0@{new}", new), ("a0", new)):
        info = manager.prefetch(reference, Tier.DEVICE)
        assert (info.digest, info.tier) == (digest, Tier.DEVICE)
    manager.set_alias("prod", [("a0", 1.0), ("a1", 1.0)])
    bad = {"prod": AdapterIdError, "nope": AdapterNotFoundError, "a0@xyz": AdapterDigestError, "a 0": AdapterIdError}
    for reference, error in bad.items():
        with pytest.raises(error):
            manager.prefetch(reference, Tier.HOST)


def test_prefetch_gives_up_when_all_is_in_use(manager):
    versions = occupy(manager, "a0", "a1", "a2")
    began = time.monotonic()
    for tier, name in ((Tier.DEVICE, "a3"), (Tier.DEVICE, "a4")):
        with pytest.raises(AdapterNotReadyError, match=f"{tier} memory"):
            manager.prefetch(name, tier, NO_TIME_S)
    assert time.monotonic() - began < 20
    stats = manager.snapshot()
    assert stats.wanted == 0 and all(info.in_flight == (info.adapter_id < "a3") for info in stats.adapters)
    for version in versions:
        end(manager, version)
    assert manager.prefetch("a3", Tier.DEVICE).tier is Tier.DEVICE


def test_prefetch_ends_when_its_version_does(manager):
    versions = occupy(manager, "a0", "a1", "a2")
    prefetching = start(manager.prefetch, "a3", Tier.DEVICE)
    wait_until(lambda: manager.snapshot().wanted == 1, "the wish")
    manager.unload("a3")
    for version in versions:
        end(manager, version)
    assert prefetching.result(20).tier is Tier.DEVICE, "it was admitted before, like a request"
    assert "a3" not in tiers(manager) and manager.snapshot().bytes_used[Tier.DEVICE] == 2 * PLAIN_BYTES


def test_prefetch_whose_device_has_no_memory(manager, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(manager.store, "write", full)
        with pytest.raises(AdapterMemoryError, match="no memory left"):
            manager.prefetch("a0", Tier.DEVICE)
    assert manager.prefetch("a0", Tier.DEVICE).tier is Tier.DEVICE


@pytest.mark.parametrize("call", ["pin", "prefetch"])
def test_close_ends_calls_that_wait(call, manager):
    versions = occupy(manager, "a0", "a1", "a2")
    waiting = start(getattr(manager, call), "a3", Tier.DEVICE)
    wait_until(lambda: manager.snapshot().wanted == 1, "the wish")
    manager.close()
    with pytest.raises(AdapterUnloadedError, match="shutting down"):
        waiting.result(20)
    for version in versions:
        end(manager, version)
