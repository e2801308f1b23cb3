"""What the child processes of these tests do, and what both sides know: run as `python -P children.py COMMAND ...`.

A child prints one line for each change that was acknowledged, after it was.
"""

import hashlib
import itertools
import os
import random
import resource
import signal
import sys
from pathlib import Path

import structlog
from lorikeet.adapters.errors import AdapterUnreadableError
from lorikeet.adapters.info import AliasTarget
from lorikeet.adapters.state.database import SavedAdapter, SavedAlias, SavedState, StateDatabase
from lorikeet.adapters.state.errors import AdapterStateError
from lorikeet.adapters.state.state_dir import open_state_dir
from lorikeet.adapters.state.version_store import VersionStore

STORE_BUDGET = 1_500_000
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def command(*arguments):
    """The command line of a child."""
    return [sys.executable, "-P", __file__, *map(str, arguments)]


def digest_of(name):
    return hashlib.sha256(str(name).encode()).hexdigest()


def files_of(digest, max_bytes=300_000):
    """The content that belongs to a digest in these tests."""
    rng = random.Random(digest)
    return {CONFIG: rng.randbytes(rng.randrange(1, 500)), WEIGHTS: rng.randbytes(rng.randrange(1, max_bytes))}


def read_files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def random_adapter(rng, adapter_id):
    return SavedAdapter(
        adapter_id=adapter_id,
        digest=rng.choice(["", digest_of(rng.random())]),
        source=rng.choice(["", "sub/dir", "s3://bucket/ключ", "/abs/path with 'quotes'"]),
        by_call=rng.random() < 0.5,
        folder_digest=rng.choice(["", digest_of(rng.random())]),
        previous=rng.choice(["", digest_of(rng.random())]),
        pinned=rng.choice(["", "host", "device"]),
        allow_zero=rng.random() < 0.5,
        allow_other_base=rng.random() < 0.5,
    )


def random_alias(rng, name):
    targets = [AliasTarget(f"a{i}", digest_of(rng.random()), rng.uniform(0.1, 9.0)) for i in range(rng.randrange(1, 4))]
    return SavedAlias(name, tuple(targets))


def database_changes(seed):
    """An endless, reproducible row of (method, argument); doing one twice changes nothing."""
    rng = random.Random(seed)
    while True:
        name = f"n{rng.randrange(6)}"
        kind = rng.choice(["save", "save", "save", "delete", "save_alias", "save_alias", "delete_alias"])
        argument = {"save": random_adapter, "save_alias": random_alias}.get(kind, lambda _, name: name)(rng, name)
        yield kind, argument


class Model:
    """What a StateDatabase should hold."""

    def __init__(self):
        self.adapters = {}
        self.aliases = {}

    def apply(self, kind, argument):
        match kind:
            case "save":
                self.adapters[argument.adapter_id] = argument
            case "delete":
                self.adapters.pop(argument, None)
            case "save_alias":
                self.aliases[argument.name] = argument
            case "delete_alias":
                self.aliases.pop(argument, None)

    def state(self):
        return SavedState(
            tuple(self.adapters[key] for key in sorted(self.adapters)),
            tuple(self.aliases[key] for key in sorted(self.aliases)),
        )


def change_database(path, seed, start):
    database = StateDatabase(Path(path))
    for index, (kind, argument) in itertools.islice(enumerate(database_changes(int(seed))), int(start), None):
        getattr(database, kind)(argument)
        print(index, flush=True)


def change_store(root, start):
    store = VersionStore(Path(root), STORE_BUDGET)
    for index in itertools.count(int(start)):
        digest = digest_of(index)
        weights = files_of(digest)[WEIGHTS]
        pieces = [memoryview(weights)[:1000], b"", bytearray(weights[1000:])]
        assert store.put(digest, {CONFIG: files_of(digest)[CONFIG], WEIGHTS: pieces}, ())
        if index % 3 == 0:
            store.remove(digest_of(index - 2))
        print(index, flush=True)


def hold_state_dir(path):
    """Keep a state directory open; "-" for a private one under the second argument."""
    private = path.startswith("-")
    state = open_state_dir(None if private else Path(path), Path(path[1:]), 1000)
    print(state.path, flush=True)
    sys.stdin.read()
    state.close()


# What the store asks of the system when it changes something.
STORE_CALLS = ("write", "fsync", "rename", "mkdir", "rmdir", "unlink", "utime")
# Two of these fit; a store that does `crash_scenario` goes through CRASH_STATES in this order.
CRASH_BUDGET = 2 * 5_000
CRASH_STATES = (["A", "B"], ["B"], ["B", "C"], ["C"], ["C", "D"], ["D"])


def crash_files(name):
    return {CONFIG: name.encode() * 1000, WEIGHTS: [name.encode() * 2000, name.lower().encode() * 2000]}


def crash_scenario(store):
    """Yields, after each acknowledged step, the index of the state in CRASH_STATES."""
    assert store.put(digest_of("C"), crash_files("C"), ())
    yield 2
    assert store.put(digest_of("D"), crash_files("D"), (), must=True)
    yield 4
    store.remove(digest_of("C"))
    yield 5


# What `crash_replacing` goes through with the files of "A" that its digest says nothing about: content by name.
REPLACED_STATES = (
    {"golden": b"old" * 500, "card": b"card"},
    {"golden": b"new" * 700, "card": b"card"},
    {"golden": b"new" * 700},
    {},
)


def replacing_scenario(store):
    """Yields, after each acknowledged step, the index of the state in REPLACED_STATES."""
    for number, state in ((2, REPLACED_STATES[2]), (3, REPLACED_STATES[3])):
        store.replace(digest_of("A"), {name: state.get(name) for name in ("golden", "card")}, ())
        yield number


def crash_everywhere(parent):
    """Die at each system call of `crash_scenario`."""
    _die_everywhere(parent, {name: crash_files(name) for name in "AB"}, crash_scenario)


def crash_replacing(parent):
    """Die at each system call of `replacing_scenario`."""
    _die_everywhere(parent, {"A": crash_files("A") | REPLACED_STATES[0]}, replacing_scenario)


def _die_everywhere(parent, files, scenario):
    """Do the scenario in a process that dies at its n-th system call, for each n, in the middle of a write."""
    for fatal in itertools.count(1):
        root = Path(parent) / f"dies-at-{fatal}"
        store = VersionStore(root, CRASH_BUDGET)
        for name, content in files.items():
            assert store.put(digest_of(name), content, ())
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            tell, count = os.write, itertools.count(1)
            for name in STORE_CALLS:
                setattr(os, name, _dying(getattr(os, name), name, count, fatal))
            for state in scenario(VersionStore(root, CRASH_BUDGET)):
                tell(writer, bytes([state]))
            os._exit(0)
        os.close(writer)
        _, status = os.waitpid(pid, 0)
        acknowledged = max(os.read(reader, 100), default=0)
        os.close(reader)
        print(root, acknowledged, flush=True)
        if status == 0:
            return


def _dying(call, name, count, fatal):
    def wrapper(*args, **kwargs):
        if next(count) == fatal:
            if name == "write":
                descriptor, data = args
                call(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    return wrapper


def use_full_disk(path):
    """On a disk of less than 2 MB: every failure is clear, nothing acknowledged is lost, room makes it work again."""
    state = open_state_dir(Path(path) / "state", Path(path), 10**9)
    stored = []
    for index in itertools.count():
        digest = digest_of(index)
        if not state.store.put(digest, {WEIGHTS: bytes(200_000)}, ()):
            break
        stored.append(digest)
    assert stored and list(state.store.digests()) == stored
    assert not list(state.store.get(stored[0]).parent.glob(".partial-*"))
    _expect(AdapterUnreadableError, "is full", state.store.put, digest, {WEIGHTS: bytes(200_000)}, (), must=True)

    with open(Path(path) / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(512)):
                pass
        except OSError:
            filler.truncate(filler.tell() - 50_000)  # the database can go on for a while
    saved, error = _save_until_error(state.database)
    assert "disk is full" in error.message and saved
    state.store.remove(stored.pop())
    state.database.save(random_adapter(random.Random(0), "after"))
    state.close()

    again = open_state_dir(Path(path) / "state", Path(path), 10**9)
    assert [a for a in again.database.load().adapters if a.adapter_id != "after"] == saved
    assert sorted(again.store.digests()) == sorted(stored)
    again.close()
    print("ok", flush=True)


def use_failing_disk(path):
    """The kernel refuses to let files grow: a change fails, and works again once the kernel does."""
    database = StateDatabase(Path(path))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    saved, error = _save_until_error(database)
    assert "the disk failed" in error.message and str(path) not in error.message and saved
    assert list(database.load().adapters) == saved
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    database.save(random_adapter(random.Random(0), "z"))
    database.close()
    assert len(StateDatabase(Path(path)).load().adapters) == len(saved) + 1
    print("ok", flush=True)


def _save_until_error(database):
    saved = []
    try:
        for index in range(100_000):
            adapter = random_adapter(random.Random(index), f"full-{index:06}")
            database.save(adapter)
            saved.append(adapter)
    except AdapterStateError as error:
        return saved, error
    raise AssertionError("the disk never was full")


def _expect(error_class, words, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error_class as error:
        assert words in error.message, error.message
    else:
        raise AssertionError(f"no {error_class.__name__}")


COMMANDS = {
    "change-database": change_database,
    "change-store": change_store,
    "hold-state-dir": hold_state_dir,
    "crash-everywhere": crash_everywhere,
    "crash-replacing": crash_replacing,
    "use-full-disk": use_full_disk,
    "use-failing-disk": use_failing_disk,
}

if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    COMMANDS[sys.argv[1]](*sys.argv[2:])
