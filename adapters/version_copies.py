"""A version's files in a directory of somebody's own, which stay whatever becomes of the version. Imports no torch."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from .state.version_files import checked_name, pieces_of


def link_files(kept: Path, target: Path) -> None:
    """Give the files of a kept version another name, or copy them where another disk is meant.

    Kept files are never written to, only replaced, so they stay as they are under the other name.

    Args:
        kept: the version's directory.
        target: made here.

    Raises:
        OSError: the disk is full, or failed.
    """
    target.mkdir(parents=True)
    for path in kept.iterdir():
        try:
            os.link(path, target / path.name)
        except OSError:  # another disk, or one that has no links
            shutil.copyfile(path, target / path.name)


def write_files(files: Mapping[str, Sequence[bytes | memoryview]], target: Path) -> None:
    """Write the files of a version that was just read.

    Args:
        files: name -> content in pieces.
        target: made here.

    Raises:
        OSError: the disk is full, or failed.
    """
    target.mkdir(parents=True)
    for name, content in files.items():
        with (target / checked_name(name)).open("xb") as file:
            file.writelines(pieces_of(content))
