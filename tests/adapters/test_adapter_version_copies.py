"""A version's files under names of somebody's own: they stay as they are, and say what the adapter's folder said."""

import os

import pytest
from lorikeet.adapters.card import read_card
from lorikeet.adapters.checkpoint import read_config
from lorikeet.adapters.errors import AdapterNoVersionError
from lorikeet.adapters.merge.targets import Onto
from lorikeet.adapters.merge.training_base import default_onto, said_in_card
from lorikeet.adapters.state.state_dir import open_state_dir

from .managing import WEIGHTS, checked, digest_of


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def without_store(make_manager, tmp_path):
    return make_manager(state=open_state_dir(tmp_path / "empty", tmp_path, 0))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not-kept"])
def test_a_copy_is_the_version_whatever_becomes_of_it(kept, make_manager, lora_dir, edit_config, tmp_path, request):
    manager = make_manager() if kept else request.getfixturevalue("without_store")
    digest = manager.load("plain").digest
    version = manager.resolve("plain")
    manager.copy_files(version, tmp_path / "copy" / "plain")
    manager.release(version)
    edit_config(lora_dir, lora_alpha=64)
    assert manager.load("plain").digest != digest
    manager.unload("plain")
    assert digest_of(tmp_path / "copy" / "plain") == digest
    if kept:  # it costs no room
        assert os.stat(tmp_path / "copy" / "plain" / WEIGHTS).st_nlink > 1


def test_files_that_cannot_be_linked_are_copied(make_manager, lora_dir, tmp_path, monkeypatch):
    manager = make_manager()
    digest = manager.load("plain").digest
    version = manager.resolve("plain")

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    manager.copy_files(version, tmp_path / "copy")
    manager.release(version)
    assert digest_of(tmp_path / "copy") == digest and os.stat(tmp_path / "copy" / WEIGHTS).st_nlink == 1


def test_a_folder_that_changed_is_not_taken_for_the_version(without_store, lora_dir, edit_config, tmp_path):
    without_store.load("plain")
    version = without_store.resolve("plain")
    edit_config(lora_dir, lora_alpha=64)
    with pytest.raises(AdapterNoVersionError):
        without_store.copy_files(version, tmp_path / "copy")
    without_store.release(version)


@pytest.mark.parametrize(
    ("card", "said", "onto"),
    [
        ("Trained with `load_in_4bit`: True, by QLoRA.", "load_in_4bit: true", Onto.NF4),
        ("- load_in_4bit: False\n", "load_in_4bit: false", Onto.ORIGINAL),
        ("A QLoRA adapter.", "QLoRA", Onto.NF4),
        ("Nothing of it.", "", Onto.NF4),
    ],
)
def test_a_copy_says_what_it_was_trained_on(card, said, onto, make_manager, lora_dir, tmp_path):
    (lora_dir / "README.md").write_text(card)
    manager = make_manager()
    manager.load("plain")
    version = manager.resolve("plain")
    copy = tmp_path / "copy" / lora_dir.name
    manager.copy_files(version, copy)
    manager.release(version)
    assert [said_in_card(read_card(folder).text) for folder in (copy, lora_dir)] == [said, said]
    choices = [
        default_onto([("plain", read_config(folder)[1].trained_for, folder)], has_original=True)
        for folder in (lora_dir, copy)
    ]
    assert choices[0] == choices[1] and choices[0].onto is onto
