"""The files of one adapter, one after the other: names, order, limits, retries, and whether they belong together."""

import asyncio
import time
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import structlog

from ..card import CARD_FILE
from ..carried_text import CARRIED_FILE, MAX_CARRIED_BYTES
from ..config import CONFIG_FILE, MAX_CONFIG_BYTES
from ..errors import AdapterMemoryError, AdapterNotFoundError, AdapterSourceError, AdapterUnreadableError
from ..shards import INDEX_FILES, MAX_INDEX_BYTES, parse_index
from ..tokenizer_files import TOKENIZER_FILES
from ..weights_file import WEIGHTS_FILE
from .failures import AccessError, MissingFileError, TransferError
from .meter import Meter

# As adapters/golden.py names it, which imports torch.
GOLDEN_FILE: Final = "lorikeet.golden.safetensors"
ATTEMPTS: Final = 3
BACKOFF_S: Final = 0.25
# A connection that is silent for this long is given up and another one tried; the deadline bounds all of them.
CONNECT_S: Final = 15.0
STALL_S: Final = 30.0

_log = structlog.get_logger(__name__)


class _Wanted(NamedTuple):
    name: str
    is_required: bool
    max_bytes: int | None = None


# The only names that are ever asked for are these and those of weights. The small one first: it tells whether the
# folder is an adapter at all.
_CONFIG: Final = _Wanted(CONFIG_FILE, is_required=True, max_bytes=MAX_CONFIG_BYTES)
_WEIGHTS: Final = _Wanted(WEIGHTS_FILE, is_required=True)
_INDEXES: Final = tuple(_Wanted(name, is_required=False, max_bytes=MAX_INDEX_BYTES) for name in INDEX_FILES)
_FURTHER: Final = (
    _Wanted(GOLDEN_FILE, is_required=False),
    _Wanted(CARD_FILE, is_required=False),
    *(_Wanted(name, is_required=False, max_bytes=size) for name, size in TOKENIZER_FILES.items()),
)
_CARRIED: Final = _Wanted(CARRIED_FILE, is_required=False, max_bytes=MAX_CARRIED_BYTES)


class RemoteFolder(Protocol):
    """One folder of a store, opened."""

    async def fetch(self, name: str, target: Path, meter: Meter) -> str | None:
        """Write a file of the folder to `target`; what an error leaves there is worthless.

        Returns:
            A mark of the content (an entity tag, say) as the store tells it, or None.

        Raises:
            MissingFileError, AccessError, TransferError, ServingError: as their names say.
        """

    async def mark(self, name: str) -> str | None:
        """The mark that `fetch` would return now, without the content; None when it cannot be told.

        Raises:
            MissingFileError, AccessError, TransferError: likewise.
        """


async def fetch_files(folder: RemoteFolder, uri: str, directory: Path, max_bytes: int) -> None:
    """Bring an adapter's files into a local directory.

    Args:
        folder: where they are.
        uri: of the folder, for messages; without credentials.
        directory: exists, is empty, and is the caller's alone.
        max_bytes: of all files together.

    Raises:
        AdapterNotFoundError: a required file is missing.
        AdapterInvalidError: the weights are split, and their index is malformed.
        AdapterSourceError: the store refuses access.
        AdapterMemoryError: too many bytes.
        AdapterUnreadableError: it did not work, also not at the third try; or the files changed meanwhile.
    """
    started = time.monotonic()
    files = _Files(folder, uri, directory, max_bytes)
    await files.take(_CONFIG)
    try:
        await files.take(_WEIGHTS)
    except (AdapterNotFoundError, AdapterSourceError):  # some stores refuse what is not there
        if not await _take_shards(files):
            raise
    for wanted in _FURTHER:
        await files.take(wanted)
    await _take_carried(files)
    await _check_unchanged(folder, uri, files.marks)
    _log.info("adapter_fetched", uri=uri, bytes=max_bytes - files.left, seconds=round(time.monotonic() - started, 3))


class _Files:
    """What has been fetched so far: the bytes that may still come, and the marks of what came."""

    def __init__(self, folder: RemoteFolder, uri: str, directory: Path, max_bytes: int) -> None:
        self.left = max_bytes
        self.marks: dict[str, str] = {}
        self._folder, self._uri, self._directory = folder, uri, directory

    async def take(self, wanted: _Wanted) -> Path | None:
        """Fetch a file; None when there is none, and need not be."""
        limit = self.left if wanted.max_bytes is None else min(self.left, wanted.max_bytes)
        meter = Meter(wanted.name, self._uri, limit)
        target = self._directory / wanted.name
        mark = await _fetch(self._folder, self._uri, wanted, target, meter)
        self.left -= meter.received
        if mark is not None:
            self.marks[wanted.name] = mark
        return target if target.exists() else None

    def drop(self, wanted: _Wanted) -> None:
        """Remove what came of a file that is done without."""
        (self._directory / wanted.name).unlink(missing_ok=True)


async def _take_shards(files: _Files) -> bool:
    """Fetch weights that are split, by the names in their index; False when there is no index."""
    for wanted in _INDEXES:
        index = await files.take(wanted)
        if index is not None:
            for name in parse_index(index.read_bytes(), wanted.name):
                await files.take(_Wanted(name, is_required=True))
            return True
    return False


async def _take_carried(files: _Files) -> None:
    """Fetch the text for merges; an adapter is served without it, too, so it may be too large or out of reach."""
    try:
        await files.take(_CARRIED)
    except (AdapterMemoryError, AdapterUnreadableError) as error:
        files.drop(_CARRIED)
        _log.warning("adapter_fetch_skipped", file=CARRIED_FILE, why=error.message)


async def _fetch(folder: RemoteFolder, uri: str, wanted: _Wanted, target: Path, meter: Meter) -> str | None:
    about = {"file": wanted.name}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await folder.fetch(wanted.name, target, meter)
        except MissingFileError:
            if wanted.is_required:
                raise AdapterNotFoundError(f"{uri} has no file {wanted.name}.", about) from None
            break
        except AccessError:
            if wanted.is_required:
                raise AdapterSourceError(
                    f"{uri} may not be read, or has no {wanted.name} and does not tell strangers so. Credentials are "
                    "taken from the server's environment, never from a URI.",
                    about,
                ) from None
            # Stores that must not list a folder answer so for files that are not there.
            _log.info("adapter_fetch_skipped", uri=uri, file=wanted.name, why="access was refused")
            break
        except TransferError as error:
            _log.warning("adapter_fetch_attempt_failed", uri=uri, file=wanted.name, attempt=attempt, why=str(error))
            if attempt == ATTEMPTS:
                raise AdapterUnreadableError(f"{wanted.name} of {uri} could not be fetched: {error}.", about) from None
            await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
    _discard(target)  # what an earlier attempt left
    return None


def _discard(target: Path) -> None:
    target.unlink(missing_ok=True)


async def _check_unchanged(folder: RemoteFolder, uri: str, marks: dict[str, str]) -> None:
    """Refuse files of which one was replaced meanwhile: config and weights that were never together are no version."""
    for name, before in marks.items():
        try:
            now = await folder.mark(name)
        except MissingFileError:
            now = ""
        except (AccessError, TransferError):  # a store that answers only to whole downloads
            now = None
        if now is not None and now != before:
            raise AdapterUnreadableError(
                f"{name} of {uri} changed while it was fetched; load it again.", {"file": name}
            )
