"""Ids and paths from clients can name nothing outside the roots."""

from pathlib import Path

import pytest
from lorikeet.adapters.errors import AdapterIdError, AdapterInvalidError, AdapterNotFoundError
from lorikeet.adapters.paths import adapter_directory, check_adapter_id, open_contained


@pytest.mark.parametrize("adapter_id", ["a", "A0._-", "sql-v2", "9" * 128])
def test_valid_ids(adapter_id):
    check_adapter_id(adapter_id)


@pytest.mark.parametrize(
    "adapter_id",
    ["", ".", "..", "../x", "a/b", "a\\b", "-a", ".hidden", "a b", "a\n", "a\0", "é", "9" * 129, "x" * 10**6, "a/../b"],
)
def test_invalid_ids(adapter_id):
    with pytest.raises(AdapterIdError) as error:
        check_adapter_id(adapter_id)
    assert len(error.value.message) < 1000


@pytest.fixture
def roots(tmp_path):
    for folder in ("one/a", "one/deep/b", "two/a", "two/c", "outside/x"):
        (tmp_path / folder).mkdir(parents=True)
    return [tmp_path / "one", tmp_path / "two"]


def test_default_is_the_folder_of_that_id_in_the_first_root_that_has_it(roots):
    assert adapter_directory(roots, "a", None) == roots[0] / "a"
    assert adapter_directory(roots, "c", None) == roots[1] / "c"


def test_path_may_be_relative_or_absolute_inside_a_root(roots):
    assert adapter_directory(roots, "x", Path("deep/b")) == roots[0] / "deep" / "b"
    assert adapter_directory(roots, "x", roots[1] / "c") == roots[1] / "c"


@pytest.mark.parametrize("path", ["..", ".", "../outside/x", "/etc", "deep/../..", "deep/../../outside", "a\0b"])
def test_path_outside_the_roots_is_refused(roots, path):
    with pytest.raises(AdapterIdError):
        adapter_directory(roots, "x", Path(path))


def test_link_that_leads_out_of_the_roots_is_refused(roots, tmp_path):
    (roots[0] / "link").symlink_to(tmp_path / "outside" / "x")
    with pytest.raises(AdapterIdError, match="outside"):
        adapter_directory(roots, "link", None)


def test_link_inside_the_roots_is_followed(roots):
    (roots[0] / "link").symlink_to(roots[1] / "c")
    assert adapter_directory(roots, "link", None) == roots[1] / "c"
    with pytest.raises(AdapterIdError):
        adapter_directory(roots[:1], "link", None)


def test_missing_folder_is_not_found(roots):
    with pytest.raises(AdapterNotFoundError):
        adapter_directory(roots, "nope", None)


def test_server_without_roots_says_so(tmp_path):
    with pytest.raises(AdapterNotFoundError, match="no adapter directory"):
        adapter_directory([], "a", tmp_path)


@pytest.mark.parametrize("form", ["real", "link", "dots", "relative"])
def test_file_is_looked_for_in_the_real_root_however_it_is_written(form, roots, tmp_path, monkeypatch):
    (roots[0] / "a" / "file").write_bytes(b"inside")
    (tmp_path / "outside" / "file").write_bytes(b"outside")
    (roots[0] / "a" / "leaves").symlink_to(tmp_path / "outside" / "file")
    (roots[0] / "a" / "loop").symlink_to(roots[0] / "a" / "loop")
    (tmp_path / "root").symlink_to(roots[0])
    (roots[0] / "elsewhere").symlink_to(tmp_path / "outside")
    monkeypatch.chdir(tmp_path)
    root = {"real": roots[0], "link": tmp_path / "root", "dots": roots[1] / ".." / "one", "relative": Path("one")}[form]
    with open_contained(roots[0] / "a", "file", [roots[1], root]) as file:
        assert file.read() == b"inside"
    for directory, name in ((roots[0] / "a", "leaves"), (roots[0] / "elsewhere", "file")):
        with pytest.raises(AdapterInvalidError, match="leads out"):
            open_contained(directory, name, [roots[1], root])
    with pytest.raises(AdapterInvalidError, match="cannot be read"):
        open_contained(roots[0] / "a", "loop", [root])
    with pytest.raises(AdapterInvalidError, match="leads out"):
        open_contained(roots[0] / "a", "file", [roots[1]])
