"""Files and directories that are still there after a power cut. Imports no torch."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ..priority import give_way

# Written without giving way.
_WRITE_BYTES: Final = 512 * 2**10


def write_durably(path: Path, pieces: Iterable[memoryview]) -> None:
    """Create a file, write the pieces one behind the other and wait until the disk has them.

    The file's name is durable only after `sync_directory` of its directory. Raises OSError, also when it exists.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for piece in pieces:
            written = 0
            while written < len(piece):
                written += os.write(descriptor, piece[written : written + _WRITE_BYTES])
                give_way()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the disk has the directory's entries. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory that only this user may enter, durably and with its parents. One that exists stays as it is.

    Raises:
        OSError: it cannot be created, or something else has its name.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    sync_directory(path.parent)
