"""Kill -9 at any moment loses nothing acknowledged and leaves nothing half-done; a full or failing disk neither."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from lorikeet.adapters.state.database import StateDatabase
from lorikeet.adapters.state.version_store import VersionStore

from .children import (
    CRASH_BUDGET,
    CRASH_STATES,
    STORE_BUDGET,
    Model,
    command,
    crash_files,
    database_changes,
    digest_of,
    files_of,
    read_files,
)

ROUNDS = 6


def kill_at_random(rng, *arguments):
    """Run a child, SIGKILL it at a random moment; returns the lines it printed."""
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True) as child:
        lines = [child.stdout.readline() for _ in range(rng.randrange(1, 30))]
        assert all(lines), "the child ended by itself"
        threading.Event().wait(rng.uniform(0, 0.005))
        child.kill()
        lines += child.stdout.readlines()
    assert child.returncode == -signal.SIGKILL
    return [line.strip() for line in lines if line.endswith("\n")]


def test_database_keeps_every_acknowledged_change(tmp_path):
    rng = random.Random()
    seed = rng.randrange(2**32)
    changes = database_changes(seed)
    model = Model()
    done = 0
    for _ in range(ROUNDS):
        acknowledged = int(kill_at_random(rng, "change-database", tmp_path / "state.sqlite", seed, done)[-1]) + 1
        for change in itertools.islice(changes, acknowledged - done):
            model.apply(*change)
        done = acknowledged
        database = StateDatabase(tmp_path / "state.sqlite")
        state = database.load()
        database.close()
        if state != model.state():  # then the one that was under way has happened, as a whole
            model.apply(*next(changes))
            done += 1
        assert state == model.state(), f"seed {seed}, after change {done}"


def test_store_shows_only_whole_versions(tmp_path):
    rng = random.Random()
    done = 0
    for _ in range(ROUNDS):
        last = int(kill_at_random(rng, "change-store", tmp_path, done)[-1])
        store = VersionStore(tmp_path, STORE_BUDGET)
        assert store.used_bytes <= STORE_BUDGET
        for digest in store.digests():
            assert read_files(store.get(digest)) == files_of(digest)
        assert digest_of(last) in store.digests()
        assert sorted(os.listdir(tmp_path)) == sorted(store.digests())
        done = last + 1


def test_store_killed_at_each_system_call(tmp_path):
    """Put with eviction, put again, remove: after a death at any point the state is one of those in between."""
    lines = subprocess.run(command("crash-everywhere", tmp_path), capture_output=True, text=True, check=True).stdout
    assert len(lines.splitlines()) > 30, "too few system calls were intercepted"
    names = {digest_of(name): name for name in "ABCD"}
    for line in lines.splitlines():
        root, acknowledged = line.split()
        store = VersionStore(Path(root), CRASH_BUDGET)
        found = sorted(names[digest] for digest in store.digests())
        assert CRASH_STATES.index(found) >= int(acknowledged), line
        assert sorted(os.listdir(root)) == sorted(store.digests())
        for digest in store.digests():
            whole = {name: b"".join(c) if isinstance(c, list) else c for name, c in crash_files(names[digest]).items()}
            assert read_files(store.get(digest)) == whole
    assert found == ["D"], "the last process lived to the end"


def test_full_disk(tmp_path):
    """A real one: a small tmpfs in a mount namespace of its own, which goes with the process."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    mount = 'mount -t tmpfs -o size=1500k tmpfs "$0" && exec "$@"'
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "sh", "-c", mount, tmp_path, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no tmpfs can be mounted here")
    result = subprocess.run(
        [*unshare, "sh", "-c", mount, tmp_path, *command("use-full-disk", tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout.splitlines()[-1:]) == (0, ["ok"]), result.stdout + result.stderr


def test_failing_disk(tmp_path):
    result = subprocess.run(
        command("use-failing-disk", tmp_path / "state.sqlite"), capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout.splitlines()[-1:]) == (0, ["ok"]), result.stdout + result.stderr
