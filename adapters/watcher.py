"""Keeps the served adapters in line with the subfolders of the adapter roots.

A subfolder that appears or changes is loaded under its name, one that goes is unloaded. Change notifications only say
*when* to look: what to do is decided by comparing each folder's files with what they were, so that a lost notification
(or a network file system without any) delays a change and never hides it.

A folder counts once all of its files have been left alone for a while (tools that sync folders write beside the file
that they will replace) and the weights file is as long as its header announces; until then a half-copied folder is
neither served nor failed. One that stays incomplete, or is refused, is listed as failed with its reason and tried again
when it changes.
"""

import itertools
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
import watchfiles

from .card import CARD_FILE
from .carried_text import CARRIED_FILE
from .checkpoint import check_complete
from .config import CONFIG_FILE
from .errors import AdapterIdError, ServingError
from .golden import GOLDEN_FILE
from .info import AdapterInfo
from .manager import AdapterManager
from .paths import check_adapter_id
from .shards import weights_names
from .tokenizer_files import TOKENIZER_FILES

SETTLE_S: Final = 1.0
# How long a folder may stay incomplete, without any change, before it is listed as failed.
INCOMPLETE_S: Final = 10.0
# Without notifications every folder is looked at this often.
RESCAN_S: Final = 10.0

_TEMPORARY: Final = (".tmp", ".partial")

# Files of a folder that are looked at for changes.
_MAX_ENTRIES: Final = 256

# For each of the files that a load reads: modification and change time in ns, size, inode; None where it is missing.
_Signature = tuple[tuple[int, int, int, int] | None, ...]

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Folder:
    """One subfolder.

    Attributes:
        root: which root it is in.
        path: as found, not resolved.
        signature: of its files when last seen.
        changed_at: `time.monotonic()` second since which nothing in it has changed.
        stir: changes with any of its files, also those that a load does not read.
        gone_since: when it was first missed, or None.
        handled: the signature that was loaded or refused last, or None.
        directory: the real path it was loaded from, or None.
        load: the load under way, or the last one.
    """

    root: Path
    path: Path
    signature: _Signature
    changed_at: float
    stir: int
    gone_since: float | None = None
    handled: _Signature | None = None
    directory: Path | None = None
    load: Future[AdapterInfo] | None = None


class AdapterWatcher:
    """Watches the roots with one thread.

    Args:
        manager: loads and unloads.
        roots: directories whose subfolders are adapters; of two subfolders of the same name the first root's counts.
        settle_s: how long a folder's files must be unchanged.
        incomplete_s: how long an incomplete folder may stay so before it is listed as failed.
    """

    def __init__(
        self,
        manager: AdapterManager,
        roots: Sequence[Path],
        *,
        settle_s: float = SETTLE_S,
        incomplete_s: float = INCOMPLETE_S,
    ) -> None:
        self._manager = manager
        self._roots = tuple(root.absolute() for root in roots)
        self._settle_s = settle_s
        self._incomplete_s = incomplete_s
        self._folders: dict[str, _Folder] = {}
        self._ignored: set[Path] = set()  # folders already warned about
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adapter-watcher", daemon=True)

    def start(self) -> None:
        """Load what is there, waiting until every settled folder is loaded or refused; then watch."""
        self.scan()
        wait([folder.load for folder in self._folders.values() if folder.load is not None])
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def scan(self) -> bool:
        """Compare the folders with what they were, and start the loads and unloads that follow.

        Returns:
            Whether a folder has yet to settle, so that another scan is due soon even if nothing changes.
        """
        now = time.monotonic()
        found = self._find()
        for name, (root, path) in found.items():
            self._look_at(name, root, path, now)
        pending = [self._settle(name, folder, now) for name, folder in list(self._folders.items()) if name in found]
        pending += [self._miss(name, folder, now) for name, folder in list(self._folders.items()) if name not in found]
        return any(pending)

    def _run(self) -> None:
        tick_s = max(self._settle_s / 2, 0.05)
        pending, scanned_at = True, time.monotonic()
        while not self._stop.is_set():
            try:
                # Yields at every tick, with or without changes, and ends when `_stop` is set.
                for changes in watchfiles.watch(
                    *self._roots,
                    watch_filter=None,
                    stop_event=self._stop,
                    rust_timeout=int(tick_s * 1000),
                    debounce=200,
                    yield_on_timeout=True,
                    raise_interrupt=False,
                ):
                    if changes or pending or time.monotonic() - scanned_at > RESCAN_S:
                        pending, scanned_at = self._scan_or_log(), time.monotonic()
            except Exception as error:
                # A root is gone, or the system's watch limit is reached: look at intervals until that is over.
                _log.warning("adapter_watch_failed", error=repr(error))
                self._stop.wait(tick_s if pending else RESCAN_S)
                pending, scanned_at = self._scan_or_log(), time.monotonic()

    def _scan_or_log(self) -> bool:
        """Scan; an unexpected error must not end the watching."""
        try:
            return self.scan()
        except Exception:
            _log.exception("adapter_scan_failed")
            return False

    def _find(self) -> dict[str, tuple[Path, Path]]:
        """Subfolders by name: (root, path). Folders of a root that cannot be read stay as they were."""
        found: dict[str, tuple[Path, Path]] = {}
        for root in self._roots:
            try:
                with os.scandir(root) as entries:
                    paths = [root / entry.name for entry in entries if entry.is_dir()]
            except OSError:
                _log.warning("adapter_root_unreadable", root=str(root))
                kept = {n: (f.root, f.path) for n, f in self._folders.items() if f.root == root}
                found = {**kept, **found}
                continue
            for path in sorted(paths):
                name = path.name
                if name.startswith(".") or name.endswith(_TEMPORARY) or not self._is_acceptable(path):
                    continue
                if name not in found:
                    found[name] = (root, path)
                elif path not in self._ignored:
                    self._ignored.add(path)
                    _log.warning("adapter_folder_ignored", folder=name, why="an earlier root has a folder of this name")
        return found

    def _is_acceptable(self, path: Path) -> bool:
        try:
            check_adapter_id(path.name)
        except AdapterIdError as error:
            if path not in self._ignored:
                self._ignored.add(path)
                _log.warning("adapter_folder_ignored", folder=path.name, why=error.message)
            return False
        return True

    def _look_at(self, name: str, root: Path, path: Path, now: float) -> None:
        signature, stir = _signature(path), _stir(path)
        folder = self._folders.get(name)
        if folder is None or folder.path != path:
            # A folder that was there before may have been left alone for long; the change time, which no copying tool
            # can set, tells since when.
            changed = max((entry[1] / 1e9 for entry in signature if entry is not None), default=time.time())
            age = max(0.0, time.time() - changed)
            self._folders[name] = _Folder(root, path, signature, now - age, stir)
            return
        folder.gone_since = None
        if (folder.signature, folder.stir) != (signature, stir):
            folder.signature, folder.stir, folder.changed_at = signature, stir, now

    def _settle(self, name: str, folder: _Folder, now: float) -> bool:
        """Load a changed folder once it is quiet and complete; whether that is still to come."""
        if folder.handled == folder.signature:
            return False
        quiet_s = now - folder.changed_at
        if quiet_s < self._settle_s or (quiet_s < self._incomplete_s and not self._is_complete(folder)):
            return True
        folder.handled = folder.signature
        folder.directory = folder.path.resolve()
        try:
            folder.load = self._manager.load_folder(name, folder.path)
        except ServingError as error:  # a link that leads out of the roots
            _log.warning("adapter_folder_refused", adapter=name, reason=error.reason, message=error.message)
            self._manager.note_failure(name, error)
        return False

    def _miss(self, name: str, folder: _Folder, now: float) -> bool:
        """Unload what has been gone for a while (it may be about to be replaced); whether that is still to come."""
        if folder.gone_since is None:
            folder.gone_since = now
        if now - folder.gone_since < self._settle_s:
            return True
        del self._folders[name]
        # Also of a folder that never settled: a call may have loaded it meanwhile.
        self._manager.folder_gone(name, folder.directory or folder.path.resolve())
        return False

    def _is_complete(self, folder: _Folder) -> bool:
        try:
            check_complete(folder.path.resolve(), self._roots)
        except ServingError:
            return False
        return True


_WATCHED: Final = (CONFIG_FILE, GOLDEN_FILE, CARD_FILE, CARRIED_FILE, *TOKENIZER_FILES)


def _signature(path: Path) -> _Signature:
    return tuple(_file_signature(path / name) for name in (*_WATCHED, *weights_names(path)))


def _stir(path: Path) -> int:
    """Another number when any file of the folder has changed, come or gone; files of subfolders do not count."""
    try:
        with os.scandir(path) as entries:
            return hash(frozenset((entry.name, _times(entry)) for entry in itertools.islice(entries, _MAX_ENTRIES)))
    except OSError:
        return 0


def _times(entry: os.DirEntry[str]) -> tuple[int, int, int]:
    stat = entry.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _file_signature(path: Path) -> tuple[int, int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino
