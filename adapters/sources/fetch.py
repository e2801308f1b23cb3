"""Brings remote adapters to this machine: into a private directory, within limits of size and time, whole or not."""

import shutil
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

import structlog

from ..errors import AdapterSourceError, AdapterUnreadableError, ServingError
from .bounded import BoundedRun, StoppedError
from .locate import RemoteSource
from .transfer import RemoteFolder, fetch_files

Opener = Callable[[RemoteSource], AbstractAsyncContextManager[RemoteFolder]]

_log = structlog.get_logger(__name__)


class Fetcher:
    """Fetches adapters, several at a time if several threads ask. Thread-safe.

    Args:
        incoming: directory for downloads under way; created when missing. Whatever a killed process left there is the
            owner's to remove.
        max_bytes: of all files of one adapter.
        timeout_s: wall-clock seconds for one adapter, everything included.
    """

    def __init__(self, incoming: Path, *, max_bytes: int, timeout_s: float) -> None:
        self._incoming = incoming
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._runs: set[BoundedRun] = set()
        self._is_closed = False

    @contextmanager
    def fetch(self, source: RemoteSource) -> Iterator[Path]:
        """A directory with the files of an adapter, that is there until the context ends. Blocks.

        In it are `adapter_config.json` and `adapter_model.safetensors`, and, where the source has them,
        `lorikeet.golden.safetensors`, `README.md`, `calibration.txt` and a tokenizer's. Their content is unchecked.

        Raises:
            AdapterNotFoundError: the source lacks a required file.
            AdapterSourceError: access is refused, a redirect leads astray, or an optional package is missing.
            AdapterMemoryError: more than `max_bytes`.
            AdapterUnreadableError: the network or the store failed, time ran out, or `close` was called.
        """
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
            directory = Path(tempfile.mkdtemp(prefix="fetch-", dir=self._incoming))
        except OSError:
            raise AdapterUnreadableError("The server could not make a directory for the download.") from None
        try:
            self._download(source, directory)
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def close(self) -> None:
        """Break off what is under way, and refuse what comes later."""
        with self._lock:
            self._is_closed = True
            runs = list(self._runs)
        for run in runs:
            run.stop()

    def _download(self, source: RemoteSource, directory: Path) -> None:
        opener = _opener(source)

        async def main() -> None:
            async with opener(source) as folder:
                await fetch_files(folder, source.uri, directory, self._max_bytes)

        run = BoundedRun(main, self._timeout_s)
        try:
            with self._registered(run):
                run.run()
        except ServingError:
            raise
        except TimeoutError:
            raise AdapterUnreadableError(
                f"{source.uri} was not fetched within {self._timeout_s:g} s (--adapter-fetch-timeout-s)."
            ) from None
        except StoppedError:
            raise AdapterUnreadableError(f"{source.uri} was not fetched: the server is shutting down.") from None
        except Exception as error:
            # Without its text, which may hold a signed URL.
            frames = "".join(traceback.format_tb(error.__traceback__))
            _log.error("adapter_fetch_broke", uri=source.uri, error=type(error).__name__, frames=frames)
            raise AdapterUnreadableError(
                f"{source.uri} could not be fetched; the server's log has the cause."
            ) from None

    @contextmanager
    def _registered(self, run: BoundedRun) -> Iterator[None]:
        with self._lock:
            if self._is_closed:
                raise StoppedError
            self._runs.add(run)
        try:
            yield
        finally:
            with self._lock:
                self._runs.discard(run)


def _opener(source: RemoteSource) -> Opener:
    """What opens this kind of source. Imports aiohttp, s3fs or gcsfs when the first one needs it.

    Raises:
        AdapterSourceError: it is not installed.
    """
    scheme = source.location.scheme
    try:
        if scheme == "hf":
            from .hub_folder import open_hub_folder

            return open_hub_folder
        if scheme in ("http", "https"):
            from .http_folder import open_http_folder

            return open_http_folder
        from .object_folder import check_installed, open_object_folder

        check_installed(scheme)
        return open_object_folder
    except ModuleNotFoundError:
        raise AdapterSourceError(
            f"{scheme}:// needs packages that this server lacks; install them with "
            "pip install 'lorikeet-server[remote]'."
        ) from None
