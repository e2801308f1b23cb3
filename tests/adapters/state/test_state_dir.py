"""One server a state directory; a private one goes with its process, also when that is killed."""

import os
import random
import signal
import stat
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from lorikeet.adapters.errors import Code
from lorikeet.adapters.state.errors import AdapterStateError
from lorikeet.adapters.state.state_dir import open_state_dir

from .children import WEIGHTS, command, digest_of, random_adapter

ADAPTER = random_adapter(random.Random(), "support-bot")
ROOT_IGNORES_MODES = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


@contextmanager
def opened(path, scratch=Path("/nonexistent"), store_bytes=1000):
    state = open_state_dir(path, scratch, store_bytes)
    try:
        yield state
    finally:
        state.close()


@contextmanager
def other_server(argument):
    """A second process that holds a state directory; yields it and the directory."""
    with subprocess.Popen(
        command("hold-state-dir", argument), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            path = Path(child.stdout.readline().strip())
            assert path.is_dir()
            yield child, path
        finally:
            child.kill()


def test_what_it_holds_survives_a_restart(tmp_path):
    path = tmp_path / "not" / "there" / "yet"
    with opened(path) as state:
        assert state.is_durable and state.path == path
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        state.database.save(ADAPTER)
        assert state.store.put(digest_of(1), {WEIGHTS: b"1234"}, ())
        (state.incoming / "folder").mkdir()
        (state.incoming / "folder" / "half").write_bytes(b"half")
        (state.incoming / "file").write_bytes(b"half")
    with opened(path) as state:
        assert state.database.load().adapters == (ADAPTER,)
        assert (state.store.get(digest_of(1)) / WEIGHTS).read_bytes() == b"1234"
        assert state.incoming == path / "incoming" and not os.listdir(state.incoming)


def test_layout(tmp_path):
    (tmp_path / "lock").write_text("12345678901234\n")  # of an earlier server
    with opened(tmp_path):
        assert {"lock", "state.sqlite", "versions", "incoming"} <= set(os.listdir(tmp_path))
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_parts_may_be_links_to_another_disk(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "old").write_bytes(b"half")
    path = tmp_path / "state"
    path.mkdir()
    (path / "incoming").symlink_to(tmp_path / "elsewhere")
    with opened(path) as state:
        assert not os.listdir(tmp_path / "elsewhere") and state.incoming.is_symlink()


def test_a_second_server_is_refused_and_told_who_has_it(tmp_path):
    with other_server(tmp_path) as (child, _):
        with pytest.raises(AdapterStateError, match=rf"\(pid {child.pid}\).*--state-dir") as caught:
            open_state_dir(tmp_path, tmp_path, 1000)
        assert caught.value.code is Code.UNAVAILABLE
        child.stdin.close()
        assert child.wait(30) == 0
        with opened(tmp_path):
            pass


def test_a_killed_server_leaves_no_lock(tmp_path):
    with other_server(tmp_path) as (child, _):
        child.kill()
        assert child.wait(30) == -signal.SIGKILL
        with opened(tmp_path):
            assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_two_in_one_process_are_refused_too(tmp_path):
    with opened(tmp_path):
        with pytest.raises(AdapterStateError, match=f"pid {os.getpid()}"):
            open_state_dir(tmp_path, tmp_path, 1000)


def test_a_refused_database_frees_the_lock(tmp_path):
    (tmp_path / "state.sqlite").write_bytes(b"not a database" * 1000)
    for _ in range(2):
        with pytest.raises(AdapterStateError, match="damaged"):
            open_state_dir(tmp_path, tmp_path, 1000)
    (tmp_path / "state.sqlite").unlink()
    with opened(tmp_path):
        pass


def test_close_may_be_called_twice(tmp_path):
    state = open_state_dir(tmp_path, tmp_path, 1000)
    state.close()
    with opened(tmp_path):
        state.close()
        with pytest.raises(AdapterStateError, match="is in use"):
            open_state_dir(tmp_path, tmp_path, 1000)


def test_a_private_one_goes_when_it_is_closed(tmp_path):
    scratch = tmp_path / "cache" / "runs"
    with opened(None, scratch) as state, opened(None, scratch) as second:
        assert not state.is_durable
        assert state.path.parent == scratch and state.path.name.startswith(f"run-{os.getpid()}-")
        assert state.path != second.path
        state.database.save(ADAPTER)
        state.store.put(digest_of(1), {WEIGHTS: b"1234"}, ())
    assert os.listdir(scratch) == ["private.lock"]


def test_private_ones_of_killed_servers_are_removed_and_others_are_not(tmp_path):
    (tmp_path / "run-of-mine").mkdir()
    (tmp_path / "run-1-0123abcd").mkdir()  # killed before it was locked
    (tmp_path / "run-2-0123abcd").write_text("no directory")
    with other_server(f"-{tmp_path}") as (_, living), other_server(f"-{tmp_path}") as (child, dead):
        child.kill()
        child.wait(30)
        assert dead.is_dir()
        with opened(None, tmp_path) as state:
            kept = {"private.lock", "run-of-mine", "run-2-0123abcd", living.name, state.path.name}
            assert set(os.listdir(tmp_path)) == kept
        assert {"state.sqlite", "versions"} <= set(os.listdir(living))


def test_private_ones_made_at_once_do_not_remove_each_other(tmp_path):
    children = [
        subprocess.Popen(
            command("hold-state-dir", f"-{tmp_path}"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    paths = [Path(child.stdout.readline().strip()) for child in children]
    complete = [(path / "state.sqlite").is_file() for path in paths]
    for child in children:
        child.communicate()
    assert all(complete) and all(child.returncode == 0 for child in children)
    assert os.listdir(tmp_path) == ["private.lock"]


def test_a_failed_private_one_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("lorikeet.adapters.state.state_dir.VersionStore", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_state_dir(None, tmp_path, 1000)
    assert os.listdir(tmp_path) == ["private.lock"]


def test_a_file_in_its_place_is_named(tmp_path):
    (tmp_path / "state").write_text("a file")
    for path in (tmp_path / "state", tmp_path / "state" / "below"):
        with pytest.raises(AdapterStateError, match=r"state.* cannot be used: (File exists|Not a directory)"):
            open_state_dir(path, tmp_path, 1000)


@ROOT_IGNORES_MODES
def test_a_read_only_place_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(AdapterStateError, match="cannot be used: Permission denied"):
        open_state_dir(tmp_path, tmp_path, 1000)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(AdapterStateError, match="cannot be used: No locks available"):
        open_state_dir(tmp_path, tmp_path, 1000)
