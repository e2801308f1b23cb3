"""The registry after a restart: what was loaded by call, pinned and aliased is so again."""

import shutil

import pytest
import torch
from lorikeet.adapters.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterProofError,
    ServingError,
)
from lorikeet.adapters.golden import GOLDEN_FILE, Golden, serialize_golden
from lorikeet.adapters.info import AdapterState, LoadOptions, Tier

from .managing import CONFIG, activate, checked, digest_of, end, serve, slot_deltas, wait_until


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


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


def write_golden(folder, value):
    """A golden file whose logits are all this."""
    golden = Golden(digest_of(folder), ((1, 2),), torch.full((1, 64), float(value)), 0.1, "this test")
    (folder / GOLDEN_FILE).write_bytes(serialize_golden(golden))


def test_golden_file_that_came_last_is_replayed_after_a_restart(boot, elsewhere):
    """It is no part of the version: unchanged weights may get a better one, and lose it again."""
    replayed = []

    def prove(version, golden, vocab_size):
        replayed.append(golden.logits[0, 0].item())
        if golden.logits[0, 0] < 0:
            raise AdapterProofError("It is off.")
        return "fine"

    write_golden(elsewhere, 1)
    manager = boot(prover=prove)
    digest = manager.load("a", elsewhere).digest
    write_golden(elsewhere, 2)
    manager.load("a", elsewhere)
    boot(prover=prove)
    assert replayed == [1, 2, 2]
    write_golden(elsewhere, -3)
    manager = boot(prover=prove)
    with pytest.raises(AdapterProofError):
        manager.load("a", elsewhere)
    assert serve(boot(prover=prove), "a").digest == digest, "what was refused was not kept"
    assert replayed[-2:] == [-3, 2]
    (elsewhere / GOLDEN_FILE).unlink()
    manager = boot(prover=prove)
    manager.load("a", elsewhere)
    replayed.clear()
    assert boot(prover=prove).get("a").digest == digest and replayed == []


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
