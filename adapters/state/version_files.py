"""The files of one kept version on the disk: written whole or not at all, replaced one at a time. Imports no torch."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import structlog

from ..errors import AdapterUnreadableError
from .durable_files import sync_directory, write_durably

_log = structlog.get_logger(__name__)

Data = bytes | bytearray | memoryview
# A file's bytes, whole or in pieces.
Content = Data | Sequence[Data]
Pieces = list[memoryview]

# Directories being written or being deleted; what a killed process left behind.
PARTIAL: Final = ".partial-"

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def checked_name(name: str) -> str:
    """The name of a file in a version's directory. Raises ValueError unless it is a plain one."""
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"not a plain file name: {name!r}")
    return name


def pieces_of(content: Content) -> Pieces:
    """The content as bytes, uncopied; pieces without any are left out, memoryview.cast refuses some of them."""
    parts: Sequence[Data] = [content] if isinstance(content, Data) else content
    views = [memoryview(part) for part in parts]
    return [view.cast("B") for view in views if view.nbytes]


def size_of(pieces: Sequence[memoryview]) -> int:
    """Bytes of all pieces."""
    return sum(len(piece) for piece in pieces)


def holds(path: Path, pieces: Pieces | None) -> bool:
    """Whether a file has this content already; None: whether there is none. Files that cannot be read do not."""
    if pieces is None:
        return not os.path.lexists(path)
    try:
        return path.stat().st_size == size_of(pieces) and path.read_bytes() == b"".join(pieces)
    except OSError:
        return False


def partial_directory(root: Path) -> Path:
    """A name that no version has, new each time."""
    return root / f"{PARTIAL}{secrets.token_hex(8)}"


def write_version(root: Path, digest: str, files: Mapping[str, Pieces]) -> None:
    """Write a version's files and make them appear under its digest.

    Raises:
        AdapterUnreadableError: the disk is full or failed; nothing appeared.
    """
    partial, final = partial_directory(root), root / digest
    try:
        partial.mkdir(mode=0o700)
        for name, pieces in files.items():
            write_durably(partial / name, pieces)
        sync_directory(partial)
        os.rename(partial, final)
        try:
            sync_directory(root)
        except OSError:
            os.rename(final, partial)
            raise
    except OSError as error:
        delete_tree(partial)
        raise disk_error(digest, "stored", error) from None
    except BaseException:
        delete_tree(partial)
        raise


def replace_files(root: Path, digest: str, files: Mapping[str, Pieces | None]) -> None:
    """Put files in place of a written version's own of these names, each at one moment.

    Args:
        root, digest: the version's.
        files: file name -> content; None: it shall have none of that name.

    Raises:
        AdapterUnreadableError: the disk is full or failed; each file is the old one or the new one.
    """
    partial, final = partial_directory(root), root / digest
    try:
        partial.mkdir(mode=0o700)
        for name, pieces in files.items():
            if pieces is None:
                (final / name).unlink(missing_ok=True)
            else:
                write_durably(partial / name, pieces)
                os.rename(partial / name, final / name)
        sync_directory(final)
    except OSError as error:
        raise disk_error(digest, "brought up to date", error) from None
    finally:
        delete_tree(partial)


def measure(directory: Path) -> int:
    """Bytes of a version's files. Raises OSError."""
    with os.scandir(directory) as files:
        return sum(file.stat(follow_symlinks=False).st_size for file in files)


def delete_tree(path: Path) -> None:
    """Delete a directory; what cannot be deleted stays until the next start."""
    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        _log.warning("version_store_not_deleted", name=path.name, hint="the next start tries again")


def disk_error(digest: str, action: str, error: OSError) -> AdapterUnreadableError:
    """What clients are told of a failing disk."""
    _log.warning("version_store_disk_error", digest=digest, error=repr(error))
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "is full. Free space there" if is_full else "failed. Check it"
    return AdapterUnreadableError(
        f"Version {digest[:12]} could not be {action}: the disk of the server's adapter store {what} and try again."
    )
