"""Which files of a tokenizer are taken from an adapter folder, within which bounds, and that they are the version's."""

import hashlib
import os

import pytest
from lorikeet.adapters.errors import AdapterIncompatibleError, AdapterInvalidError
from lorikeet.adapters.paths import file_stamp
from lorikeet.adapters.tokenizer_files import TOKENIZER_FILES, TokenizerFiles, read_tokenizer_files


def digest_of(files: TokenizerFiles) -> str:
    digest = hashlib.sha256(b"weights")
    files.update(digest)
    return digest.hexdigest()


def test_a_folder_without_tokenizer_has_the_digest_that_it_always_had(tmp_path):
    (tmp_path / "README.md").write_text("no tokenizer")
    found = read_tokenizer_files(tmp_path)
    assert found == TokenizerFiles()
    assert found.warning is None
    assert digest_of(found) == hashlib.sha256(b"weights").hexdigest()


def test_files_are_taken_by_name_and_nothing_else_is(tmp_path):
    for name in [*TOKENIZER_FILES, "tokenizer.py", "vocab.json", "merges.txt"]:
        (tmp_path / name).write_bytes(name.encode() * 3)
    stamps = {}
    found = read_tokenizer_files(tmp_path, [tmp_path], stamps)
    assert dict(found.files) == {name: name.encode() * 3 for name in TOKENIZER_FILES}
    assert stamps == {name: file_stamp((tmp_path / name).stat()) for name in TOKENIZER_FILES}
    assert found.slow == ""


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_every_byte_of_every_file_is_part_of_the_digest(tmp_path, name):
    for other in TOKENIZER_FILES:
        (tmp_path / other).write_text("{}")
    before = digest_of(read_tokenizer_files(tmp_path))
    (tmp_path / name).write_text("{} ")
    changed = digest_of(read_tokenizer_files(tmp_path))
    (tmp_path / name).unlink()
    assert len({before, changed, digest_of(read_tokenizer_files(tmp_path))}) == 3


def test_bytes_cannot_move_from_one_file_to_the_next(tmp_path):
    one = TokenizerFiles({"tokenizer.json": b"ab", "tokenizer_config.json": b"c"})
    two = TokenizerFiles({"tokenizer.json": b"a", "tokenizer_config.json": b"bc"})
    assert digest_of(one) != digest_of(two)


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json"])
def test_too_large(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.truncate(TOKENIZER_FILES[name])
    assert len(read_tokenizer_files(tmp_path).files[name]) == TOKENIZER_FILES[name]
    with (tmp_path / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(AdapterInvalidError, match=f"{name} has more than"):
        read_tokenizer_files(tmp_path)


@pytest.mark.parametrize("kind", ["outside", "loop", "dangling", "directory", "pipe"])
def test_what_is_no_file_of_the_folder_is_refused(tmp_path, kind):
    root = tmp_path / "root"
    folder = root / "amber"
    folder.mkdir(parents=True)
    path = folder / "tokenizer.json"
    (tmp_path / "secret").write_text("{}")
    if kind == "outside":
        path.symlink_to(tmp_path / "secret")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(folder / "nothing")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(AdapterInvalidError, match=r"tokenizer\.json"):
        read_tokenizer_files(folder, [root])


def test_a_link_within_the_root_is_followed(tmp_path):
    folder = tmp_path / "amber"
    folder.mkdir()
    (tmp_path / "shared.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../shared.json")
    assert read_tokenizer_files(folder, [tmp_path]).files == {"tokenizer.json": b"{}"}


def test_a_slow_tokenizer_is_not_used_and_said_so(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    found = read_tokenizer_files(tmp_path)
    assert not found.files
    assert "tokenizer.model" in str(found.warning)
    found.check_vocabulary(None)
    with pytest.raises(AdapterIncompatibleError, match="Save a fast one"):
        found.check_vocabulary(32_003)


def test_beside_a_fast_tokenizer_a_slow_one_does_not_matter(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    (tmp_path / "tokenizer.json").write_text("{}")
    found = read_tokenizer_files(tmp_path)
    assert (found.slow, found.warning) == ("", None)
    found.check_vocabulary(32_003)
