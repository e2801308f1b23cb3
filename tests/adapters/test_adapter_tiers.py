"""Tiers through the manager: byte budgets, least recently used goes first, and what running requests use stays."""

import shutil
import threading

import pytest
import torch
from lorikeet.adapters.errors import AdapterMemoryError, AdapterUnloadedError
from lorikeet.adapters.info import AdapterState, Tier
from lorikeet.adapters.state.state_dir import open_state_dir
from peft import LoraConfig

from .managing import (
    PATIENCE_S,
    PLAIN_BYTES,
    Recorder,
    activate,
    checked,
    end,
    serve,
    slot_deltas,
    wait_until,
    watch_reads,
)


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def many(lora_dir, clone_adapter):
    """Six adapters a0 ... a5 of the same size."""
    return [clone_adapter(f"a{i}", 1.0 + i).name for i in range(6)]


@pytest.fixture
def empty_state(tmp_path):
    """Keeps no files of versions."""
    state = open_state_dir(None, tmp_path / "state", 0)
    yield state
    state.close()


@pytest.fixture
def make_storeless(empty_state, make_manager):
    """make_storeless(**overrides): a manager that can read evicted versions from their folders only."""
    return lambda **overrides: make_manager(state=empty_state, **overrides)


def in_tier(manager, tier):
    return manager.snapshot().names_by_tier()[tier]


def test_more_adapters_than_slots_all_get_their_turn(make_manager, many):
    recorder = Recorder()
    manager = make_manager(max_slots=2, observer=recorder)
    for name in many:
        manager.load(name)
    waiting = [manager.resolve(name) for name in many * 2]
    ran = []

    def step():
        """Each step runs what is there and asks for the rest, as a scheduler does."""
        manager.step_work()
        for version in list(waiting):
            if manager.try_activate(version) is not None:
                ran.append(version.adapter_id)
                waiting.remove(version)
                end(manager, version)
        return not waiting

    wait_until(step, "all requests to run")
    assert sorted(ran) == sorted(many * 2) and "device" in recorder.evictions
    assert manager.snapshot().wanted == 0


def test_least_recently_used_leaves_the_device(make_manager, many):
    recorder = Recorder()
    manager = make_manager(device_budget_bytes=2 * PLAIN_BYTES, observer=recorder)
    for name in many[:3]:
        manager.load(name)
    for name in ("a0", "a1", "a0"):
        serve(manager, name)
    assert in_tier(manager, Tier.DEVICE) == ["a0", "a1"] and recorder.evictions == []
    serve(manager, "a2")
    assert in_tier(manager, Tier.DEVICE) == ["a0", "a2"]
    serve(manager, "a1")
    assert in_tier(manager, Tier.DEVICE) == ["a1", "a2"]
    wait_until(lambda: recorder.evictions == ["device", "device"], "the loader thread to tell of both")
    assert manager.snapshot().bytes_used[Tier.DEVICE] == 2 * PLAIN_BYTES == manager.store.used_bytes


def test_least_recently_used_leaves_host_memory(make_manager, many):
    manager = make_manager(host_budget_bytes=3 * PLAIN_BYTES)
    for name in many[:3]:
        manager.load(name)
    version = manager.resolve("a0")  # a use
    manager.release(version)
    manager.load("a3")
    assert in_tier(manager, Tier.DISK) == ["a1"] and in_tier(manager, Tier.HOST) == ["a0", "a2", "a3"]


def test_what_running_requests_use_is_never_evicted(make_manager, many, unpack):
    manager = make_manager(device_budget_bytes=2 * PLAIN_BYTES)
    for name in many:
        manager.load(name)
    running = [manager.resolve(name) for name in ("a0", "a1")]
    slots = [activate(manager, version) for version in running]
    before = [slot_deltas(manager, slot, unpack) for slot in slots]
    waiting = [manager.resolve(name) for name in many[2:]]
    for _ in range(3):
        assert [manager.try_activate(version) for version in waiting] == [None] * 4
    assert in_tier(manager, Tier.DEVICE) == ["a0", "a1"] and manager.snapshot().wanted == 4
    end(manager, running[0])
    activate(manager, waiting[0])
    assert in_tier(manager, Tier.DEVICE) == ["a1", "a2"]
    torch.testing.assert_close(slot_deltas(manager, slots[1], unpack), before[1], rtol=0, atol=0)
    end(manager, waiting.pop(0)), end(manager, running[1])
    for version in waiting:
        activate(manager, version)
        end(manager, version)


def test_budget_counts_bytes_whatever_the_number(make_manager, many, save_adapter, tmp_path):
    """One large adapter takes the place of two small ones."""
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    save_adapter(config, tmp_path / "adapters" / "large")
    manager = make_manager(device_budget_bytes=2 * PLAIN_BYTES)
    assert manager.load("large").bytes == 2 * PLAIN_BYTES
    for name in many[:2]:
        manager.load(name)
        serve(manager, name)
    serve(manager, "large")
    assert in_tier(manager, Tier.DEVICE) == ["large"]
    serve(manager, "a0"), serve(manager, "a1")
    assert in_tier(manager, Tier.DEVICE) == ["a0", "a1"]


@pytest.mark.parametrize("budget", ["device_budget_bytes", "host_budget_bytes"])
def test_budget_smaller_than_the_adapter_refuses_it_before_it_is_read(budget, make_manager, many, monkeypatch):
    manager = make_manager(**{budget: PLAIN_BYTES - 256})
    reads = []
    watch_reads(monkeypatch, lambda path, _: reads.append(path))
    for call in (manager.load, manager.plan_load):
        with pytest.raises(AdapterMemoryError, match="Raise its budget"):
            call("a0")
    assert len(reads) == 4, "the header's length and the header, twice"
    assert manager.snapshot().bytes_used == {Tier.HOST: 0, Tier.DEVICE: 0}
    assert manager.get("a0").state is AdapterState.FAILED


def test_adapters_beyond_the_host_budget_are_read_again_off_the_step_thread(make_manager, many, monkeypatch):
    manager = make_manager(host_budget_bytes=2 * PLAIN_BYTES, max_slots=1)
    readers = set()
    watch_reads(monkeypatch, lambda _, thread: readers.add(thread))
    for name in many:
        manager.load(name)
    assert in_tier(manager, Tier.DISK) == many[:4]
    for name in many:
        serve(manager, name)
        assert manager.snapshot().bytes_used[Tier.HOST] <= 2 * PLAIN_BYTES
    assert any(name.startswith("adapter-reread") for name in readers)
    assert all(name.startswith("adapter-") for name in readers)


def test_evicted_version_outlives_its_folder(make_manager, many, edit_config, tmp_path, peft_deltas, unpack):
    """A version is its content: what the folder holds by now is another one, and another load's business."""
    manager = make_manager(host_budget_bytes=2 * PLAIN_BYTES)
    for name in many:
        manager.load(name)
    folders = {name: tmp_path / "adapters" / name for name in ("a0", "a1")}
    expected = {name: peft_deltas(folder) for name, folder in folders.items()}
    edit_config(folders["a0"], lora_alpha=99)
    shutil.rmtree(folders["a1"])
    assert {"a0", "a1"} <= set(in_tier(manager, Tier.DISK))
    for name in folders:
        version = manager.resolve(name)
        slot = activate(manager, version)
        torch.testing.assert_close(slot_deltas(manager, slot, unpack), expected[name], rtol=1e-5, atol=1e-6)
        end(manager, version)


def test_folder_that_changed_after_eviction_fails_that_version_only(make_storeless, many, edit_config, tmp_path):
    """Where no files are kept, the folder is all there is to read again."""
    manager = make_storeless(host_budget_bytes=2 * PLAIN_BYTES)
    ready = threading.Event()
    manager.on_ready = ready.set
    for name in many:
        manager.load(name)
    changed, gone, other = manager.resolve("a0"), manager.resolve("a1"), manager.resolve("a2")
    edit_config(tmp_path / "adapters" / "a0", lora_alpha=99)
    shutil.rmtree(tmp_path / "adapters" / "a1")
    for version, message in ((changed, "other content by now"), (gone, "missing")):
        with pytest.raises(AdapterUnloadedError, match=message):
            activate(manager, version)
        manager.release(version)
    assert ready.wait(PATIENCE_S)
    activate(manager, other)
    end(manager, other)
    assert manager.get("a0").state is AdapterState.FAILED
    assert manager.load("a0").state is AdapterState.READY


def test_replaced_version_that_cannot_be_read_again_keeps_its_last_copy(make_storeless, many, edit_config, tmp_path):
    """A request that waits on a version whose folder has other content by now must still get it."""
    manager = make_storeless(host_budget_bytes=2 * PLAIN_BYTES)
    manager.load("a0")
    old = manager.resolve("a0")
    edit_config(tmp_path / "adapters" / "a0", lora_alpha=99)
    manager.load("a0")
    for name in many[1:]:
        manager.load(name)
        serve(manager, name)
    activate(manager, old)
    end(manager, old)
