"""The calibration text of an adapter's folder: kept with a version without being part of it, and never in the way."""

import os

import pytest
from lorikeet.adapters.carried_text import CARRIED_FILE, MAX_CARRIED_BYTES
from lorikeet.adapters.state.state_dir import open_state_dir

from .managing import checked, digest_of


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def without_store(make_manager, tmp_path):
    return make_manager(state=open_state_dir(tmp_path / "empty", tmp_path, 0))


def copied(manager, target):
    """The text in a copy of the current version's files; None: there is none."""
    version = manager.resolve("plain")
    manager.copy_files(version, target)
    manager.release(version)
    file = target / CARRIED_FILE
    return file.read_text(encoding="utf-8") if file.exists() else None


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not-kept"])
def test_it_is_in_a_copy_of_the_version_and_not_in_its_digest(kept, make_manager, lora_dir, tmp_path, request):
    manager = make_manager() if kept else request.getfixturevalue("without_store")
    digest = manager.load("plain").digest
    assert copied(manager, tmp_path / "none") is None
    for number, text in enumerate(["tēxt", "another one"]):
        (lora_dir / CARRIED_FILE).write_text(text, encoding="utf-8")
        info = manager.load("plain")
        assert info.digest == digest == digest_of(lora_dir) and info.warning is None
        assert copied(manager, tmp_path / f"{number}") == text
    (lora_dir / CARRIED_FILE).unlink()
    manager.load("plain")
    assert copied(manager, tmp_path / "gone") is None


@pytest.mark.parametrize(
    ("spoil", "warning"),
    [
        (lambda path: path.write_bytes(b"\xff\xfe"), "is not UTF-8 text, so merges on this server need"),
        (lambda path: path.write_bytes(b"x" * (MAX_CARRIED_BYTES + 1)), f"more than {MAX_CARRIED_BYTES} bytes"),
        (lambda path: path.symlink_to("/etc/hostname"), "leads out of the adapter directories"),
        (lambda path: path.symlink_to("nowhere"), "missing"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.mkdir(), "not a regular file"),
    ],
    ids=["bytes", "large", "leads-out", "leads-nowhere", "pipe", "folder"],
)
def test_one_that_cannot_be_used_is_a_warning_of_its_adapter(spoil, warning, make_manager, lora_dir, tmp_path):
    spoil(lora_dir / CARRIED_FILE)
    manager = make_manager()
    info = manager.load("plain")
    assert warning in info.warning and str(tmp_path) not in info.warning
    assert copied(manager, tmp_path / "copy") is None


def test_the_largest_is_kept(make_manager, lora_dir, tmp_path):
    text = "y" * MAX_CARRIED_BYTES
    (lora_dir / CARRIED_FILE).write_text(text)
    manager = make_manager()
    assert manager.load("plain").warning is None
    assert copied(manager, tmp_path / "copy") == text
