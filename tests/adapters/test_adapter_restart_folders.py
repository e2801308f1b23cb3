"""Watched folders and calls about them, over a restart: what a call has overruled stays so until the folder changes."""

import shutil

import pytest
from lorikeet.adapters.errors import AdapterNotFoundError, AdapterNoVersionError
from lorikeet.adapters.info import AdapterState, Tier

from .managing import checked, digest_of, serve, stall_reads, wait_until


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


def no_loads(manager):
    """Whether no load is under way."""
    return not manager._registry.loading


def test_rollback_is_overruled_by_a_changed_folder_only(boot, lora_dir, edit_config):
    manager = boot()
    first = manager.get("plain").digest
    edit_config(lora_dir, lora_alpha=5)
    wait_until(lambda: manager.get("plain").digest == digest_of(lora_dir), "the changed folder")
    assert manager.rollback("plain").digest == first
    for _ in range(2):
        manager = boot()
        assert manager.get("plain").digest == first, "the folder has still what was rolled back"
    boot.stop()
    edit_config(lora_dir, lora_alpha=6)
    manager = boot()
    assert manager.get("plain").digest == digest_of(lora_dir)
    assert manager.rollback("plain").digest == first


def test_rollback_while_the_folder_is_read_holds_over_a_restart(boot, lora_dir, edit_config, monkeypatch):
    manager = boot()
    first = manager.get("plain").digest
    edit_config(lora_dir, lora_alpha=5)
    wait_until(lambda: manager.get("plain").digest == digest_of(lora_dir), "the changed folder")
    with stall_reads(monkeypatch, "/plain/", "adapter-load") as gate:
        edit_config(lora_dir, lora_alpha=6)
        gate.wait_reached()
        assert manager.rollback("plain").digest == first
    wait_until(lambda: no_loads(manager), "the folder to be read")
    for _ in range(2):
        manager = boot()
        assert manager.get("plain").digest == first
    edit_config(lora_dir, lora_alpha=7)
    wait_until(lambda: manager.get("plain").digest == digest_of(lora_dir), "the folder that changed since")


def test_unloaded_by_call_stays_unloaded_until_its_folder_changes(boot, lora_dir, edit_config):
    manager = boot()
    first = manager.get("plain").digest
    manager.unload("plain")
    for _ in range(2):
        manager = boot()
        assert manager.list() == []
    boot.stop()
    edit_config(lora_dir, lora_alpha=6)
    manager = boot()
    assert manager.get("plain").digest == digest_of(lora_dir)
    assert manager.rollback("plain").digest == first


@pytest.mark.parametrize("is_known", [True, False])
def test_unload_while_the_folder_is_read_holds_over_a_restart(is_known, boot, lora_dir, edit_config, monkeypatch):
    away = lora_dir if is_known else lora_dir.rename(lora_dir.parent.parent / "away")
    manager = boot()
    with stall_reads(monkeypatch, "/plain/", "adapter-load") as gate:
        if is_known:
            edit_config(lora_dir, lora_alpha=6)
        else:
            away.rename(lora_dir)
        gate.wait_reached()
        manager.unload("plain")
    wait_until(lambda: no_loads(manager), "the folder to be read")
    for _ in range(2):
        assert manager.list() == []
        manager = boot()
    if not is_known:
        with pytest.raises(AdapterNotFoundError):
            manager.rollback("plain")
    edit_config(lora_dir, lora_alpha=7)
    wait_until(lambda: [i.digest for i in manager.list()] == [digest_of(lora_dir)], "the folder that changed since")


def test_load_by_call_lifts_an_unload(boot, lora_dir):
    boot().unload("plain")
    boot().load("plain")
    assert [(i.adapter_id, i.state) for i in boot().list()] == [("plain", AdapterState.READY)]


def test_folder_that_changed_while_down_is_a_new_version(boot, lora_dir, edit_config):
    manager = boot()
    first = manager.get("plain").digest
    manager.pin("plain", Tier.HOST)
    boot.stop()
    edit_config(lora_dir, lora_alpha=6)
    manager = boot()
    info = manager.get("plain")
    assert (info.digest, info.pinned) == (digest_of(lora_dir), Tier.HOST)
    assert manager.rollback("plain").digest == first


def test_folder_removed_while_down_is_forgotten(boot, lora_dir, tmp_path):
    manager = boot()
    manager.pin("plain", Tier.HOST)
    boot.stop()
    away = lora_dir.rename(tmp_path / "away")
    manager = boot()
    assert manager.list() == [] and manager._core.state.database.load().adapters == ()
    away.rename(lora_dir)
    wait_until(lambda: [i.state for i in manager.list()] == [AdapterState.READY], "the folder to be found again")
    assert manager.get("plain").pinned is None, "what comes later under that name is another adapter"


def test_unmounted_root_at_start_forgets_nothing(boot, lora_dir, tmp_path):
    manager = boot()
    manager.pin("plain", Tier.HOST)
    boot.stop()
    lora_dir.parent.rename(tmp_path / "unmounted")
    manager = boot(roots=[tmp_path / "mnt"])
    assert manager.list() == []
    boot.stop()
    (tmp_path / "unmounted").rename(lora_dir.parent)
    assert boot().get("plain").pinned is Tier.HOST


def test_folder_of_a_pinned_adapter_that_goes_does_not_take_it(boot, lora_dir):
    manager = boot()
    digest = manager.get("plain").digest
    manager.pin("plain", Tier.HOST)
    shutil.rmtree(lora_dir)
    wait_until(lambda: manager._core.state.database.get("plain").by_call, "the watcher to see it")
    assert serve(manager, "plain").digest == digest
    manager = boot()
    assert serve(manager, "plain").digest == digest and manager.get("plain").pinned is Tier.HOST
    manager.unpin("plain")
    manager.unload("plain")
    assert boot().list() == []


def test_broken_folder_at_start_is_listed_and_can_be_rolled_back(boot, lora_dir, edit_config):
    digest = boot().get("plain").digest
    boot.stop()
    edit_config(lora_dir, use_qalora=True)
    manager = boot()
    assert manager.get("plain").state is AdapterState.FAILED
    with pytest.raises(AdapterNoVersionError):
        manager.rollback("plain")
    assert manager.rollback("plain", digest[:12]).digest == digest
    assert boot().get("plain").digest == digest
