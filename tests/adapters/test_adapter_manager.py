"""The adapter manager: loading, replacing, unloading, refusing, and what a step thread sees of it."""

import shutil

import pytest
import torch
from lorikeet.adapters import reader
from lorikeet.adapters.errors import (
    AdapterIdError,
    AdapterIncompatibleError,
    AdapterInvalidError,
    AdapterMemoryError,
    AdapterMismatchError,
    AdapterNotFoundError,
    AdapterUnloadedError,
    ServingError,
)
from lorikeet.adapters.info import AdapterState, LoadOptions, Tier

from .managing import PLAIN_BYTES, Recorder, activate, checked, digest_of, end, slot_deltas, wait_until


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


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
    "qalora": (AdapterIncompatibleError, lambda d, config, tensors: config(d, use_qalora=True)),
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
    edit_config(lora_dir, use_qalora=True)
    with pytest.raises(AdapterIncompatibleError):
        manager.load("plain")
    info = manager.get("plain")
    assert (info.state, info.digest) == (AdapterState.READY, digest) and "use_qalora" in info.error


def test_unexpected_error_reaches_no_client(make_manager, lora_dir, monkeypatch):
    manager = make_manager()

    def explode(*args, **kwargs):
        raise RuntimeError("secret /etc/path")

    monkeypatch.setattr(reader, "pack_adapter", explode)
    with pytest.raises(ServingError) as error:
        manager.load("plain")
    assert "secret" not in error.value.message and error.value.code == "INTERNAL"


def test_bug_in_the_middle_of_a_load_leaves_nothing_loading(make_manager, lora_dir, monkeypatch):
    manager = make_manager()

    def explode(*args, **kwargs):
        raise KeyError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(manager._core.state.store, "put", explode)
        with pytest.raises(ServingError) as error:
            manager.load("plain")
    assert "secret" not in error.value.message and error.value.code == "INTERNAL"
    assert (manager.get("plain").state, manager.get("plain").error) == (AdapterState.FAILED, error.value.message)
    assert manager.load("plain").state is AdapterState.READY


def test_zero_adapter_is_refused_unless_allowed(make_manager, lora_dir, edit_tensors):
    manager = make_manager()
    edit_tensors(lora_dir, lambda tensors: [t.zero_() for t in tensors.values()])
    with pytest.raises(AdapterInvalidError, match="zero everywhere"):
        manager.load("plain")
    assert manager.load("plain", options=LoadOptions(allow_zero=True)).state is AdapterState.READY
    assert make_manager(allow_zero=True).load("plain").state is AdapterState.READY


@pytest.mark.parametrize("budget", ["device_budget_bytes", "host_budget_bytes"])
def test_adapter_that_can_never_fit_is_refused_by_bytes(budget, make_manager, lora_dir):
    manager = make_manager(**{budget: PLAIN_BYTES - 256})
    with pytest.raises(AdapterMemoryError):
        manager.load("plain")


def test_adapter_for_another_base_is_refused_unless_allowed(make_manager, lora_dir, edit_config):
    edit_config(lora_dir, base_model_name_or_path="someone/other-model")
    manager = make_manager()
    with pytest.raises(AdapterIncompatibleError, match="someone/other-model"):
        manager.load("plain")
    info = manager.load("plain", options=LoadOptions(allow_other_base=True))
    assert info.state is AdapterState.READY and "other-model" in info.warning
    info = make_manager(allow_other_base=True).load("plain")
    assert info.state is AdapterState.READY and "other-model" in info.warning


def test_base_of_another_directory_is_a_warning_only(make_manager, lora_dir, edit_config):
    """The name of a directory on the trainer's machine proves nothing."""
    edit_config(lora_dir, base_model_name_or_path="/home/someone/other-model")
    info = make_manager().load("plain")
    assert info.state is AdapterState.READY and "other-model" in info.warning


def test_expected_version_is_insisted_on(make_manager, lora_dir):
    manager = make_manager()
    with pytest.raises(AdapterMismatchError, match=digest_of(lora_dir)):
        manager.load("plain", options=LoadOptions(expected_digest="0" * 64))
    info = manager.load("plain", options=LoadOptions(expected_digest=digest_of(lora_dir)))
    assert (info.state, info.digest) == (AdapterState.READY, digest_of(lora_dir))
