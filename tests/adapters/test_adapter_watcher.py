"""The folder watcher: what appears is loaded, what changes replaced, what goes unloaded, and only when complete."""

import shutil
import threading
import time

import pytest
from lorikeet.adapters import watcher as watcher_module
from lorikeet.adapters.info import AdapterState
from lorikeet.adapters.watcher import AdapterWatcher

from .managing import WEIGHTS, checked, wait_until

SETTLE_S = 0.1
FOR_EVER_S = 3600.0


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def roots(tmp_path):
    root = tmp_path / "adapters"
    root.mkdir(exist_ok=True)
    return [root]


@pytest.fixture
def source(lora_dir, tmp_path):
    """A good adapter outside the roots, to be copied in."""
    target = tmp_path / "source"
    shutil.move(lora_dir, target)
    return target


@pytest.fixture
def watch(make_manager, roots):
    """watch(**kwargs): (manager, watcher) whose scans the test makes itself."""

    def make(**kwargs):
        manager = make_manager(roots=roots)
        return manager, AdapterWatcher(manager, roots, settle_s=SETTLE_S, **kwargs)

    return make


def scan_until(watcher, condition, what):
    wait_until(lambda: (watcher.scan(), condition())[1], what)


def scan_until_quiet(watcher):
    wait_until(lambda: not watcher.scan(), "every folder to settle")


def states(manager):
    return {info.adapter_id: info.state for info in manager.list()}


def ready_ids(manager):
    return [info.adapter_id for info in manager.list() if info.state is AdapterState.READY]


def is_ready(manager, adapter_id):
    return lambda: states(manager).get(adapter_id) is AdapterState.READY


def test_existing_folders_are_loaded_before_start_returns(make_manager, roots, source):
    for name in ("one", "two"):
        shutil.copytree(source, roots[0] / name)
    threading.Event().wait(0.05)
    manager = make_manager(roots=roots)
    watcher = AdapterWatcher(manager, roots, settle_s=0.01)
    watcher.start()
    try:
        assert states(manager) == {"one": AdapterState.READY, "two": AdapterState.READY}
    finally:
        watcher.close()


def test_folder_that_appears_changes_and_goes(make_manager, roots, source, edit_config):
    """The real thread, with real notifications."""
    manager = make_manager(roots=roots)
    watcher = AdapterWatcher(manager, roots, settle_s=SETTLE_S)
    watcher.start()
    try:
        assert manager.list() == []
        shutil.copytree(source, roots[0] / "fresh")
        wait_until(is_ready(manager, "fresh"), "the new folder")
        before = manager.get("fresh").digest
        edit_config(roots[0] / "fresh", lora_alpha=5)
        wait_until(lambda: manager.get("fresh").digest != before, "the changed folder")
        shutil.rmtree(roots[0] / "fresh")
        wait_until(lambda: manager.list() == [], "the removed folder")
    finally:
        watcher.close()


def test_half_copied_folder_is_neither_served_nor_failed(watch, roots, source):
    manager, watcher = watch(incomplete_s=FOR_EVER_S)
    target = roots[0] / "slow"
    target.mkdir()
    watcher.scan()
    data = (source / WEIGHTS).read_bytes()
    steps = [
        lambda: (target / WEIGHTS).write_bytes(data[:5]),
        lambda: (target / WEIGHTS).write_bytes(data[:-10]),
        lambda: shutil.copy(source / "adapter_config.json", target),
    ]
    for step in steps:
        step()
        deadline = time.monotonic() + 2 * SETTLE_S
        while time.monotonic() < deadline:
            assert watcher.scan(), "still waiting for it"
        assert manager.list() == []
    (target / WEIGHTS).write_bytes(data)
    scan_until(watcher, is_ready(manager, "slow"), "the completed folder")


def test_config_copied_last_is_waited_for(watch, roots, source):
    manager, watcher = watch(incomplete_s=FOR_EVER_S)
    (roots[0] / "late").mkdir()
    shutil.copy(source / WEIGHTS, roots[0] / "late")
    for _ in range(5):
        watcher.scan()
    assert manager.list() == []
    shutil.copy(source / "adapter_config.json", roots[0] / "late")
    scan_until(watcher, is_ready(manager, "late"), "the folder")


def test_folder_that_stays_incomplete_is_listed_as_failed_and_retried(watch, roots, source):
    manager, watcher = watch(incomplete_s=2 * SETTLE_S)
    (roots[0] / "stuck").mkdir()
    shutil.copy(source / "adapter_config.json", roots[0] / "stuck")
    scan_until(watcher, lambda: states(manager).get("stuck") is AdapterState.FAILED, "the report")
    assert "adapter_model.safetensors is missing" in manager.get("stuck").error
    shutil.copy(source / WEIGHTS, roots[0] / "stuck")
    scan_until(watcher, is_ready(manager, "stuck"), "the completed folder")


def test_invalid_folder_is_listed_with_its_reason_and_retried_on_change(watch, roots, source, edit_config):
    manager, watcher = watch()
    target = roots[0] / "bad"
    shutil.copytree(source, target)
    edit_config(target, use_qalora=True)
    scan_until(watcher, lambda: states(manager).get("bad") is AdapterState.FAILED, "the refusal")
    assert "use_qalora" in manager.get("bad").error
    scan_until_quiet(watcher)
    edit_config(target, use_qalora=False)
    scan_until(watcher, is_ready(manager, "bad"), "the repaired folder")


def test_failed_folder_that_goes_is_forgotten(watch, roots):
    manager, watcher = watch(incomplete_s=SETTLE_S)
    (roots[0] / "empty").mkdir()
    scan_until(watcher, lambda: states(manager).get("empty") is AdapterState.FAILED, "the report")
    (roots[0] / "empty").rmdir()
    scan_until(watcher, lambda: manager.list() == [], "the removal")


def test_broken_replacement_keeps_the_old_version(watch, roots, source, edit_config):
    manager, watcher = watch()
    shutil.copytree(source, roots[0] / "a")
    scan_until(watcher, is_ready(manager, "a"), "the folder")
    digest = manager.get("a").digest
    edit_config(roots[0] / "a", use_qalora=True)
    scan_until(watcher, lambda: manager.get("a").error, "the refusal")
    assert (manager.get("a").digest, states(manager)["a"]) == (digest, AdapterState.READY)


def test_folder_replaced_by_rename_is_never_unknown(watch, roots, source, edit_config):
    manager, watcher = watch()
    shutil.copytree(source, roots[0] / "a")
    scan_until(watcher, is_ready(manager, "a"), "the folder")
    before = manager.get("a").digest
    edit_config(source, lora_alpha=3)
    shutil.rmtree(roots[0] / "a")
    watcher.scan()
    assert manager.get("a").digest == before, "gone for a moment only"
    source.rename(roots[0] / "a")
    scan_until(watcher, lambda: manager.get("a").digest != before, "the replacement")


@pytest.mark.parametrize("name", [".hidden", "copying.tmp", "copying.partial", "-dash", "with space"])
def test_temporary_and_malformed_names_are_ignored(name, watch, roots, source):
    manager, watcher = watch()
    shutil.copytree(source, roots[0] / name)
    scan_until_quiet(watcher)
    assert manager.list() == []


def test_files_in_the_root_are_ignored(watch, roots, source):
    manager, watcher = watch()
    shutil.copy(source / WEIGHTS, roots[0])
    scan_until_quiet(watcher)
    assert manager.list() == []


def test_link_out_of_the_roots_is_refused(watch, roots, source):
    manager, watcher = watch(incomplete_s=SETTLE_S)
    (roots[0] / "link").symlink_to(source)
    scan_until(watcher, lambda: states(manager).get("link") is AdapterState.FAILED, "the refusal")
    assert "outside" in manager.get("link").error


def test_unloaded_adapter_comes_back_only_when_its_folder_changes(watch, roots, source, edit_config):
    manager, watcher = watch()
    shutil.copytree(source, roots[0] / "a")
    scan_until(watcher, is_ready(manager, "a"), "the folder")
    manager.unload("a")
    scan_until_quiet(watcher)
    assert manager.list() == []
    edit_config(roots[0] / "a", lora_alpha=7)
    scan_until(watcher, is_ready(manager, "a"), "the changed folder")


def test_adapter_loaded_from_elsewhere_survives_the_end_of_the_folder_of_its_name(watch, roots, source, edit_config):
    manager, watcher = watch()
    shutil.copytree(source, roots[0] / "a")
    shutil.copytree(source, roots[0] / "b")
    edit_config(roots[0] / "b", lora_alpha=7)
    scan_until(watcher, lambda: ready_ids(manager) == ["a", "b"], "the folders")
    digest = manager.load("a", roots[0] / "b").digest
    shutil.rmtree(roots[0] / "a")
    scan_until_quiet(watcher)
    assert manager.get("a").digest == digest


def test_same_content_loaded_from_elsewhere_survives_too(watch, roots, source):
    manager, watcher = watch()
    shutil.copytree(source, roots[0] / "a")
    shutil.copytree(source, roots[0] / "b")
    scan_until(watcher, lambda: ready_ids(manager) == ["a", "b"], "the folders")
    manager.load("a", roots[0] / "b")
    shutil.rmtree(roots[0] / "a")
    scan_until_quiet(watcher)
    assert ready_ids(manager) == ["a", "b"]


def test_unreadable_root_unloads_nothing(watch, roots, source):
    """An unmounted volume is not the wish to remove every adapter."""
    manager, watcher = watch()
    shutil.copytree(source, roots[0] / "a")
    scan_until(watcher, is_ready(manager, "a"), "the folder")
    roots[0].rename(roots[0].parent / "unmounted")
    deadline = time.monotonic() + 3 * SETTLE_S
    while time.monotonic() < deadline:
        watcher.scan()
    assert states(manager) == {"a": AdapterState.READY}
    (roots[0].parent / "unmounted").rename(roots[0])
    scan_until_quiet(watcher)
    assert states(manager) == {"a": AdapterState.READY}


def test_first_root_wins_when_two_have_a_folder_of_the_same_name(make_manager, roots, source, tmp_path, edit_config):
    second = tmp_path / "more"
    shutil.copytree(source, roots[0] / "a")
    shutil.copytree(source, second / "a")
    shutil.copytree(source, second / "b")
    edit_config(second / "a", lora_alpha=7)
    manager = make_manager(roots=[*roots, second])
    watcher = AdapterWatcher(manager, [*roots, second], settle_s=SETTLE_S)
    scan_until(watcher, lambda: ready_ids(manager) == ["a", "b"], "both ids")
    assert manager.get("a").slices["q_proj"].factor == 2.0
    shutil.rmtree(roots[0] / "a")
    scan_until(watcher, lambda: manager.get("a").slices["q_proj"].factor == 7 / 4, "the second root's")


def test_watching_goes_on_after_notifications_break(make_manager, roots, source, monkeypatch):
    monkeypatch.setattr(watcher_module, "RESCAN_S", 0.05)
    monkeypatch.setattr(
        watcher_module.watchfiles, "watch", lambda *a, **k: (_ for _ in ()).throw(OSError("watch limit"))
    )
    manager = make_manager(roots=roots)
    watcher = AdapterWatcher(manager, roots, settle_s=SETTLE_S)
    watcher.start()
    try:
        shutil.copytree(source, roots[0] / "a")
        wait_until(is_ready(manager, "a"), "the folder, by looking at intervals")
    finally:
        watcher.close()


def test_folder_is_left_alone_while_anything_in_it_is_still_written(watch, roots, source):
    manager, watcher = watch()
    shutil.copytree(source, roots[0] / "synced")
    scan_until(watcher, is_ready(manager, "synced"), "the folder to be loaded")
    digest = manager.resolve("synced").digest
    # As rsync replaces a folder: one file is there already, the next grows beside the one that it will replace.
    config = roots[0] / "synced" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    with (roots[0] / "synced" / f".{WEIGHTS}.x7Rk2p").open("wb") as temporary:
        for _ in range(8):
            temporary.write(b"0" * 512)
            temporary.flush()
            assert watcher.scan()
            time.sleep(SETTLE_S / 4)
        assert manager.resolve("synced").digest == digest
    scan_until(watcher, lambda: manager.resolve("synced").digest != digest, "the settled folder to be loaded")
