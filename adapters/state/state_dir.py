"""The directory of what survives a restart, `--state-dir`, or a private one that goes with the process.

Imports no torch. In the directory are:
- `lock`: held by the server that uses the directory; its content is that server's pid
- `state.sqlite`: see database.py
- `versions/`: see version_store.py
- `incoming/`: downloads under way; emptied at each start
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import structlog

from .database import StateDatabase
from .durable_files import make_directory
from .errors import AdapterStateError
from .version_store import VersionStore

_log = structlog.get_logger(__name__)

_LOCK_FILE: Final = "lock"
# Guards making and clearing away private directories: one that is not locked yet must not look abandoned.
_PRIVATE_LOCK_FILE: Final = "private.lock"
_PRIVATE: Final = re.compile(r"run-[0-9]+-[0-9a-f]+")


class StateDir:
    """An open state directory; `open_state_dir` makes it.

    Args:
        path: exists and is locked.
        lock: descriptor of the lock file.
        is_durable: whether it outlives the process; else `close` removes it.
        store_bytes: budget of the version store.

    Attributes:
        path: the directory.
        incoming: where downloads are written before they are checked and stored; empty at first.
        database: what was loaded, pinned and aliased.
        store: the files of versions.
        is_durable: whether it outlives the process.

    Raises:
        AdapterStateError: the database is damaged or of a newer schema.
        OSError: the disk is full or failed, or permissions are missing.
    """

    def __init__(self, path: Path, lock: int, *, is_durable: bool, store_bytes: int) -> None:
        self.path = path
        self.incoming = path / "incoming"
        self.is_durable = is_durable
        self._lock: int | None = lock
        make_directory(self.incoming)
        _empty(self.incoming)
        self.store = VersionStore(path / "versions", store_bytes)
        self.database = StateDatabase(path / "state.sqlite")

    def close(self) -> None:
        """Close the database and let another server have the directory. May be called twice."""
        if self._lock is None:
            return
        self.database.close()
        if not self.is_durable:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = None


def open_state_dir(path: Path | None, scratch_parent: Path, store_bytes: int) -> StateDir:
    """Open a state directory for this process alone.

    Args:
        path: created when missing; None: a private one that is removed when it is closed, or by a later start when
            this process is killed.
        scratch_parent: where private ones lie; created when missing.
        store_bytes: budget of the version store.

    Raises:
        AdapterStateError: another server uses it, it is damaged or of a newer Lorikeet, or cannot be read or written.
    """
    try:
        if path is not None:
            make_directory(path)
            return _open(path, is_durable=True, store_bytes=store_bytes)
        make_directory(scratch_parent)
        with _locked(scratch_parent / _PRIVATE_LOCK_FILE):
            _remove_abandoned(scratch_parent)
            private = scratch_parent / f"run-{os.getpid()}-{secrets.token_hex(4)}"
            private.mkdir(mode=0o700)
            return _open(private, is_durable=False, store_bytes=store_bytes)
    except OSError as error:
        raise AdapterStateError(
            f"The state directory {scratch_parent if path is None else path} cannot be used: {error.strerror}."
        ) from error


def _open(path: Path, *, is_durable: bool, store_bytes: int) -> StateDir:
    lock = os.open(path / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
            raise AdapterStateError(
                f"The state directory {path} is in use by another server (pid {pid}). Give each server its own "
                "--state-dir."
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return StateDir(path, lock, is_durable=is_durable, store_bytes=store_bytes)
    except BaseException:
        if not is_durable:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
        raise


def _empty(directory: Path) -> None:
    """Delete what is in a directory, which itself may be a link to another disk."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry)
            else:
                os.unlink(entry)


def _remove_abandoned(parent: Path) -> None:
    """Remove the private directories whose process is gone; called with the parent's lock held."""
    with os.scandir(parent) as entries:
        candidates = [e for e in entries if _PRIVATE.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    for entry in candidates:
        try:
            lock = os.open(Path(entry.path) / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            continue  # another user's, or just now removed by its own process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry.path, ignore_errors=True)
            _log.info("state_dir_removed", name=entry.name, why="the server that made it is gone")
        except OSError:
            continue  # in use
        finally:
            os.close(lock)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, waiting for it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
