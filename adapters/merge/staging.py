"""The directory of a merged model: it has its final name when it is complete and on the disk, and not before.

Everything is written into a hidden directory beside it, which one rename gives the final name. Whoever writes holds a
lock on that directory, so what a killed process left is known by its name and by having no lock; the next merge to the
same place removes it. Imports no torch.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ..state.durable_files import sync_directory
from .errors import MergeDiskError, MergeOutputExistsError, MergeUnwritableError, disk_error

_MARK: Final = ".merging-"
_RANDOM_BYTES: Final = 4  # of what is behind the mark, in hexadecimal digits


def check_output(out: Path) -> None:
    """Raise unless a directory could be made under this name.

    Raises:
        MergeOutputExistsError: something has the name.
        MergeUnwritableError: its parent is missing, or may not be written to.
    """
    if os.path.lexists(out):
        raise MergeOutputExistsError(f"{out.name} is there already, and nothing is overwritten: give another --out.")
    if not out.parent.is_dir():
        raise MergeUnwritableError(f"The directory that {out.name} would lie in is missing: make it first.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise MergeUnwritableError(f"The directory that {out.name} would lie in may not be written to by this user.")


def check_room(out: Path, needed: int) -> None:
    """Raise MergeDiskError unless the disk that a directory would lie on has so many bytes left."""
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise MergeDiskError(
            f"{out.name} will take about {needed / 1e9:.2f} GB while it is written, and its disk has {free / 1e9:.2f} "
            "GB left. Free space, or choose a directory on another disk."
        )


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `out` if the block ends without an error, and else is removed.

    Args:
        out: absolute, checked by `check_output`.

    Raises:
        MergeOutputExistsError: something took the name meanwhile.
        MergeDiskError, MergeUnwritableError: of any OSError before the directory has its name, also one of the block;
            or its name could not be made durable.
    """
    remove_leftovers(out)
    staging = out.with_name(f".{out.name}{_MARK}{secrets.token_hex(_RANDOM_BYTES)}")
    try:
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield staging
            _sync_tree(staging)
            if os.path.lexists(out):
                raise MergeOutputExistsError(f"{out.name} appeared while it was written; it is left as it is.")
            staging.rename(out)
        finally:
            os.close(lock)
    except OSError as error:
        raise disk_error(error, out.name) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # no longer there if it has its name
    try:
        sync_directory(out.parent)
    except OSError as error:
        raise MergeUnwritableError(
            f"{out.name} is complete, but the disk did not confirm its name ({error.strerror or type(error).__name__}):"
            " see that it is still there before you rely on it."
        ) from error


def remove_leftovers(out: Path) -> None:
    """Remove what merges to the same place left when they were killed."""
    _remove_unlocked(out.parent, re.escape(out.name))


def remove_all_leftovers(parent: Path) -> None:
    """Remove what merges to any place in a directory left when they were killed."""
    _remove_unlocked(parent, ".+")


def _remove_unlocked(parent: Path, name: str) -> None:
    ours = re.compile(rf"\.{name}{re.escape(_MARK)}[0-9a-f]{{{2 * _RANDOM_BYTES}}}")
    for path in [path for path in parent.iterdir() if ours.fullmatch(path.name)]:
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
                shutil.rmtree(path)
            finally:
                os.close(lock)


def _sync_tree(directory: Path) -> None:
    """Wait until the disk has every file below a directory."""
    for path, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(os.path.join(path, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(path))
