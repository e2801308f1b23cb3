"""Memory and disks that fail or stall while an adapter moves between tiers: one clear error, nothing leaks or waits."""

import errno
import os
import shutil

import pytest
import torch
from lorikeet.adapters.errors import AdapterMemoryError, AdapterUnloadedError, AdapterUnreadableError, Code
from lorikeet.adapters.info import AdapterState, Tier

from .managing import (
    PLAIN_BYTES,
    Gate,
    activate,
    check,
    checked,
    end,
    serve,
    slot_deltas,
    start,
    wait_until,
    watch_reads,
)

STEP_S = 10.0  # far beyond what a call of the step thread takes, far below what the stalled thing takes


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def many(lora_dir, clone_adapter):
    """Six adapters a0 ... a5 of the same size."""
    return [clone_adapter(f"a{i}", 1.0 + i).name for i in range(6)]


def fail_writes(monkeypatch, manager, error, times=1):
    """The next copies to the device write half of the adapter, and then fail."""
    write, left = manager.store.write, iter(range(times))

    def failing(placement, packed, *how):
        if next(left, None) is None:
            return write(placement, packed, *how)
        manager.store.arena[placement.start : placement.start + packed.data.numel() // 2].fill_(float("nan"))
        raise error

    monkeypatch.setattr(manager.store, "write", failing)


def fail_reads(monkeypatch, part):
    """Reads of weights files whose path has this part fail in the middle of the payload."""

    def before(path, _):
        if part in path:
            counts[path] = counts.get(path, 0) + 1
            if counts[path] > 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    counts = {}
    watch_reads(monkeypatch, before)


def unload_all(manager):
    for info in manager.list():
        manager.unload(info.adapter_id)
    wait_until(lambda: manager.list() == [], "everything to go")
    assert manager.snapshot().bytes_used == {Tier.HOST: 0, Tier.DEVICE: 0} and manager.store.used_bytes == 0
    check(manager)


def test_device_out_of_memory_in_the_middle_of_a_copy(make_manager, many, monkeypatch, peft_deltas, unpack, tmp_path):
    """The request that waits gets RESOURCE_EXHAUSTED; the next one gets the adapter, whole."""
    manager = make_manager()
    manager.load("a0"), manager.load("a1")
    digest = manager.get("a0").digest
    running = manager.resolve("a1")
    activate(manager, running)
    fail_writes(monkeypatch, manager, torch.OutOfMemoryError("CUDA out of memory. /some/path"))
    waiting = [manager.resolve("a0") for _ in range(3)]
    for version in waiting:
        with pytest.raises(AdapterMemoryError, match="no memory left while adapter 'a0' was copied") as raised:
            activate(manager, version)
        assert raised.value.code is Code.RESOURCE_EXHAUSTED and "/some/path" not in raised.value.message
    check(manager)
    again = manager.resolve("a0")
    assert again.digest == digest and again != waiting[0], "another life of the same content"
    slot = activate(manager, again)
    torch.testing.assert_close(
        slot_deltas(manager, slot, unpack), peft_deltas(tmp_path / "adapters" / "a0"), rtol=1e-5, atol=1e-6
    )
    for version in waiting:
        manager.release(version)
    end(manager, again), end(manager, running)
    assert [(i.adapter_id, i.state) for i in manager.list()] == [(n, AdapterState.READY) for n in ("a0", "a1")]
    unload_all(manager)


def test_device_out_of_memory_for_an_aliased_pinned_adapter_keeps_both(make_manager, many, monkeypatch):
    manager = make_manager()
    manager.load("a0")
    manager.set_alias("prod", [("a0", 1.0)])
    fail_writes(monkeypatch, manager, torch.OutOfMemoryError("no memory"))
    with pytest.raises(AdapterMemoryError):
        manager.pin("a0", Tier.DEVICE, 20)
    info = manager.get("a0")
    assert (info.pinned, info.aliases, info.state) == (Tier.DEVICE, ("prod",), AdapterState.READY)
    assert serve(manager, "prod").digest == info.digest
    assert manager.get("a0").tier is Tier.DEVICE


def test_device_out_of_memory_while_the_version_drains(make_manager, many, monkeypatch):
    manager = make_manager()
    manager.load("a0")
    version = manager.resolve("a0")
    manager.unload("a0")
    fail_writes(monkeypatch, manager, torch.OutOfMemoryError("no memory"))
    with pytest.raises(AdapterMemoryError):
        activate(manager, version)
    manager.release(version)
    assert manager.list() == []
    unload_all(manager)


def test_disk_that_fails_in_the_middle_of_a_load(make_manager, many, monkeypatch):
    """The client's folder may be fine, so this is UNAVAILABLE, and the same call works when the disk does."""
    manager = make_manager()
    manager.load("a1")
    with monkeypatch.context() as patch:
        fail_reads(patch, "/a0/")
        for call in (manager.load, manager.plan_load):
            with pytest.raises(AdapterUnreadableError) as raised:
                call("a0")
            assert raised.value.code is Code.UNAVAILABLE and "/a0/" not in raised.value.message
    assert manager.get("a0").state is AdapterState.FAILED
    assert manager.snapshot().bytes_used[Tier.HOST] == PLAIN_BYTES
    assert manager.load("a0").state is AdapterState.READY
    serve(manager, "a0"), serve(manager, "a1")
    unload_all(manager)


def test_disk_that_fails_while_an_evicted_version_is_read_again(make_manager, many, monkeypatch):
    manager = make_manager(host_budget_bytes=2 * PLAIN_BYTES)
    for name in many:
        manager.load(name)
    digest = manager.get("a0").digest
    waiting = manager.resolve("a0")
    with monkeypatch.context() as patch:
        fail_reads(patch, digest)
        with pytest.raises(AdapterUnloadedError, match="had left memory and could not be read again"):
            activate(manager, waiting)
    manager.release(waiting)
    serve(manager, "a5")
    assert manager.load("a0").digest == digest
    serve(manager, "a0")
    unload_all(manager)


def step_calls(manager, running, waiting, other):
    """All that a step thread and the request path ask of the manager."""
    manager.step_work()
    assert manager.try_activate(running) is not None
    manager.deactivate(running)
    assert manager.try_activate(waiting) is None
    manager.release(manager.resolve(other))
    manager.hold(running)
    manager.release(running)
    manager.snapshot(), manager.list(), manager.get(other), manager.list_aliases()


def test_step_thread_never_waits_for_a_slow_disk(make_manager, many, monkeypatch):
    """Both kinds of reads stall: a load, and a version that had left memory and that a request waits for."""
    manager = make_manager(host_budget_bytes=2 * PLAIN_BYTES)
    for name in many[:5]:
        manager.load(name)
    running, waiting = manager.resolve("a4"), manager.resolve("a0")
    activate(manager, running)
    with Gate() as gate:
        reading = set()

        def stall(path, thread):
            reading.add(thread.partition("_")[0])
            gate.pass_through()

        watch_reads(monkeypatch, stall)
        loading = start(manager.load, "a5")
        assert manager.try_activate(waiting) is None
        wait_until(lambda: reading == {"adapter-load", "adapter-reread"}, "both reads to stall")
        for _ in range(3):
            start(step_calls, manager, running, waiting, "a3").result(STEP_S)
        assert not loading.done()
    assert loading.result(20).state is AdapterState.READY
    activate(manager, waiting)
    end(manager, waiting), end(manager, running)


@pytest.mark.parametrize(
    "change",
    [
        lambda manager: manager.load("a2"),
        lambda manager: manager.unload("a3"),
        lambda manager: manager.pin("a1", Tier.HOST),
        lambda manager: manager.set_alias("prod", [("a1", 1.0)]),
    ],
    ids=["load", "unload", "pin", "alias"],
)
def test_step_thread_never_waits_for_a_slow_commit(change, make_manager, many, monkeypatch):
    manager = make_manager(max_slots=1)
    for name in ("a0", "a1", "a3"):
        manager.load(name)
    running, waiting = manager.resolve("a0"), manager.resolve("a1")
    activate(manager, running)
    database = manager._core.state.database
    with Gate() as gate:
        for name in ("save", "delete", "save_alias"):
            commit = getattr(database, name)
            monkeypatch.setattr(database, name, lambda *a, commit=commit: (gate.pass_through(), commit(*a)))
        changing = start(change, manager)
        gate.wait_reached()
        calls = start(step_calls, manager, running, waiting, "a3")
        calls.result(STEP_S)
        assert not changing.done()
        assert manager.list_aliases() == [] and manager.get("a1").pinned is None, "not acknowledged, not to be seen"
    changing.result(20)
    manager.release(waiting), end(manager, running)


def test_step_thread_never_waits_for_a_slow_store(make_manager, many, monkeypatch):
    """Keeping a version's files means waiting for a disk that syncs."""
    manager = make_manager(max_slots=1)
    manager.load("a0"), manager.load("a1")
    running, waiting = manager.resolve("a0"), manager.resolve("a1")
    activate(manager, running)
    fsync = os.fsync
    with Gate() as gate:
        monkeypatch.setattr(os, "fsync", lambda descriptor: (gate.pass_through(), fsync(descriptor))[1])
        loading = start(manager.load, "a2")
        gate.wait_reached()
        start(step_calls, manager, running, waiting, "a0").result(STEP_S)
        assert not loading.done()
    loading.result(20)
    manager.release(waiting), end(manager, running)


def test_step_thread_never_waits_for_a_slow_copy(make_manager, many, monkeypatch):
    manager = make_manager()
    manager.load("a0"), manager.load("a1")
    running, waiting = manager.resolve("a0"), manager.resolve("a1")
    activate(manager, running)
    write = manager.store.write
    with Gate() as gate:
        monkeypatch.setattr(manager.store, "write", lambda *args: (gate.pass_through(), write(*args))[1])
        assert manager.try_activate(waiting) is None
        gate.wait_reached()
        start(step_calls, manager, running, waiting, "a0").result(STEP_S)
    activate(manager, waiting)
    end(manager, waiting), end(manager, running)


def test_full_store_refuses_what_relies_on_it_and_nothing_else(make_manager, many, monkeypatch, tmp_path):
    """No room to keep files: adapters are served all the same, but an alias would be a promise that cannot be kept."""
    manager = make_manager()
    write = os.write

    def full(descriptor, data):
        if "/versions/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        manager.load("a0")
        serve(manager, "a0")
        with pytest.raises(AdapterUnreadableError, match="is full"):
            manager.set_alias("prod", [("a0", 1.0)])
        assert manager.list_aliases() == []
        manager.unload("a0")
    manager.load("a0")
    manager.set_alias("prod", [("a0", 1.0)])
    shutil.rmtree(tmp_path / "adapters" / "a0")
    serve(manager, "prod")
    manager.delete_alias("prod")
    unload_all(manager)
