"""Copies of versions within a budget: least recently used first, whole or not at all, whatever the disk does."""

import errno
import itertools
import os
import random
import tempfile
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from lorikeet.adapters.errors import AdapterMemoryError, AdapterUnreadableError, Code
from lorikeet.adapters.state.version_store import VersionStore

from .children import CONFIG, STORE_CALLS, WEIGHTS, digest_of, files_of, read_files

A, B, C, D = (digest_of(name) for name in "ABCD")


def blob(size):
    return {WEIGHTS: bytes(size)}


def partials(root):
    return [name for name in os.listdir(root) if name.startswith(".")]


@pytest.fixture
def make_store(tmp_path):
    return lambda budget=1000: VersionStore(tmp_path / "versions", budget)


@pytest.fixture
def gate(monkeypatch):
    """Writes of content that begins with b"slow" wait until `gate.set()`; `gate.reached` says that one does."""
    gate = threading.Event()
    gate.reached = threading.Event()
    write = os.write

    def waiting_write(descriptor, data):
        if bytes(data[:4]) == b"slow":
            gate.reached.set()
            assert gate.wait(30)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", waiting_write)
    yield gate
    gate.set()


def test_what_was_put_is_there_after_a_restart(make_store):
    store = make_store()
    weights = os.urandom(700)
    pieces = [weights[:100], bytearray(weights[100:300]), b"", memoryview(weights)[300:]]
    assert store.put(A, {CONFIG: b"{}", WEIGHTS: pieces}, ())
    for again in (store, make_store()):
        directory = again.get(A)
        assert directory.is_dir() and directory.name == A
        assert read_files(directory) == {CONFIG: b"{}", WEIGHTS: weights}
        assert again.digests() == {A: 702} and again.used_bytes == 702
        assert again.get(B) is None


def test_pieces_of_any_item_type_are_bytes(make_store):
    floats = memoryview(os.urandom(64)).cast("f", (4, 4))
    store = make_store()
    assert store.put(A, {WEIGHTS: floats}, ())
    assert store.digests() == {A: 64} and read_files(store.get(A)) == {WEIGHTS: floats.tobytes()}


def test_least_recently_used_goes_first(make_store):
    store = make_store(300)
    for digest in (A, B, C):
        assert store.put(digest, blob(100), ())
    store.get(A)
    assert store.put(B, blob(100), ())  # a use, too
    assert store.put(D, blob(100), ())
    assert list(store.digests()) == [A, B, D]
    assert list(make_store(300).digests()) == [A, B, D]


def test_order_survives_a_clock_that_goes_back(make_store, monkeypatch):
    store = make_store(300)
    times = itertools.count(10**18, -(10**9))
    monkeypatch.setattr("time.time_ns", lambda: next(times))
    for digest in (C, A, B):
        store.put(digest, blob(1), ())
    store = make_store(300)
    store.get(C)
    assert list(store.digests()) == list(make_store(300).digests()) == [A, B, C]


def test_no_room_leaves_everything_as_it_was(make_store):
    store = make_store(300)
    for digest in (A, B, C):
        store.put(digest, blob(100), ())
    assert not store.put(D, blob(101), {A, B})
    assert not store.put(D, blob(301), ())
    assert list(store.digests()) == [A, B, C] and not partials(store.get(A).parent)
    with pytest.raises(
        AdapterMemoryError, match=r"takes 201 bytes.* 300 bytes.* 1 bytes.*--adapter-store-bytes"
    ) as caught:
        store.put(D, blob(201), {B}, must=True)
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert store.put(D, blob(200), {B}, must=True)
    assert list(store.digests()) == [B, D]


def test_no_budget_stores_nothing(make_store):
    store = make_store(0)
    assert not store.put(A, blob(1), ())
    with pytest.raises(AdapterMemoryError):
        store.put(A, blob(1), (), must=True)
    assert store.digests() == {}


def test_a_smaller_budget_keeps_copies_until_room_is_needed(make_store):
    store = make_store(300)
    for digest in (A, B, C):
        store.put(digest, blob(100), ())
    store = make_store(150)
    assert store.used_bytes == 300 and store.put(A, blob(100), ())
    assert store.put(D, blob(50), {A})
    assert list(store.digests()) == [A, D]


def test_remove(make_store):
    store = make_store()
    store.put(A, blob(10), ())
    store.remove(A)
    store.remove(B)
    assert store.get(A) is None and store.used_bytes == 0
    assert store.put(A, blob(20), ())
    assert make_store().digests() == {A: 20}


def test_leftovers_go_and_foreign_names_stay(make_store, tmp_path):
    root = tmp_path / "versions"
    (root / ".partial-0123").mkdir(parents=True)
    (root / ".partial-0123" / WEIGHTS).write_bytes(b"half")
    (root / "lost+found").mkdir()
    (root / "README").write_text("mine")
    (root / A).symlink_to("/")
    store = make_store()
    assert store.digests() == {}
    assert sorted(os.listdir(root)) == sorted(["README", "lost+found", A])


def test_a_copy_that_somebody_deleted_is_written_again(make_store):
    store = make_store()
    store.put(A, blob(10), ())
    store.put(B, blob(10), ())
    for digest in (A, B):
        path = store.get(digest)
        (path / WEIGHTS).unlink()
        path.rmdir()
    assert store.get(A) is None
    assert store.put(B, blob(10), ()) and (store.get(B) / WEIGHTS).read_bytes() == bytes(10)
    assert store.digests() == {B: 10}


@pytest.mark.parametrize("digest", ["", "..", "AB" * 32, "ab" * 31, "../" + "ab" * 32])
def test_only_digests_are_stored(make_store, digest):
    with pytest.raises(ValueError, match="not a digest"):
        make_store().put(digest, blob(1), ())


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a\0b"])
def test_only_plain_file_names_are_stored(make_store, name):
    with pytest.raises(ValueError, match="plain file name"):
        make_store().put(A, {name: b""}, ())


def test_synced_before_it_appears_and_before_it_is_acknowledged(make_store, tmp_path, monkeypatch):
    """What the crash tests cannot see: the order in which things reach the disk before a power cut."""
    store = make_store(10)
    store.put(B, blob(5), ())
    events = []

    def record(name, describe):
        call = getattr(os, name)

        def recorder(*args, **kwargs):
            events.append((name, describe(args[0])))
            return call(*args, **kwargs)

        monkeypatch.setattr(os, name, recorder)

    record("fsync", lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
    record("rename", lambda path: Path(path).name)
    record("rmdir", lambda path: "a retired directory")
    store.put(A, {CONFIG: b"{}", WEIGHTS: b"12345678"}, ())
    partial = events[-2][1]
    assert partial.startswith(".partial-")
    assert events == [
        ("rename", B),
        ("fsync", "versions"),
        ("rmdir", "a retired directory"),
        ("fsync", CONFIG),
        ("fsync", WEIGHTS),
        ("fsync", partial),
        ("rename", partial),
        ("fsync", "versions"),
    ]


@pytest.mark.parametrize("persists", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_disk_that_fails_at_each_system_call(tmp_path, monkeypatch, number, persists):
    """A put with an eviction, failing at its n-th call, for each n: stored or not, whole, and usable afterwards."""
    for fatal in itertools.count(1):
        root = tmp_path / str(fatal)
        store = VersionStore(root, 1000)
        store.put(A, blob(600), ())
        must = fatal % 2 == 0
        failed = False
        with monkeypatch.context() as patch:
            count = itertools.count(1)
            failures = break_calls(patch, lambda: (n := next(count)) == fatal or (persists and n > fatal), number)  # noqa: B023
            try:
                stored = store.put(B, {CONFIG: b"{}", WEIGHTS: b"x" * 500}, (), must=must)
            except AdapterUnreadableError as error:
                assert must and error.code is Code.UNAVAILABLE
                assert ("is full" if number == errno.ENOSPC else "failed. Check") in error.message
                assert str(tmp_path) not in error.message
                stored, failed = False, True
        assert stored or failed or not must
        assert (B in store.digests()) == stored == (store.get(B) is not None)
        if not persists:
            assert (root / B).exists() == stored, "nothing half-written appears"
        assert store.used_bytes == sum(store.digests().values()) <= 1000
        assert store.put(B, {CONFIG: b"{}", WEIGHTS: b"x" * 500}, (), must=True)
        again = VersionStore(root, 1000)
        assert read_files(again.get(B)) == {CONFIG: b"{}", WEIGHTS: b"x" * 500}
        assert not partials(root) and sorted(os.listdir(root)) == sorted(again.digests()) == sorted(store.digests())
        if not failures:
            assert fatal > 10, "too few system calls were intercepted"
            return


def break_calls(patch, fails, number):
    """Make the store's system calls raise when `fails()` says so; returns the list of those that did."""
    failures = []

    def breaking(name, call):
        def wrapper(*args, **kwargs):
            if fails():
                failures.append(name)
                raise OSError(number, os.strerror(number))
            return call(*args, **kwargs)

        return wrapper

    for name in STORE_CALLS:
        patch.setattr(os, name, breaking(name, getattr(os, name)))
    return failures


def test_nothing_waits_for_another_versions_files(make_store, gate):
    store = make_store()
    store.put(B, blob(10), ())
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(store.put, A, {WEIGHTS: b"slow" * 100}, ())
        assert gate.reached.wait(30)
        assert store.get(A) is None and store.get(B) is not None
        assert store.put(C, blob(10), ()) and store.put(B, blob(10), ())
        store.remove(C)
        assert store.digests() == {B: 10}
        assert not slow.done()
        gate.set()
        assert slow.result()
    assert store.digests() == {B: 10, A: 400}


def test_the_same_digest_at_once_is_written_once(make_store, gate, monkeypatch):
    store = make_store(500)
    made, mkdir = [], os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path, *args, **kwargs: (made.append(path), mkdir(path, *args, **kwargs)))
    with ThreadPoolExecutor() as pool:
        puts = [pool.submit(store.put, A, {WEIGHTS: b"slow" * 100}, (), must=True) for _ in range(4)]
        assert gate.reached.wait(30)
        gate.set()
        assert all(put.result() for put in puts)
    assert len(made) == 1 and store.digests() == {A: 400}


def test_removing_what_is_being_written_removes_it(make_store, gate):
    store = make_store()
    with ThreadPoolExecutor() as pool:
        put = pool.submit(store.put, A, {WEIGHTS: b"slow" * 100}, ())
        assert gate.reached.wait(30)
        removed = pool.submit(store.remove, A)
        gate.set()
        assert put.result() and removed.result() is None
    assert store.digests() == {}


def test_room_that_is_being_written_is_waited_for_and_then_evicted(make_store, gate):
    store = make_store(500)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(store.put, A, {WEIGHTS: b"slow" * 100}, ())
        assert gate.reached.wait(30)
        other = pool.submit(store.put, B, blob(400), (), must=True)
        assert not store.put(C, blob(501), ())  # waits for nobody: it never fits
        gate.set()
        assert slow.result() and other.result()
    assert store.digests() == {B: 400}


def test_threads_agree(tmp_path):
    store = VersionStore(tmp_path, 100_000)
    digests = [digest_of(i) for i in range(12)]
    start = threading.Barrier(6)

    def work(seed):
        rng = random.Random(seed)
        start.wait()
        for _ in range(40):
            digest = rng.choice(digests)
            match rng.randrange(4):
                case 0:
                    store.remove(digest)
                case 1:
                    store.get(digest)
                case _:
                    store.put(digest, files_of(digest, 30_000), {rng.choice(digests)})
            assert store.used_bytes <= 100_000

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, seed) for seed in range(6)]:
            done.result()
    assert sorted(os.listdir(tmp_path)) == sorted(store.digests())
    for digest, size in store.digests().items():
        files = read_files(store.get(digest))
        assert files == files_of(digest, 30_000) and sum(map(len, files.values())) == size


class StoreMachine(RuleBasedStateMachine):
    """Against an ordered dict; starting again, also with another budget, is a step like any other."""

    digests = st.sampled_from([digest_of(i) for i in range(6)])

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.budget = 100
        self.store = VersionStore(Path(self.folder.name), self.budget)
        self.model = OrderedDict()

    @rule(digest=digests, protected=st.sets(digests), must=st.booleans())
    def put(self, digest, protected, must):
        size = 5 + int(digest[:4], 16) % 60
        kept = sum(bytes_ for other, bytes_ in self.model.items() if other in protected)
        expected = digest in self.model or kept + size <= self.budget
        try:
            assert self.store.put(digest, {WEIGHTS: digest[:1].encode() * size}, protected, must=must) == expected
        except AdapterMemoryError:
            assert must and not expected
        if digest in self.model:
            self.model.move_to_end(digest)
        elif expected:
            for other in [other for other in self.model if other not in protected]:
                if sum(self.model.values()) + size > self.budget:
                    del self.model[other]
            self.model[digest] = size

    @rule(digest=digests)
    def get(self, digest):
        path = self.store.get(digest)
        assert (path is not None) == (digest in self.model)
        if path is not None:
            assert (path / WEIGHTS).read_bytes() == digest[:1].encode() * self.model[digest]
            self.model.move_to_end(digest)

    @rule(digest=digests)
    def remove(self, digest):
        self.store.remove(digest)
        self.model.pop(digest, None)

    @rule(budget=st.sampled_from([0, 70, 100, 150]))
    def restart(self, budget):
        self.budget = budget
        self.store = VersionStore(Path(self.folder.name), budget)

    @invariant()
    def holds_what_the_model_holds(self):
        assert list(self.store.digests().items()) == list(self.model.items())
        assert sorted(os.listdir(self.folder.name)) == sorted(self.model)

    def teardown(self):
        self.folder.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
