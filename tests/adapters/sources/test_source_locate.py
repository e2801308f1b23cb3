"""Which sources are local folders, which are URIs, and what is imported for either."""

import subprocess
import sys
from pathlib import Path

import pytest
from lorikeet.adapters.errors import AdapterIdError, AdapterNotFoundError, AdapterSourceError
from lorikeet.adapters.golden import GOLDEN_FILE
from lorikeet.adapters.sources import transfer
from lorikeet.adapters.sources.locate import LocalSource, RemoteSource, SourcePolicy, locate


@pytest.fixture
def policy(tmp_path):
    for folder in ("root/a", "root/deep/b", "outside"):
        (tmp_path / folder).mkdir(parents=True)
    return SourcePolicy([tmp_path / "root"], ["hf://my-org/", "https://host:8443/x", "http://other/"])


@pytest.mark.parametrize("source", [None, "", "a", Path("a")])
def test_folder_of_that_name_or_path(policy, tmp_path, source):
    assert locate(policy, "a", source) == LocalSource(tmp_path / "root" / "a")


def test_absolute_path_inside_a_root(policy, tmp_path):
    wanted = tmp_path / "root" / "deep" / "b"
    assert locate(policy, "x", str(wanted)) == locate(policy, "x", wanted) == LocalSource(wanted)


def test_uri(policy):
    source = locate(policy, "x", "hf://my-org/name/")
    assert isinstance(source, RemoteSource)
    assert source.uri == "hf://my-org/name"
    assert source.redirects == {("https", "host:8443"), ("http", "other")}


@pytest.mark.parametrize("source", ["../outside", "/etc", "a/../../outside"])
def test_folder_outside_the_roots_is_refused(policy, source):
    with pytest.raises(AdapterIdError, match="outside"):
        locate(policy, "x", source)


@pytest.mark.parametrize("source", [None, "a", "hf://my-org/name"])
def test_malformed_id_is_refused_wherever_it_would_come_from(policy, source):
    with pytest.raises(AdapterIdError):
        locate(policy, "../x", source)


@pytest.mark.parametrize("source", [Path("hf://my-org/name"), "hf:/my-org/name", "hf:my-org"])
def test_what_only_looks_like_a_uri_is_a_folder(policy, source):
    with pytest.raises(AdapterNotFoundError):
        locate(policy, "x", source)


def test_server_without_allowed_prefixes_says_which_option_adds_them(tmp_path):
    with pytest.raises(AdapterSourceError, match="--adapter-sources"):
        locate(SourcePolicy([tmp_path]), "x", "hf://my-org/name")


def test_other_prefix_is_refused_without_telling_the_allowed_ones(policy):
    with pytest.raises(AdapterSourceError, match="hf://strangers/name lies outside") as error:
        locate(policy, "x", "hf://strangers/name")
    assert "my-org" not in error.value.message


def test_golden_file_is_called_as_its_reader_calls_it():
    assert transfer.GOLDEN_FILE == GOLDEN_FILE


@pytest.mark.parametrize(
    ("package", "uri"), [("aiohttp", "hf://o/n"), ("aiohttp", "http://h"), ("s3fs", "s3://abc"), ("gcsfs", "gs://abc")]
)
def test_missing_optional_package_is_named_by_its_extra(fetch, monkeypatch, package, uri):
    modules = [
        name for name in sys.modules if name.startswith(("lorikeet.adapters.sources.h", "lorikeet.adapters.sources.o"))
    ]
    for name in [*modules, *(name for name in sys.modules if name.split(".")[0] == package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AdapterSourceError, match=r"pip install 'lorikeet-server\[remote\]'"):
        fetch(uri)


def test_nothing_of_it_is_imported_before_a_uri_is_fetched():
    code = (
        "import sys, lorikeet.adapters.sources.fetch, lorikeet.adapters.sources.locate\n"
        "print([n for n in ('torch', 'fsspec', 'aiohttp', 's3fs', 'gcsfs', 'huggingface_hub') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
