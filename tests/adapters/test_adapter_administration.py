"""Rolling back and unloading through the manager: which version is current, what drains, and what is refused."""

import random
import shutil

import pytest
import torch
from lorikeet.adapters.errors import (
    AdapterDigestError,
    AdapterIdError,
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterNoVersionError,
    AdapterUnloadedError,
    ServingError,
)
from lorikeet.adapters.info import AdapterState, LoadOptions, Tier
from lorikeet.adapters.state.state_dir import open_state_dir

from .managing import (
    PLAIN_BYTES,
    activate,
    checked,
    end,
    serve,
    slot_deltas,
    stall_reads,
    start,
    wait_until,
)


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def manager(make_manager, lora_dir):
    return make_manager()


@pytest.fixture
def load_version(manager, lora_dir, edit_config):
    """load_version(alpha): make that the current version of `plain`; returns its digest."""

    def load(alpha):
        edit_config(lora_dir, lora_alpha=alpha)
        return manager.load("plain").digest

    return load


def test_rollback_goes_back_and_forth(manager, load_version, lora_dir, peft_deltas, unpack):
    first = load_version(1)
    expected = {first: peft_deltas(lora_dir)}
    second = load_version(3)
    expected[second] = peft_deltas(lora_dir)
    for digest in (first, second, first):
        info = manager.rollback("plain")
        assert (info.digest, info.state, info.current) == (digest, AdapterState.READY, True)
        version = manager.resolve("plain")
        slot = activate(manager, version)
        torch.testing.assert_close(slot_deltas(manager, slot, unpack), expected[digest], rtol=1e-5, atol=1e-6)
        end(manager, version)
        states = [(v.digest, v.state) for v in manager.describe("plain").versions]
        other = second if digest == first else first
        assert states == [(digest, AdapterState.READY), (other, AdapterState.STORED)]


def test_rollback_to_a_prefix(manager, load_version):
    digests = [load_version(alpha) for alpha in (1, 2, 3)]
    with pytest.raises(AdapterNoVersionError, match=f"known are .*{digests[2][:12]}"):
        manager.rollback("plain", digests[0][:8])  # two versions ago, and nothing names it
    assert manager.rollback("plain", digests[1][:8].upper()).digest == digests[1]
    assert manager.rollback("plain", digests[1]).digest == digests[1], "it is current: nothing happens"
    manager.set_alias("keep", [(f"plain@{digests[2]}", 1.0)])
    load = load_version(4)
    assert manager.rollback("plain", digests[2][:8]).digest == digests[2], "an alias knows it"
    assert manager.rollback("plain").digest == load


def test_rollback_while_the_old_version_still_drains(manager, load_version):
    """It becomes current as it is: same slot, no second copy, and its requests go on."""
    old = load_version(1)
    running = manager.resolve("plain")
    slot = activate(manager, running)
    new = load_version(2)
    late = manager.resolve("plain")
    assert [i.state for i in manager.list()] == [AdapterState.READY, AdapterState.DRAINING]
    assert manager.rollback("plain").digest == old
    again = manager.resolve("plain")
    assert again == running and manager.try_activate(again) == slot
    assert [(i.digest, i.state, i.in_flight) for i in manager.list()] == [
        (old, AdapterState.READY, 2),
        (new, AdapterState.DRAINING, 1),
    ]
    end(manager, again), end(manager, running), manager.release(late)
    assert manager.snapshot().bytes_used == {Tier.HOST: PLAIN_BYTES, Tier.DEVICE: PLAIN_BYTES}


def test_rollback_at_any_moment_under_traffic(manager, load_version):
    digests = {load_version(1), load_version(2)}
    rng = random.Random()
    for _ in range(60):
        version = manager.resolve("plain")
        if rng.random() < 0.7:
            activate(manager, version)
            manager.deactivate(version)
        info = manager.rollback("plain")
        assert {info.digest, version.digest} == digests
        manager.release(version)
    assert len(manager.list()) == 1


@pytest.mark.parametrize("prefix", ["", "abcd"])
def test_rollback_without_an_earlier_version(prefix, manager, load_version):
    with pytest.raises(AdapterNotFoundError):
        manager.rollback("plain", prefix)
    load_version(1)
    load_version(1)
    with pytest.raises(AdapterNoVersionError):
        manager.rollback("plain", prefix)
    for wrong in ("abc", "xyzq", "0" * 65):
        with pytest.raises(AdapterDigestError):
            manager.rollback("plain", wrong)
    with pytest.raises(AdapterIdError):
        manager.rollback("../plain", prefix)


def test_rollback_to_files_that_are_gone_keeps_what_is_served(manager, load_version):
    old, new = load_version(1), load_version(2)
    shutil.rmtree(manager._core.state.path / "versions" / old)
    for prefix in ("", old[:8]):
        with pytest.raises(AdapterNoVersionError, match="not kept any more"):
            manager.rollback("plain", prefix)
    info = manager.get("plain")
    assert (info.digest, info.state) == (new, AdapterState.READY)
    assert [v.digest for v in manager.describe("plain").versions] == [new]
    serve(manager, "plain")


def test_rollback_is_not_a_promise_that_no_file_backs(make_manager, lora_dir, edit_config, tmp_path):
    """With nothing kept, a draining version is in memory only: as the current one it could not be read again."""
    state = open_state_dir(None, tmp_path / "state", 0)
    manager = make_manager(state=state)
    manager.load("plain")
    running = manager.resolve("plain")
    edit_config(lora_dir, lora_alpha=3)
    new = manager.load("plain").digest
    with pytest.raises(AdapterNoVersionError, match="not kept any more"):
        manager.rollback("plain")
    activate(manager, running)
    end(manager, running)
    assert serve(manager, "plain").digest == new
    manager.close()
    state.close()


def test_rollback_to_damaged_files_is_refused(manager, load_version):
    old, new = load_version(1), load_version(2)
    kept = manager._core.state.path / "versions" / old / "adapter_config.json"
    kept.write_text(kept.read_text() + " ")
    with pytest.raises(ServingError, match="was expected"):
        manager.rollback("plain")
    assert serve(manager, "plain").digest == new


def test_rollback_accepts_what_was_accepted_before(manager, lora_dir, edit_config, edit_tensors):
    edit_tensors(lora_dir, lambda tensors: [t.zero_() for t in tensors.values()])
    edit_config(lora_dir, base_model_name_or_path="someone/other-model")
    digest = manager.load("plain", options=LoadOptions(allow_zero=True, allow_other_base=True)).digest
    edit_tensors(lora_dir, lambda tensors: [t.fill_(0.1) for t in tensors.values()])
    edit_config(lora_dir, base_model_name_or_path=None)
    manager.load("plain")
    assert manager.rollback("plain").digest == digest


def test_rollback_brings_back_what_was_unloaded_while_its_folder_is_there(manager, load_version):
    digest = load_version(1)
    manager.unload("plain")
    assert manager.rollback("plain").digest == digest
    manager.unload("plain")
    manager.unload("plain") if manager.list() else None
    assert manager.rollback("plain", digest[:8]).digest == digest


def test_failed_load_after_an_unload_does_not_lose_the_version_before(manager, load_version, edit_config, lora_dir):
    digest = load_version(1)
    manager.unload("plain")
    edit_config(lora_dir, use_qalora=True)
    with pytest.raises(ServingError):
        manager.load("plain")
    manager.unload("plain")
    assert manager.rollback("plain").digest == digest


def test_unload_twice(manager, load_version):
    load_version(1)
    manager.unload("plain")
    with pytest.raises(AdapterNotFoundError):
        manager.unload("plain")
    load_version(1)
    version = manager.resolve("plain")
    activate(manager, version)
    manager.unload("plain")
    with pytest.raises(AdapterNotFoundError):
        manager.unload("plain")  # it still drains, but no id leads to it
    end(manager, version)
    assert manager.list() == [] and manager.store.used_bytes == 0


def test_unload_of_a_failed_id_forgets_it(manager, lora_dir, edit_config):
    edit_config(lora_dir, use_qalora=True)
    with pytest.raises(ServingError):
        manager.load("plain")
    assert manager.get("plain").state is AdapterState.FAILED
    manager.unload("plain")
    assert manager.list() == []


def test_unload_while_a_replacement_is_loaded_ends_both(manager, load_version, edit_config, lora_dir, monkeypatch):
    load_version(1)
    running = manager.resolve("plain")
    edit_config(lora_dir, lora_alpha=2)
    with stall_reads(monkeypatch, "/plain/") as gate:
        loading = start(manager.load, "plain")
        gate.wait_reached()
        manager.unload("plain")
        assert [i.state for i in manager.list()] == [AdapterState.DRAINING, AdapterState.LOADING] or len(
            manager.list()
        ) == 2
    with pytest.raises(AdapterUnloadedError):
        loading.result(20)
    activate(manager, running)
    end(manager, running)
    assert manager.list() == []


def test_load_after_an_unload_during_a_load_counts(manager, load_version, lora_dir, edit_config, monkeypatch):
    with stall_reads(monkeypatch, "/plain/") as gate:
        early = start(manager.load, "plain")
        gate.wait_reached()
        manager.unload("plain")
        late = start(manager.load, "plain")
    digest = late.result(20).digest
    error = early.exception(20)
    assert error is None or isinstance(error, AdapterUnloadedError)
    assert [i.digest for i in manager.list()] == [digest]


def test_pinned_adapter_is_unloaded_only_after_unpin(manager, load_version):
    load_version(1)
    manager.pin("plain", Tier.HOST)
    for _ in range(2):
        with pytest.raises(AdapterInUseError, match="unpin it first"):
            manager.unload("plain")
    assert serve(manager, "plain")
    manager.unpin("plain")
    manager.unload("plain")
    assert manager.list() == []
    digest = load_version(1)
    assert manager.get("plain").pinned is None and serve(manager, "plain").digest == digest


def test_unload_during_a_device_copy(manager, load_version, monkeypatch):
    load_version(1)
    waiting = manager.resolve("plain")
    from .managing import Gate

    write = manager.store.write
    with Gate() as gate:
        monkeypatch.setattr(manager.store, "write", lambda *args: (gate.pass_through(), write(*args))[1])
        assert manager.try_activate(waiting) is None
        gate.wait_reached()
        manager.unload("plain")
        manager.release(waiting)
        assert manager.snapshot().bytes_used[Tier.DEVICE] == PLAIN_BYTES, "still being written to"
    wait_until(lambda: manager.list() == [], "the copy to end")
    assert manager.snapshot().bytes_used == {Tier.HOST: 0, Tier.DEVICE: 0} and manager.store.used_bytes == 0
