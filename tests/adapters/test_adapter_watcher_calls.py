"""Folders and calls about one id: a call overrules the folder of that name until the folder changes."""

import errno
import shutil

import pytest
from lorikeet.adapters.errors import AdapterExistsError, AdapterNotFoundError, ServingError
from lorikeet.adapters.info import AdapterState, Tier
from lorikeet.adapters.watcher import AdapterWatcher

from .managing import (
    WEIGHTS,
    Gate,
    activate,
    checked,
    digest_of,
    end,
    serve,
    stall_reads,
    start,
    wait_until,
    watch_reads,
)

SETTLE_S = 0.02


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def manager(make_manager, lora_dir):
    return make_manager()


@pytest.fixture
def watcher(manager, tmp_path):
    """One whose scans the test makes itself."""
    return AdapterWatcher(manager, [tmp_path / "adapters"], settle_s=SETTLE_S, incomplete_s=4 * SETTLE_S)


def settle(watcher):
    """Scan until every folder is handled and every load of one has ended."""
    wait_until(lambda: not watcher.scan(), "every folder to settle")
    loads = [folder.load for folder in watcher._folders.values() if folder.load is not None]
    wait_until(lambda: all(load.done() for load in loads), "the loads to end")


def current(manager):
    return {info.adapter_id: info.digest for info in manager.list() if info.current}


def test_rollback_holds_until_the_folder_changes(manager, watcher, lora_dir, edit_config):
    settle(watcher)
    first = digest_of(lora_dir)
    edit_config(lora_dir, lora_alpha=5)
    settle(watcher)
    second = digest_of(lora_dir)
    assert current(manager) == {"plain": second}
    assert manager.rollback("plain").digest == first
    (lora_dir / WEIGHTS).touch()  # looked at again, and read again, but nothing new
    settle(watcher)
    assert current(manager) == {"plain": first}
    edit_config(lora_dir, lora_alpha=6)
    settle(watcher)
    assert current(manager) == {"plain": digest_of(lora_dir)}
    assert manager.rollback("plain").digest == first


def test_load_from_elsewhere_holds_until_the_folder_changes(manager, watcher, lora_dir, clone_adapter, edit_config):
    shelf = clone_adapter("shelf.tmp", 2.0)
    settle(watcher)
    manager.load("plain", shelf)
    (lora_dir / WEIGHTS).touch()
    settle(watcher)
    assert current(manager) == {"plain": digest_of(shelf)}
    edit_config(lora_dir, lora_alpha=6)
    settle(watcher)
    assert current(manager) == {"plain": digest_of(lora_dir)}


def test_rollback_while_the_folder_is_read_again(manager, watcher, lora_dir, edit_config, monkeypatch):
    """Whichever ends last was asked for last: the folder's new content came first."""
    settle(watcher)
    first = digest_of(lora_dir)
    edit_config(lora_dir, lora_alpha=5)
    settle(watcher)
    edit_config(lora_dir, lora_alpha=6)
    with stall_reads(monkeypatch, f"/plain/{WEIGHTS}") as gate:
        wait_until(lambda: not watcher.scan(), "the load to begin")
        gate.wait_reached()
        assert manager.rollback("plain").digest == first
    settle(watcher)
    assert current(manager) == {"plain": first}
    edit_config(lora_dir, lora_alpha=7)
    settle(watcher)
    assert current(manager) == {"plain": digest_of(lora_dir)}


def test_unloaded_by_call_comes_back_by_call_or_by_change(manager, watcher, lora_dir, edit_config):
    settle(watcher)
    manager.unload("plain")
    (lora_dir / WEIGHTS).touch()
    settle(watcher)
    assert manager.list() == []
    assert manager.load("plain").digest == digest_of(lora_dir)
    manager.unload("plain")
    edit_config(lora_dir, lora_alpha=6)
    settle(watcher)
    assert current(manager) == {"plain": digest_of(lora_dir)}


@pytest.mark.parametrize("holder", ["pin", "alias"])
def test_folder_that_goes_leaves_what_is_pinned_or_aliased(holder, manager, watcher, lora_dir):
    settle(watcher)
    digest = digest_of(lora_dir)
    manager.pin("plain", Tier.HOST) if holder == "pin" else manager.set_alias("prod", [("plain", 1.0)])
    shutil.rmtree(lora_dir)
    settle(watcher)
    assert serve(manager, "plain").digest == digest
    manager.unpin("plain") if holder == "pin" else manager.delete_alias("prod")
    settle(watcher)
    assert current(manager) == {"plain": digest}, "it is as if it had been loaded by call"
    manager.unload("plain")
    assert manager.list() == []


def test_folder_of_an_older_version_goes_without_its_alias(manager, watcher, lora_dir, edit_config):
    settle(watcher)
    old = digest_of(lora_dir)
    manager.set_alias("prod", [("plain", 1.0)])
    edit_config(lora_dir, lora_alpha=6)
    settle(watcher)
    assert serve(manager, "prod").digest == old and serve(manager, "plain").digest == digest_of(lora_dir)


def test_running_requests_outlive_their_folder(manager, watcher, lora_dir):
    settle(watcher)
    version = manager.resolve("plain")
    activate(manager, version)
    shutil.rmtree(lora_dir)
    settle(watcher)
    assert [info.state for info in manager.list()] == [AdapterState.DRAINING]
    with pytest.raises(AdapterNotFoundError):
        manager.resolve("plain")
    end(manager, version)
    assert manager.list() == []


def test_folder_called_like_an_alias_is_refused_and_the_alias_served(manager, watcher, lora_dir, clone_adapter):
    settle(watcher)
    manager.set_alias("prod", [("plain", 1.0)])
    clone_adapter("prod", 2.0)
    settle(watcher)
    assert serve(manager, "prod").adapter_id == "plain"
    (failed,) = [info for info in manager.list() if info.adapter_id == "prod"]
    assert failed.state is AdapterState.FAILED and "is an alias" in failed.error
    with pytest.raises(AdapterExistsError):
        manager.load("prod")


def test_card_that_changes_is_looked_at(manager, watcher, lora_dir):
    """The card may name another base, so it is part of what makes a folder changed; the version stays the same."""
    settle(watcher)
    digest, loaded_at = manager.get("plain").digest, manager.get("plain").loaded_at
    (lora_dir / "README.md").write_text("---\nbase_model: x\n---\n")
    settle(watcher)
    info = manager.get("plain")
    assert info.digest == digest and info.loaded_at > loaded_at


def test_first_load_by_call_while_the_folder_is_read(manager, watcher, lora_dir, monkeypatch):
    with stall_reads(monkeypatch, "/plain/") as gate:
        wait_until(lambda: not watcher.scan(), "the folder's load to begin")
        gate.wait_reached()
        loading = start(manager.load, "plain")
    assert loading.result(20).digest == digest_of(lora_dir)
    settle(watcher)
    assert current(manager) == {"plain": digest_of(lora_dir)}


def test_load_that_fails_while_the_folder_is_read_overrules_nothing(manager, watcher, lora_dir, monkeypatch):
    """Only what a call achieved may keep a folder's content from being served when it comes again."""
    gate, threads = Gate(), []

    def disturb(path, thread):
        if "/plain/" in path and thread.startswith("adapter-load"):
            threads.append(thread)
            if thread != threads[0]:
                raise OSError(errno.EIO, "injected")
            gate.pass_through()

    with monkeypatch.context() as patched:
        watch_reads(patched, disturb)
        with gate:
            wait_until(lambda: not watcher.scan(), "the folder's load to begin")
            gate.wait_reached()
            with pytest.raises(ServingError):
                manager.load("plain")
        wait_until(lambda: not manager._registry.loading, "the load to end")
    config = lora_dir / "adapter_config.json"
    config.write_bytes(config.read_bytes())
    settle(watcher)
    assert current(manager) == {"plain": digest_of(lora_dir)}


def test_folder_that_goes_while_it_is_read_is_forgotten(manager, watcher, lora_dir, tmp_path, monkeypatch, edit_config):
    """What a load read in a folder that went says nothing about the one that comes later, with the same content."""
    settle(watcher)
    edit_config(lora_dir, lora_alpha=6)
    with stall_reads(monkeypatch, "/plain/", "adapter-load") as gate:
        wait_until(lambda: not watcher.scan(), "the load to begin")
        gate.wait_reached()
        away = lora_dir.rename(tmp_path / "away")
        wait_until(lambda: not watcher.scan(), "the watcher to see it")
        assert manager._core.state.database.get("plain") is None
        away.rename(lora_dir)
    wait_until(lambda: not manager._registry.loading, "the load to end")
    assert manager._core.state.database.get("plain") is None
    settle(watcher)
    assert current(manager) == {"plain": digest_of(lora_dir)}


def test_folder_of_a_failed_pinned_adapter_goes(manager, watcher, lora_dir, tmp_path):
    """Nothing of it is left to be pinned; a folder of that name that comes later is another adapter."""
    settle(watcher)
    manager.pin("plain", Tier.HOST)
    version = manager.resolve("plain")
    with manager._changed:
        manager._registry.fail_version(version, ServingError("Lost."))
    manager.release(version)
    assert manager.get("plain").state is AdapterState.FAILED
    away = lora_dir.rename(tmp_path / "away")
    settle(watcher)
    assert manager.list() == []
    away.rename(lora_dir)
    settle(watcher)
    assert manager.get("plain").pinned is None and manager._core.state.database.get("plain").pinned == ""
