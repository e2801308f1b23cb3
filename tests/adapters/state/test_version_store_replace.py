"""Files of a kept version that its digest says nothing about: brought up to date, one moment each, or left alone."""

import errno
import itertools
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lorikeet.adapters.state.version_store import VersionStore

from .children import (
    CRASH_BUDGET,
    REPLACED_STATES,
    STORE_CALLS,
    WEIGHTS,
    command,
    crash_files,
    digest_of,
    read_files,
)

A, B = digest_of("A"), digest_of("B")
GOLDEN, CARD = "lorikeet.golden.safetensors", "README.md"
OLD = {WEIGHTS: b"w" * 500, GOLDEN: b"old", CARD: b"card"}


@pytest.fixture
def store(tmp_path):
    store = VersionStore(tmp_path / "versions", 1000)
    assert store.put(A, OLD, ())
    return store


def reopened(store):
    return VersionStore(store._root, 1000)


def check(store):
    """What the books say is on the disk, and nothing else."""
    sizes = {digest: sum(map(len, read_files(store._root / digest).values())) for digest in os.listdir(store._root)}
    assert store.digests() == sizes == reopened(store).digests()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({GOLDEN: b"newer"}, OLD | {GOLDEN: b"newer"}),
        ({GOLDEN: [b"ne", b"", b"w"], CARD: None}, {WEIGHTS: OLD[WEIGHTS], GOLDEN: b"new"}),
        ({GOLDEN: None, CARD: None}, {WEIGHTS: OLD[WEIGHTS]}),
        ({"other.md": None, GOLDEN: b"old"}, OLD),
    ],
    ids=["replaced", "replaced-and-gone", "gone", "nothing"],
)
def test_files_are_replaced_durably(change, expected, store):
    before = os.stat(store._root / A).st_ino
    store.replace(A, change, ())
    for each in (store, reopened(store)):
        assert read_files(each.get(A)) == expected
    assert os.stat(store._root / A).st_ino == before, "it was there all the time"
    check(store)


def test_it_counts_as_a_use(store):
    assert store.put(B, {WEIGHTS: b"b" * 400}, ())
    store.replace(A, {GOLDEN: b"new"}, ())
    assert list(store.digests()) == [B, A] == list(reopened(store).digests())


def test_a_version_that_is_not_stored_stays_so(store):
    store.replace(B, {GOLDEN: b"new"}, ())
    assert store.get(B) is None
    check(store)


def test_room_is_made_and_where_there_is_none_the_version_stays_as_it_was(store):
    assert store.put(B, {WEIGHTS: b"b" * 400}, ())
    store.replace(A, {GOLDEN: b"n" * 200}, {B})
    assert read_files(store.get(A)) == OLD
    store.replace(A, {GOLDEN: b"n" * 200}, ())
    assert list(store.digests()) == [A] and read_files(store.get(A)) == OLD | {GOLDEN: b"n" * 200}
    check(store)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden"])
def test_only_plain_file_names(name, store):
    with pytest.raises(ValueError, match="not a plain file name"):
        store.replace(A, {name: b""}, ())


@pytest.mark.parametrize("persists", [False, True], ids=["once", "from then on"])
def test_disk_that_fails_at_each_system_call(tmp_path, monkeypatch, persists):
    """The n-th call fails, for each n: the old file or the new one is there, and the version is usable."""
    for fatal in itertools.count(1):
        store = VersionStore(tmp_path / str(fatal), 1000)
        store.put(A, OLD, ())
        calls = itertools.count(1)
        failures = []
        with monkeypatch.context() as patch:
            for name in STORE_CALLS:
                patch.setattr(os, name, _breaking(getattr(os, name), calls, fatal, failures, persists=persists))
            store.replace(A, {GOLDEN: b"newer", CARD: None}, ())
        kept = read_files(store.get(A))
        assert kept[WEIGHTS] == OLD[WEIGHTS] and kept[GOLDEN] in (b"old", b"newer"), "whole, whichever it is"
        store.replace(A, {GOLDEN: b"newer", CARD: None}, ())
        assert read_files(store.get(A)) == {WEIGHTS: OLD[WEIGHTS], GOLDEN: b"newer"}
        again = reopened(store)
        assert again.digests() == store.digests() and os.listdir(store._root) == [A]
        if not failures:
            assert fatal > 5, "too few system calls were intercepted"
            return


def _breaking(call, calls, fatal, failures, *, persists):
    def wrapper(*args, **kwargs):
        number = next(calls)
        if number == fatal or (persists and number > fatal):
            failures.append(number)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*args, **kwargs)

    return wrapper


def test_killed_at_each_system_call(tmp_path):
    """After a death at any point the files are those of one of the moments in between, and the version is whole."""
    lines = subprocess.run(command("crash-replacing", tmp_path), capture_output=True, text=True, check=True).stdout
    assert len(lines.splitlines()) > 10, "too few system calls were intercepted"
    for line in lines.splitlines():
        root, acknowledged = line.split()
        store = VersionStore(Path(root), CRASH_BUDGET)
        found = read_files(store.get(A))
        changing = {name: found.pop(name) for name in ("golden", "card") if name in found}
        assert REPLACED_STATES.index(changing) >= int(acknowledged), line
        assert found == {name: b"".join(c) if isinstance(c, list) else c for name, c in crash_files("A").items()}
        assert os.listdir(root) == [A]
        assert store.used_bytes == sum(map(len, read_files(store.get(A)).values()))
    assert not changing, "the last process lived to the end"


def test_threads_agree(store):
    """Whoever reads meanwhile finds one of the contents, whole."""
    contents = [bytes([65 + i]) * (20 + i) for i in range(8)]

    def work(seed):
        for i in range(40):
            store.replace(A, {GOLDEN: contents[(seed + i) % 8]}, {A})
            assert (store.get(A) / GOLDEN).read_bytes() in contents

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    check(store)
