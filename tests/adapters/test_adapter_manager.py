"""The adapter manager with its threads: loading, replacing, unloading, tiers, and what the step thread sees of it."""

import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lorikeet.adapters.errors import (
    AdapterIdError,
    AdapterIncompatibleError,
    AdapterInvalidError,
    AdapterMemoryError,
    AdapterNotFoundError,
    AdapterUnloadedError,
    ServingError,
)
from lorikeet.adapters.info import AdapterState, Tier
from lorikeet.adapters.packing import PackedAdapter

PLAIN_BYTES = 4 * 3 * (4 * (32 + 32) + 4 * (48 + 32))  # lora_dir: rank 4 on q_proj and down_proj of 3 layers, float32


def wait_until(condition, what, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        threading.Event().wait(0.002)


def activate(manager, version, seconds=20.0):
    """What the step thread does for a waiting request: try between steps until the version is there."""
    slots = []

    def step():
        manager.step_work()
        slot = manager.try_activate(version)
        if slot is not None:
            slots.append(slot)
        return bool(slots)

    wait_until(step, f"{version} on the device", seconds)
    return slots[0]


def end(manager, version):
    manager.deactivate(version)
    manager.release(version)


def slot_deltas(manager, slot, unpack):
    store = manager.store
    tables = PackedAdapter(store.arena, store.site_offsets[:, slot], store.site_ranks[:, slot], None)
    return unpack(tables, data=store.arena)


class Recorder:
    """An observer."""

    def __init__(self):
        self.loads, self.evictions = [], []

    def on_load(self, adapter_id, outcome, seconds):
        assert seconds >= 0
        self.loads.append((adapter_id, outcome))

    def on_evict(self, tier):
        self.evictions.append(tier)


def test_loaded_adapter_comes_to_the_device_with_its_weights(make_manager, lora_dir, peft_deltas, unpack):
    manager = make_manager()
    info = manager.load("plain")
    assert (info.state, info.tier, info.max_rank, info.bytes) == (AdapterState.READY, Tier.HOST, 4, PLAIN_BYTES)
    assert (
        info.slices == {"q_proj": (4, 2.0), "down_proj": (4, 2.0)} and info.source == "plain" and info.method == "LoRA"
    )
    version = manager.resolve("plain")
    assert version.digest == info.digest
    slot = activate(manager, version)
    torch.testing.assert_close(slot_deltas(manager, slot, unpack), peft_deltas(lora_dir), rtol=1e-5, atol=1e-6)
    assert manager.get("plain").tier is Tier.DEVICE and manager.get("plain").in_flight == 1
    end(manager, version)
    assert manager.get("plain").in_flight == 0


def test_unknown_adapter_is_not_found(make_manager, lora_dir):
    manager = make_manager()
    for call in (manager.resolve, manager.unload, manager.get, manager.load):
        with pytest.raises(AdapterNotFoundError):
            call("nope")
    assert manager.list() == []


@pytest.mark.parametrize("adapter_id", ["../plain", "", "a/b", "x" * 200, ".hidden"])
def test_malformed_id_is_refused_everywhere(adapter_id, make_manager, lora_dir):
    manager = make_manager()
    for call in (manager.resolve, manager.unload, manager.get, manager.load):
        with pytest.raises(AdapterIdError):
            call(adapter_id)


def test_path_outside_the_roots_is_refused(make_manager, lora_dir, tmp_path):
    manager = make_manager()
    shutil.copytree(lora_dir, tmp_path / "elsewhere")
    with pytest.raises(AdapterIdError, match="outside"):
        manager.load("plain", tmp_path / "elsewhere")
    assert manager.list() == []


def test_loading_the_same_content_again_is_idempotent(make_manager, lora_dir):
    manager = make_manager()
    first = manager.load("plain")
    version = manager.resolve("plain")
    shutil.copytree(lora_dir, lora_dir.parent / "copy")
    for path in (None, lora_dir.parent / "copy"):
        again = manager.load("plain", path)
        assert (again.digest, again.in_flight) == (first.digest, 1) and len(manager.list()) == 1
    manager.release(version)


def test_replacing_drains_the_old_version_and_never_mixes_them(make_manager, lora_dir, clone_adapter, unpack):
    """Same name, same path, other content: another digest, another slot; running requests keep their weights."""
    manager = make_manager()
    manager.load("plain")
    old = manager.resolve("plain")
    old_slot = activate(manager, old)
    before = slot_deltas(manager, old_slot, unpack)
    tripled = clone_adapter("tripled", 3.0)
    shutil.rmtree(lora_dir)
    tripled.rename(lora_dir)
    manager.load("plain")
    new = manager.resolve("plain")
    new_slot = activate(manager, new)
    assert old.digest != new.digest and old_slot != new_slot
    for module, delta in slot_deltas(manager, old_slot, unpack).items():
        torch.testing.assert_close(delta, before[module], rtol=0, atol=0)
        torch.testing.assert_close(slot_deltas(manager, new_slot, unpack)[module], 9 * delta, rtol=1e-4, atol=1e-5)
    assert [i.state for i in manager.list()] == [AdapterState.READY, AdapterState.DRAINING]
    end(manager, old)
    assert [i.digest for i in manager.list()] == [new.digest]
    end(manager, new)


def test_unload_lets_running_requests_finish_and_frees_the_memory(make_manager, lora_dir):
    manager = make_manager()
    manager.load("plain")
    version = manager.resolve("plain")
    activate(manager, version)
    manager.unload("plain")
    with pytest.raises(AdapterNotFoundError):
        manager.resolve("plain")
    assert [i.state for i in manager.list()] == [AdapterState.DRAINING]
    end(manager, version)
    stats = manager.snapshot()
    assert manager.list() == [] and stats.bytes_used == {Tier.HOST: 0, Tier.DEVICE: 0} and manager.store.used_bytes == 0


def test_unload_returns_at_once_and_blocks_no_other_load(make_manager, lora_dir, clone_adapter):
    """SGLang holds one lock while a long stream drains."""
    manager = make_manager()
    clone_adapter("other", 2.0)
    manager.load("plain")
    version = manager.resolve("plain")
    activate(manager, version)
    manager.unload("plain")
    assert manager.load("other").state is AdapterState.READY
    assert manager.load("plain").state is AdapterState.READY
    end(manager, version)


def test_drain_deadline_fails_what_still_holds_the_version(make_manager, lora_dir):
    manager = make_manager(drain_deadline_s=0.05)
    dropped = []
    manager.on_version_dropped = dropped.append
    manager.load("plain")
    waiting, running = manager.resolve("plain"), manager.resolve("plain")
    activate(manager, running)
    manager.unload("plain")
    wait_until(lambda: dropped, "the deadline")
    assert dropped == [running]
    with pytest.raises(AdapterUnloadedError):
        manager.try_activate(waiting)
    manager.release(waiting)
    end(manager, running)
    assert manager.list() == [] and manager.store.used_bytes == 0


def test_replaced_version_without_requests_is_freed_at_once(make_manager, lora_dir, edit_config):
    manager = make_manager()
    manager.load("plain")
    edit_config(lora_dir, lora_alpha=16)
    manager.load("plain")
    assert manager.snapshot().bytes_used[Tier.HOST] == PLAIN_BYTES


BAD = {
    "dora": (AdapterIncompatibleError, lambda d, config, tensors: config(d, use_dora=True)),
    "nan": (
        AdapterInvalidError,
        lambda d, config, tensors: tensors(d, lambda t: next(iter(t.values())).fill_(float("nan"))),
    ),
    "truncated": (
        AdapterInvalidError,
        lambda d, config, tensors: (d / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}"),
    ),
    "empty": (AdapterInvalidError, lambda d, config, tensors: [f.unlink() for f in d.iterdir()]),
}


@pytest.mark.parametrize(("error", "spoil"), BAD.values(), ids=BAD)
def test_failed_load_says_why_and_leaves_everything_else_serving(
    error, spoil, make_manager, lora_dir, clone_adapter, edit_config, edit_tensors
):
    recorder = Recorder()
    manager = make_manager(observer=recorder)
    manager.load("plain")
    spoil(clone_adapter("bad"), edit_config, edit_tensors)
    with pytest.raises(error) as raised:
        manager.load("bad")
    info = manager.get("bad")
    assert (info.state, info.error) == (AdapterState.FAILED, raised.value.message)
    with pytest.raises(AdapterNotFoundError, match="failed to load"):
        manager.resolve("bad")
    version = manager.resolve("plain")
    activate(manager, version)
    end(manager, version)
    assert recorder.loads == [("plain", "ok"), ("bad", raised.value.reason)]


def test_failed_replacement_leaves_the_old_version_serving(make_manager, lora_dir, edit_config):
    manager = make_manager()
    digest = manager.load("plain").digest
    edit_config(lora_dir, use_dora=True)
    with pytest.raises(AdapterIncompatibleError):
        manager.load("plain")
    info = manager.get("plain")
    assert (info.state, info.digest) == (AdapterState.READY, digest) and "use_dora" in info.error


def test_unexpected_error_reaches_no_client(make_manager, lora_dir, monkeypatch):
    manager = make_manager()

    def explode(*args, **kwargs):
        raise RuntimeError("secret /etc/path")

    monkeypatch.setattr(manager._reader, "read", explode)
    with pytest.raises(ServingError) as error:
        manager.load("plain")
    assert "secret" not in error.value.message and error.value.code == "INTERNAL"


def test_zero_adapter_is_refused_unless_allowed(make_manager, lora_dir, edit_tensors):
    manager = make_manager()
    edit_tensors(lora_dir, lambda tensors: [t.zero_() for t in tensors.values()])
    with pytest.raises(AdapterInvalidError, match="zero everywhere"):
        manager.load("plain")
    assert manager.load("plain", allow_zero=True).state is AdapterState.READY
    assert make_manager(allow_zero=True).load("plain").state is AdapterState.READY


@pytest.mark.parametrize("budget", ["device_budget_bytes", "host_budget_bytes"])
def test_adapter_that_can_never_fit_is_refused_by_bytes(budget, make_manager, lora_dir):
    manager = make_manager(**{budget: PLAIN_BYTES - 256})
    with pytest.raises(AdapterMemoryError):
        manager.load("plain")


def test_base_of_another_name_is_a_warning_only(make_manager, lora_dir, edit_config):
    edit_config(lora_dir, base_model_name_or_path="someone/other-model")
    info = make_manager().load("plain")
    assert info.state is AdapterState.READY and "other-model" in info.warning


@pytest.fixture
def many(lora_dir, clone_adapter):
    """Six adapters a0 ... a5 of the same size."""
    return [clone_adapter(f"a{i}", 1.0 + i).name for i in range(6)]


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


def test_adapters_beyond_the_host_budget_are_read_again_off_the_step_thread(make_manager, many, monkeypatch):
    manager = make_manager(host_budget_bytes=2 * PLAIN_BYTES, max_slots=1)
    readers = set()
    read = manager._reader.read
    monkeypatch.setattr(
        manager._reader, "read", lambda *a, **k: (readers.add(threading.current_thread().name), read(*a, **k))[1]
    )
    for name in many:
        manager.load(name)
    assert manager.snapshot().names_by_tier()[Tier.DISK] == many[:4]
    for name in many:
        version = manager.resolve(name)
        activate(manager, version)
        end(manager, version)
        assert manager.snapshot().bytes_used[Tier.HOST] <= 2 * PLAIN_BYTES
    assert any(name.startswith("adapter-reread") for name in readers)
    assert all(name.startswith("adapter-") for name in readers)


def test_folder_that_changed_after_eviction_fails_that_version_only(make_manager, many, edit_config, tmp_path):
    manager = make_manager(host_budget_bytes=2 * PLAIN_BYTES)
    ready = threading.Event()
    manager.on_ready = ready.set
    for name in many:
        manager.load(name)
    changed, gone, other = manager.resolve("a0"), manager.resolve("a1"), manager.resolve("a2")
    edit_config(tmp_path / "adapters" / "a0", lora_alpha=99)
    shutil.rmtree(tmp_path / "adapters" / "a1")
    for version, message in ((changed, "other content"), (gone, "missing")):
        with pytest.raises(AdapterUnloadedError, match=message):
            activate(manager, version)
        manager.release(version)
    assert ready.is_set()
    activate(manager, other)
    end(manager, other)
    assert manager.get("a0").state is AdapterState.FAILED
    assert manager.load("a0").state is AdapterState.READY


def test_slow_disk_holds_up_neither_requests_nor_other_loads(make_manager, many, monkeypatch):
    manager = make_manager()
    manager.load("a0")
    gate, started = threading.Event(), threading.Event()
    read = manager._reader.read

    def slow(directory, **kwargs):
        if directory.name == "a1":
            started.set()
            assert gate.wait(20)
        return read(directory, **kwargs)

    monkeypatch.setattr(manager._reader, "read", slow)
    future = manager.load_in_background("a1")
    assert started.wait(20)
    assert manager.get("a1").state is AdapterState.LOADING
    with pytest.raises(AdapterNotFoundError, match="still being loaded"):
        manager.resolve("a1")
    version = manager.resolve("a0")
    activate(manager, version)
    assert manager.load("a2").state is AdapterState.READY
    end(manager, version)
    gate.set()
    assert future.result(20).state is AdapterState.READY


def test_unload_while_loading_wins(make_manager, many, monkeypatch):
    manager = make_manager()
    gate, started = threading.Event(), threading.Event()
    read = manager._reader.read

    def slow(directory, **kwargs):
        started.set()
        assert gate.wait(20)
        return read(directory, **kwargs)

    monkeypatch.setattr(manager._reader, "read", slow)
    future = manager.load_in_background("a1")
    assert started.wait(20)
    manager.unload("a1")
    gate.set()
    with pytest.raises(AdapterUnloadedError, match="while it was being loaded"):
        future.result(20)
    assert manager.list() == []


def test_failed_device_copy_fails_its_requests_and_nothing_else(make_manager, many, monkeypatch):
    manager = make_manager()
    manager.load("a0"), manager.load("a1")
    write = manager.store.write
    broken = manager.resolve("a0")
    monkeypatch.setattr(manager.store, "write", lambda *args: (_ for _ in ()).throw(RuntimeError("device trouble")))
    with pytest.raises(ServingError, match="could not be copied"):
        activate(manager, broken)
    manager.release(broken)
    monkeypatch.setattr(manager.store, "write", write)
    fine = manager.resolve("a1")
    activate(manager, fine)
    end(manager, fine)
    manager.store.check_integrity()


def test_death_of_the_loader_thread_is_told(make_manager, many, monkeypatch):
    """A server that can bring in no adapter any more must not look alive."""
    manager = make_manager()
    died = []
    manager.on_dead = died.append
    manager.load("a0")
    version = manager.resolve("a0")
    monkeypatch.setattr(manager._registry, "claim_device", lambda *args: 1 / 0)
    assert manager.try_activate(version) is None
    wait_until(lambda: died, "the report")
    assert isinstance(died[0], ZeroDivisionError)
    manager.release(version)


def test_scattered_memory_is_compacted_between_steps(make_manager, many, save_adapter, tmp_path, unpack):
    from peft import LoraConfig

    big = tmp_path / "adapters" / "big"
    save_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"), big)
    manager = make_manager(device_budget_bytes=4 * (PLAIN_BYTES + 256))
    woken = threading.Event()
    versions = {}
    for name in many[:4]:
        manager.load(name)
        versions[name] = manager.resolve(name)
        activate(manager, versions[name])
    slots = {name: manager.try_activate(versions[name]) for name in ("a1", "a3")}
    expected = {name: slot_deltas(manager, slot, unpack) for name, slot in slots.items()}
    for name in ("a0", "a2"):
        end(manager, versions[name])
        manager.unload(name)
    manager.on_ready = woken.set
    manager.load("big")
    version = manager.resolve("big")
    assert manager.try_activate(version) is None
    assert woken.wait(20), "the engine is asked to compact"
    assert manager.try_activate(version) is None, "nothing moves but between steps"
    activate(manager, version)
    for name, slot in slots.items():
        for module, delta in slot_deltas(manager, slot, unpack).items():
            torch.testing.assert_close(delta, expected[name][module], rtol=0, atol=0)
    manager.store.check_integrity()


def test_wish_is_idempotent_and_cancelled_with_its_request(make_manager, many):
    manager = make_manager(max_slots=1)
    manager.load("a0"), manager.load("a1")
    running, waiting = manager.resolve("a0"), manager.resolve("a1")
    activate(manager, running)
    for _ in range(3):
        assert manager.try_activate(waiting) is None
    assert manager.snapshot().wanted == 1
    manager.release(waiting)
    assert manager.snapshot().wanted == 0
    end(manager, running)


def test_close_ends_loads_that_have_not_begun(make_manager, many, monkeypatch):
    manager = make_manager()
    gate = threading.Event()
    read = manager._reader.read
    monkeypatch.setattr(manager._reader, "read", lambda *a, **k: (gate.wait(20), read(*a, **k))[1])
    with ThreadPoolExecutor(8) as callers:
        futures = [callers.submit(manager.load, name) for name in many * 2]
        wait_until(lambda: len([i for i in manager.list() if i.state is AdapterState.LOADING]) == 6, "loads to queue")
        closing = callers.submit(manager.close)
        gate.set()
        closing.result(20)
        outcomes = [f.exception(20) for f in futures]
    assert all(e is None or isinstance(e, AdapterUnloadedError) for e in outcomes)
    with pytest.raises(AdapterUnloadedError, match="shutting down"):
        manager.load("a0")


def test_traffic_loads_and_unloads_at_once_leak_nothing(make_manager, many, edit_config, tmp_path):
    """A step thread, clients and operators together; afterwards every reference and byte is accounted for."""
    manager = make_manager(host_budget_bytes=3 * PLAIN_BYTES, device_budget_bytes=3 * (PLAIN_BYTES + 256), max_slots=3)
    for name in many:
        manager.load(name)
    stop = threading.Event()
    problems = []
    counts = {"ran": 0, "refused": 0}

    def operator(seed):
        rng = random.Random(seed)
        while not stop.is_set():
            name = rng.choice(many)
            try:
                if rng.random() < 0.3:
                    manager.unload(name)
                elif rng.random() < 0.3:
                    edit_config(tmp_path / "adapters" / name, lora_alpha=rng.randint(1, 9))
                else:
                    manager.load(name)
            except (AdapterNotFoundError, AdapterUnloadedError, AdapterInvalidError):
                pass  # invalid: the config was read while another operator wrote it
            except Exception as error:
                problems.append(error)

    def step_loop(seed):
        rng = random.Random(seed)
        waiting, running = [], []
        while not stop.is_set() or waiting or running:
            manager.step_work()
            if not stop.is_set() and len(waiting) < 6:
                try:
                    waiting.append(manager.resolve(rng.choice(many)))
                except AdapterNotFoundError:
                    counts["refused"] += 1
            for version in list(waiting):
                try:
                    slot = manager.try_activate(version)
                except ServingError:
                    manager.release(version)
                    waiting.remove(version)
                    continue
                if slot is not None:
                    assert manager.store.rank_sums[slot].sum() == 24
                    waiting.remove(version)
                    running.append(version)
            if running and rng.random() < 0.7:
                end(manager, running.pop(rng.randrange(len(running))))
                counts["ran"] += 1

    def guarded(function, seed):
        try:
            function(seed)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=guarded, args=(step_loop, 0))]
    threads += [threading.Thread(target=guarded, args=(operator, seed)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: counts["ran"] >= 100 or problems, "a hundred requests", 40)
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not problems
    for info in manager.list():
        assert info.in_flight == 0 and info.state in (AdapterState.READY, AdapterState.FAILED)
    for name in many:
        if any(i.adapter_id == name for i in manager.list()):
            manager.unload(name)
    wait_until(lambda: manager.list() == [], "copies under way to end")
    assert manager.snapshot().bytes_used == {Tier.HOST: 0, Tier.DEVICE: 0}
    manager.store.check_integrity()
    assert manager.store.used_bytes == 0
