"""The registry after a restart: what was loaded by call, pinned and aliased is so again; folders say the rest."""

import shutil

import pytest
import torch
from lorikeet.adapters.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterNoVersionError,
    ServingError,
)
from lorikeet.adapters.info import AdapterState, LoadOptions, Tier
from lorikeet.adapters.state.state_dir import open_state_dir
from lorikeet.adapters.watcher import AdapterWatcher

from .managing import CONFIG, activate, checked, digest_of, end, serve, slot_deltas, wait_until

SETTLE_S = 0.01


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def boot(make_manager, tmp_path):
    """boot(**overrides): start a server's adapters as the server does, after ending those that ran before."""
    running = []

    def stop():
        while running:
            running.pop().close()

    def start(store_bytes=2**24, **overrides):
        stop()
        roots = overrides.setdefault("roots", [tmp_path / "adapters"])
        running.append(open_state_dir(tmp_path / "durable", tmp_path / "scratch", store_bytes))
        manager = make_manager(state=running[0], **overrides)
        running.append(manager)
        manager.restore()
        watcher = AdapterWatcher(manager, roots, settle_s=SETTLE_S)
        wait_until(lambda: not watcher.scan(), "the folders to settle")
        watcher.start()
        running.append(watcher)
        manager.finish_restore()
        return manager

    start.stop = stop
    yield start
    stop()


@pytest.fixture
def elsewhere(lora_dir, tmp_path):
    """A folder inside the root that is nobody's own: no id is called like it."""
    (tmp_path / "adapters" / "shelf.tmp").mkdir()
    return lora_dir.rename(tmp_path / "adapters" / "shelf.tmp" / "v1")


def summary(manager):
    """What users see of the adapters that can be used."""
    found = [i for i in manager.list() if i.state is AdapterState.READY]
    return [(i.adapter_id, i.digest, i.current, i.pinned, i.aliases) for i in found], manager.list_aliases()


def test_everything_is_so_again(boot, elsewhere, clone_adapter, edit_config, tmp_path, peft_deltas, unpack):
    shutil.copytree(elsewhere, tmp_path / "adapters" / "watched")
    manager = boot()
    by_path = manager.load("by-path", "shelf.tmp/v1")
    manager.load("by-path-2", elsewhere)
    old_deltas = peft_deltas(elsewhere)
    edit_config(elsewhere, lora_alpha=5)
    new = manager.load("by-path", elsewhere)
    new_deltas = peft_deltas(elsewhere)
    manager.set_alias("prod", [("by-path", 3.0), (f"by-path@{by_path.digest[:8]}", 1.0)])
    manager.set_alias("stage", [("watched", 1.0)])
    manager.pin("by-path", Tier.DEVICE)
    manager.pin("watched", Tier.HOST)
    keys = {f"user-{i}": serve(manager, "prod", f"user-{i}").digest for i in range(40)}
    before = summary(manager)
    for _ in range(2):
        manager = boot()
        assert summary(manager) == before
        assert {key: serve(manager, "prod", key).digest for key in keys} == keys, "sticky across restarts"
        wait_until(lambda manager=manager: manager.get("by-path").tier is Tier.DEVICE, "the pinned one")
        for reference, deltas in (("by-path", new_deltas), (f"by-path@{by_path.digest}", old_deltas)):
            version = manager.resolve(reference)
            slot = activate(manager, version)
            torch.testing.assert_close(slot_deltas(manager, slot, unpack), deltas, rtol=1e-5, atol=1e-6)
            end(manager, version)
        with pytest.raises(AdapterInUseError):
            manager.unload("watched")
    manager.delete_alias("prod")
    assert manager.rollback("by-path").digest == by_path.digest, "the version before is known, too"
    assert manager.rollback("by-path").digest == new.digest


def test_what_was_taken_back_stays_so(boot, elsewhere):
    manager = boot()
    for name in ("a", "b"):
        manager.load(name, elsewhere)
    manager.pin("a", Tier.HOST), manager.unpin("a")
    manager.set_alias("prod", [("a", 1.0)]), manager.delete_alias("prod")
    manager.unload("b")
    manager = boot()
    assert [(i.adapter_id, i.pinned, i.aliases) for i in manager.list()] == [("a", None, ())]
    assert manager.list_aliases() == []
    with pytest.raises(AdapterNotFoundError):
        manager.resolve("b")


def test_loaded_by_call_outlives_its_source(boot, elsewhere):
    """The version is kept: a restart does not depend on where it came from."""
    digest = boot().load("a", elsewhere).digest
    shutil.rmtree(elsewhere)
    manager = boot()
    assert serve(manager, "a").digest == digest
    assert manager.get("a").state is AdapterState.READY


def test_source_with_other_content_by_now_does_not_replace_what_was_loaded(boot, elsewhere, edit_config):
    digest = boot().load("a", elsewhere).digest
    edit_config(elsewhere, lora_alpha=7)
    manager = boot()
    assert serve(manager, "a").digest == digest
    assert manager.load("a", elsewhere).digest == digest_of(elsewhere) != digest


def test_without_kept_files_the_source_is_read_again(boot, elsewhere, edit_config):
    digest = boot(store_bytes=0).load("a", elsewhere).digest
    manager = boot(store_bytes=0)
    assert serve(manager, "a").digest == digest
    edit_config(elsewhere, lora_alpha=7)
    manager = boot(store_bytes=0)
    info = manager.get("a")
    assert info.state is AdapterState.FAILED and digest in info.error
    with pytest.raises(AdapterNotFoundError, match="was expected"):
        manager.resolve("a")


def test_options_of_a_load_are_remembered(boot, elsewhere, edit_config, edit_tensors):
    edit_tensors(elsewhere, lambda tensors: [t.zero_() for t in tensors.values()])
    edit_config(elsewhere, base_model_name_or_path="someone/other-model")
    options = LoadOptions(allow_zero=True, allow_other_base=True)
    for store_bytes in (2**24, 0):
        digest = boot(store_bytes=store_bytes).load("a", elsewhere, options).digest
        assert serve(boot(store_bytes=store_bytes), "a").digest == digest


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


def test_alias_to_a_version_that_its_folder_no_longer_has(boot, lora_dir, edit_config, peft_deltas, unpack):
    manager = boot()
    old, deltas = manager.get("plain").digest, peft_deltas(lora_dir)
    manager.set_alias("prod", [("plain", 1.0)])
    boot.stop()
    edit_config(lora_dir, lora_alpha=6)
    manager = boot()
    assert manager.get("plain").digest == digest_of(lora_dir) != old
    version = manager.resolve("prod")
    assert version.digest == old
    slot = activate(manager, version)
    torch.testing.assert_close(slot_deltas(manager, slot, unpack), deltas, rtol=1e-5, atol=1e-6)
    end(manager, version)
    boot.stop()
    shutil.rmtree(lora_dir)
    manager = boot()
    assert serve(manager, "prod").digest == old, "not even its folder is needed"
    with pytest.raises(AdapterNotFoundError):
        manager.resolve("plain")


def test_alias_whose_files_are_lost_says_so_and_can_be_moved(boot, elsewhere, tmp_path):
    manager = boot()
    digest = manager.load("a", elsewhere).digest
    manager.set_alias("prod", [("a", 1.0)])
    manager.set_alias("split", [("a", 1.0)])
    boot.stop()
    shutil.rmtree(tmp_path / "durable" / "versions" / digest)
    (elsewhere / CONFIG).write_text((elsewhere / CONFIG).read_text() + " ")
    manager = boot()
    assert manager.get("a").state is AdapterState.FAILED
    with pytest.raises(AdapterNotFoundError, match="could not be loaded; load it again, or move the alias"):
        manager.resolve("prod")
    assert [alias.name for alias in manager.list_aliases()] == ["prod", "split"]
    manager.load("a", elsewhere)
    manager.set_alias("prod", [("a", 1.0)])
    assert serve(manager, "prod").digest == digest_of(elsewhere)
    manager.delete_alias("split"), manager.delete_alias("prod")
    manager.unload("a")
    assert boot().list() == []


def test_pinned_adapter_that_is_lost_can_be_unpinned(boot, elsewhere, tmp_path):
    manager = boot()
    digest = manager.load("a", elsewhere).digest
    manager.pin("a", Tier.HOST)
    boot.stop()
    shutil.rmtree(tmp_path / "durable" / "versions" / digest)
    shutil.rmtree(elsewhere)
    manager = boot()
    assert manager.get("a").state is AdapterState.FAILED
    manager.unpin("a")
    manager.unload("a")
    manager = boot()
    assert manager.list() == [] and manager._registry.pins == {}


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


def test_state_directory_of_another_budget(boot, elsewhere, clone_adapter):
    """A smaller budget than what is there: what calls had loaded is restored all the same."""
    manager = boot()
    digests = {}
    for alpha, name in enumerate(("a", "b", "c")):
        (elsewhere / CONFIG).write_text((elsewhere / CONFIG).read_text() + " " * alpha)
        digests[name] = manager.load(name, elsewhere).digest
    manager = boot(store_bytes=1)
    assert {name: serve(manager, name).digest for name in digests} == digests
    with pytest.raises(ServingError):
        manager.load("x", "nope")


def test_unload_then_restart_while_its_requests_drain(boot, elsewhere):
    manager = boot()
    manager.load("a", elsewhere)
    version = manager.resolve("a")
    activate(manager, version)
    manager.unload("a")
    assert boot().list() == []
