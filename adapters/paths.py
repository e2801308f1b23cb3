"""Which directories and files adapters may be read from. Imports no torch.

An id or a path comes from a client: it can name nothing outside the configured roots, also not through a symbolic link.
Messages show the path as the client gave it, never where a root lies.
"""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final

from .errors import AdapterIdError, AdapterInvalidError, AdapterNotFoundError

FileStamp = tuple[int, ...]

_ADAPTER_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_adapter_id(adapter_id: str) -> None:
    """Raise AdapterIdError unless the id is `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`."""
    if not _ADAPTER_ID.fullmatch(adapter_id):
        raise AdapterIdError(
            f"{adapter_id[:128]!r} is not an adapter id; allowed: 1 to 128 letters, digits, dots, dashes and "
            "underscores, starting with a letter or digit."
        )


def adapter_directory(roots: Sequence[Path], adapter_id: str, path: Path | None) -> Path:
    """The real directory of an adapter, strictly inside a root.

    Args:
        roots: configured roots, in order of preference.
        adapter_id: what users name; checked here.
        path: absolute, or relative to a root; None means `<root>/<adapter_id>`.

    Raises:
        AdapterIdError: malformed id, or a path outside every root.
        AdapterNotFoundError: no such directory in a root.
    """
    check_adapter_id(adapter_id)
    wanted = Path(adapter_id) if path is None else path
    if "\0" in str(wanted):
        raise AdapterIdError("The adapter path contains a zero byte.")
    real_roots = [root.resolve() for root in roots]
    contained = False
    escapes = False
    for root in real_roots:
        directory = (root / wanted).resolve()
        if any(directory != r and directory.is_relative_to(r) for r in real_roots):
            contained = True
            if directory.is_dir():
                return directory
        elif Path(os.path.normpath(root / wanted)).is_relative_to(root):
            escapes = True  # by a symbolic link
    shown = str(wanted)[:256]
    if not roots:
        raise AdapterNotFoundError(f"Adapter {adapter_id!r} cannot be loaded: the server has no adapter directory.")
    if escapes or not contained:
        raise AdapterIdError(f"Path {shown!r} of adapter {adapter_id!r} lies outside the server's adapter directories.")
    raise AdapterNotFoundError(f"The server's adapter directories have no folder {shown!r} for adapter {adapter_id!r}.")


def open_contained(directory: Path, name: str, roots: Sequence[Path]) -> BinaryIO:
    """Open a regular file of an adapter directory for reading, unbuffered.

    Args:
        directory: real path.
        name: plain file name.
        roots: the file must really lie in one of them; empty for anywhere (a local tool, not a client, asked).

    Raises:
        AdapterInvalidError: missing, not a regular file, unreadable, or a link that leads out of the roots.
    """
    try:
        real = Path(os.path.realpath(os.path.join(directory, name), strict=True))
        if roots and not _lies_in(real, roots):
            raise AdapterInvalidError(f"{name} is a link that leads out of the adapter directories.", {"file": name})
        # The path is real, so its last part is no link unless someone just swapped it: O_NOFOLLOW then fails.
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AdapterInvalidError(f"{name} is missing in the adapter folder.", {"file": name}) from None
    except (OSError, RuntimeError):  # RuntimeError: a root is a loop of links
        raise AdapterInvalidError(f"{name} cannot be read.", {"file": name}) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterInvalidError(f"{name} is not a regular file.", {"file": name})
    return os.fdopen(descriptor, "rb", buffering=0)


def _lies_in(real: Path, roots: Sequence[Path]) -> bool:
    """Whether a real path is in one of the roots. What is below a root as it is written is below the real root, too."""
    return any(real.is_relative_to(root) for root in roots) or any(real.is_relative_to(r.resolve()) for r in roots)


def file_stamp(status: os.stat_result) -> FileStamp:
    """Changes when a file is written to or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
