"""The adapter manager with all its threads at once: slow disks, races, deaths, and a step loop beside operators."""

import random
import threading

import pytest
import torch
from lorikeet.adapters.errors import (
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterUnloadedError,
    ServingError,
)
from lorikeet.adapters.info import AdapterState, Tier
from peft import LoraConfig

from .managing import (
    PLAIN_BYTES,
    activate,
    checked,
    end,
    slot_deltas,
    stall_reads,
    start,
    wait_until,
)


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def many(lora_dir, clone_adapter):
    """Six adapters a0 ... a5 of the same size."""
    return [clone_adapter(f"a{i}", 1.0 + i).name for i in range(6)]


def test_slow_disk_holds_up_neither_requests_nor_other_loads(make_manager, many, monkeypatch):
    manager = make_manager()
    manager.load("a0")
    with stall_reads(monkeypatch, "/a1/") as gate:
        loading = start(manager.load, "a1")
        gate.wait_reached()
        assert manager.get("a1").state is AdapterState.LOADING
        with pytest.raises(AdapterNotFoundError, match="still being loaded"):
            manager.resolve("a1")
        version = manager.resolve("a0")
        activate(manager, version)
        assert manager.load("a2").state is AdapterState.READY
        end(manager, version)
    assert loading.result(20).state is AdapterState.READY


def test_unload_while_loading_wins(make_manager, many, monkeypatch):
    manager = make_manager()
    with stall_reads(monkeypatch, "/a1/") as gate:
        loading = start(manager.load, "a1")
        gate.wait_reached()
        manager.unload("a1")
    with pytest.raises(AdapterUnloadedError, match="was unloaded while it was loaded"):
        loading.result(20)
    assert manager.list() == []


def test_a_copy_takes_every_core_only_while_no_request_runs(make_manager, many, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        manager = make_manager()
    finally:
        torch.set_num_threads(before)
    write, threads = manager.store.write, []

    def recorded(*args):
        threads.append((threading.current_thread().name, torch.get_num_threads(), *args[2:]))
        write(*args)

    monkeypatch.setattr(manager.store, "write", recorded)
    for adapter, is_running in (("a0", True), ("a1", False), ("a2", True)):
        manager.is_running = lambda is_running=is_running: is_running
        manager.load(adapter)
        manager.prefetch(adapter, Tier.DEVICE)
    # True: in turns with the step's threads.
    beside, alone = ("adapter-device_0", 1, True), ("adapter-device-idle_0", 2)
    assert threads == [beside, alone, beside]


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
    with stall_reads(monkeypatch, "/adapters/") as gate:
        loads = [start(manager.load, name) for name in many * 2]
        wait_until(lambda: [i.state for i in manager.list()] == [AdapterState.LOADING] * 6, "loads to queue")
        gate.wait_reached()
        closing = start(manager.close)
    closing.result(20)
    outcomes = [load.exception(20) for load in loads]
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
