"""Keeps the files of adapter versions, so that a version outlives the folder it came from. Imports no torch.

One directory a version, named by its digest. A directory of that name is always complete: files are written beside it
and synced before the rename that makes it appear, and it is renamed away before it is deleted.
"""

import contextlib
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import structlog

from ..errors import AdapterMemoryError, AdapterUnreadableError
from .durable_files import make_directory, sync_directory
from .version_files import (
    PARTIAL,
    Content,
    checked_name,
    delete_tree,
    disk_error,
    holds,
    measure,
    partial_directory,
    pieces_of,
    replace_files,
    size_of,
    write_version,
)

_log = structlog.get_logger(__name__)

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class VersionStore:
    """Content-addressed copies within a byte budget; the least recently used go first.

    Thread-safe. The lock is never held while files are read or written; renames and time stamps are made under it, so
    that the bookkeeping and the directories agree at every moment. The order of use is kept in the directories'
    modification times and so survives a restart.

    Args:
        root: holds the copies and nothing else; created when missing. Used by no other process.
        budget_bytes: of all files together; 0: nothing is stored. Copies that are there already stay until their room
            is needed, also when they are more than the budget.

    Raises:
        OSError: root cannot be created or listed.
    """

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root = root
        self._budget = budget_bytes
        self._changed = threading.Condition()  # notified when a write has ended
        self._entries: OrderedDict[str, int] = OrderedDict()  # digest -> bytes, least recently used first
        self._writing: dict[str, int] = {}  # digest -> bytes reserved
        self._last_use_ns = 0
        make_directory(root)
        self._scan()

    @property
    def budget_bytes(self) -> int:
        """Of all copies together."""
        return self._budget

    @property
    def used_bytes(self) -> int:
        """Of the copies that are there."""
        with self._changed:
            return sum(self._entries.values())

    def digests(self) -> dict[str, int]:
        """The bytes of every copy, least recently used first."""
        with self._changed:
            return dict(self._entries)

    def get(self, digest: str) -> Path | None:
        """The directory of a version, which counts as a use; None when there is no copy."""
        with self._changed:
            return self._root / digest if self._touch(digest) else None

    def put(self, digest: str, files: Mapping[str, Content], protected: Collection[str], *, must: bool = False) -> bool:
        """Store a version, durably when this returns True; one that is there already is only marked as used.

        It waits for other threads' writes where those decide whether there is room.

        Args:
            digest: 64 lower-case hex digits.
            files: file name -> content.
            protected: digests that may not go to make room. Those of versions that were put a moment ago and are not
                yet referred to anywhere else belong here, too.
            must: raise rather than return False.

        Returns:
            Whether the version is stored. If not, none of it is, and where room was lacking nothing was evicted.

        Raises:
            AdapterMemoryError: must, and there is no room.
            AdapterUnreadableError: must, and the disk is full or failed.
        """
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a digest: {digest!r}")
        pieces = {checked_name(name): pieces_of(content) for name, content in files.items()}
        size = sum(map(size_of, pieces.values()))
        retired: list[Path] = []
        try:
            if not self._reserve(digest, size, protected, retired):
                return True
            stored = False
            try:
                self._delete(retired)
                write_version(self._root, digest, pieces)
                stored = True
            finally:
                self._end_write(digest, stored)
        except (AdapterMemoryError, AdapterUnreadableError) as error:
            if must:
                raise
            _log.warning("version_not_stored", digest=digest, bytes=size, reason=error.reason, message=error.message)
            return False
        finally:
            self._delete(retired)
        return True

    def replace(self, digest: str, files: Mapping[str, Content | None], protected: Collection[str]) -> None:
        """Bring those files of a stored version up to date that its digest says nothing about.

        Nothing happens when the version is not stored, and nothing is written where nothing differs. Where there is no
        room, or the disk fails, the version stays usable with the files that it had.

        Args:
            digest: the version.
            files: file name -> content; None: it shall have none of that name.
            protected: as for `put`.
        """
        wanted = {checked_name(name): None if found is None else pieces_of(found) for name, found in files.items()}
        changed = {name: found for name, found in wanted.items() if not holds(self._root / digest / name, found)}
        size = sum(size_of(found) for found in changed.values() if found is not None)
        retired: list[Path] = []
        try:
            if not changed or not self._reserve_growth(digest, size, protected, retired):
                return
            try:
                self._delete(retired)
                replace_files(self._root, digest, changed)
            finally:
                self._end_replace(digest)
        except (AdapterMemoryError, AdapterUnreadableError) as error:
            _log.warning("version_not_brought_up_to_date", digest=digest, reason=error.reason, message=error.message)
        finally:
            self._delete(retired)

    def remove(self, digest: str) -> None:
        """Delete a copy, after waiting until it is written; nothing happens when there is none.

        Raises:
            AdapterUnreadableError: the disk failed; the copy is still there.
        """
        retired: list[Path] = []
        with self._changed:
            while digest in self._writing:
                self._changed.wait()
            if digest in self._entries:
                self._retire(digest, retired)
        self._delete(retired)

    def _scan(self) -> None:
        """Take over what an earlier process left: complete copies are counted, partial ones deleted."""
        found: list[tuple[int, str, int]] = []
        with os.scandir(self._root) as entries:
            for entry in entries:
                if entry.name.startswith(PARTIAL):
                    delete_tree(Path(entry.path))
                elif _DIGEST.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    found.append((entry.stat().st_mtime_ns, entry.name, measure(Path(entry.path))))
                else:
                    _log.warning("version_store_ignores", name=entry.name, why="not the name of a version")
        for used_at_ns, digest, size in sorted(found):
            self._entries[digest] = size
            self._last_use_ns = used_at_ns

    def _reserve(self, digest: str, size: int, protected: Collection[str], retired: list[Path]) -> bool:
        """Make room in the books and announce the write; False when the version is there already.

        Args:
            digest, size, protected: as for `put`.
            retired: gets the directories that the caller has to delete.

        Raises:
            AdapterMemoryError: no room; nothing was retired.
            AdapterUnreadableError: a directory could not be renamed.
        """
        with self._changed:
            while True:
                if digest not in self._writing:
                    if self._touch(digest):
                        return False
                    victims, missing = self._find_room(size, protected)
                    if missing <= 0:
                        break
                    if not self._writing or size > self._budget:
                        raise self._no_room(digest, size, missing)
                # Once a write has ended, the version may be there, or what was written may be evicted.
                self._changed.wait()
            if os.path.lexists(self._root / digest):  # left by a disk that failed half-way
                victims.append(digest)
            for victim in victims:
                self._retire(victim, retired)
            self._writing[digest] = size
            return True

    def _reserve_growth(self, digest: str, size: int, protected: Collection[str], retired: list[Path]) -> bool:
        """As `_reserve`, for so many bytes more of a version that is there; False when it is not.

        Old and new files are on the disk together for a moment, so the old ones' room is not counted as free.
        """
        with self._changed:
            while digest in self._writing:
                self._changed.wait()
            if digest not in self._entries:
                return False
            victims, missing = self._find_room(size, {digest, *protected}) if size else ([], 0)
            if missing > 0:
                raise self._no_room(digest, size, missing)
            for victim in victims:
                self._retire(victim, retired)
            self._writing[digest] = size
            return True

    def _no_room(self, digest: str, size: int, missing: int) -> AdapterMemoryError:
        return AdapterMemoryError(
            f"Version {digest[:12]} takes {size} bytes; the adapter store's budget is {self._budget} bytes, and beside "
            f"the versions that must stay {missing} bytes are missing. Raise --adapter-store-bytes."
        )

    def _find_room(self, size: int, protected: Collection[str]) -> tuple[list[str], int]:
        """The copies to evict for so many bytes, and how many bytes are missing even then (0 or less: none)."""
        missing = sum(self._entries.values()) + sum(self._writing.values()) + size - self._budget
        victims = []
        for digest, freed in self._entries.items():
            if missing <= 0:
                break
            if digest not in protected:
                victims.append(digest)
                missing -= freed
        return victims, missing

    def _retire(self, digest: str, retired: list[Path]) -> None:
        """Rename a copy, so that it is gone for everybody at once."""
        partial = partial_directory(self._root)
        try:
            os.rename(self._root / digest, partial)
        except FileNotFoundError:
            _log.warning("version_store_copy_vanished", digest=digest)
        except OSError as error:
            raise disk_error(digest, "deleted", error) from None
        else:
            retired.append(partial)
        self._entries.pop(digest, None)

    def _delete(self, retired: list[Path]) -> None:
        """Delete retired directories and forget them."""
        if not retired:
            return
        try:
            sync_directory(self._root)  # or a power cut could bring a half-deleted one back under its digest
        except OSError as error:
            _log.warning("version_store_not_deleted", error=repr(error), hint="the next start deletes it")
        else:
            for partial in retired:
                delete_tree(partial)
        retired.clear()

    def _end_write(self, digest: str, stored: bool) -> None:
        with self._changed:
            size = self._writing.pop(digest)
            if stored:
                self._entries[digest] = size
                self._touch(digest)
            self._changed.notify_all()

    def _end_replace(self, digest: str) -> None:
        with self._changed:
            del self._writing[digest]
            if digest in self._entries:
                with contextlib.suppress(OSError):  # then it has just vanished, and is found missing at its next use
                    self._entries[digest] = measure(self._root / digest)
                self._touch(digest)
            self._changed.notify_all()

    def _touch(self, digest: str) -> bool:
        """Mark a copy as the one used last; False when there is none."""
        if digest not in self._entries:
            return False
        # Strictly increasing, also when the clock is not: the order must be the same after a restart.
        self._last_use_ns = max(time.time_ns(), self._last_use_ns + 1)
        try:
            os.utime(self._root / digest, ns=(self._last_use_ns, self._last_use_ns))
        except FileNotFoundError:
            _log.warning("version_store_copy_vanished", digest=digest)
            del self._entries[digest]
            return False
        except OSError:
            pass  # only the order after a restart suffers
        self._entries.move_to_end(digest)
        return True
