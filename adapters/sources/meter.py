"""What is known of one file while it comes: how much there is, how much may come, how far it is."""

import time
from typing import Final

import structlog

from ..errors import AdapterMemoryError
from .failures import TransferError

# A download that takes longer than this is reported at every tenth.
PROGRESS_AFTER_S: Final = 5.0

_log = structlog.get_logger(__name__)


class Meter:
    """Counts the bytes of one file. Used by one thread.

    Args:
        file: its name.
        uri: of its folder, for messages.
        limit: most bytes that may come.

    Attributes:
        received: bytes of the attempt under way.
    """

    def __init__(self, file: str, uri: str, limit: int) -> None:
        self.received = 0
        self._file = file
        self._uri = uri
        self._limit = limit
        self._announced: int | None = None
        self._started = time.monotonic()
        self._tenths = 0

    def begin(self, announced: int | None) -> None:
        """An attempt starts; the sender says how many bytes will come, or nothing.

        Raises:
            AdapterMemoryError: too many.
        """
        self._announced = announced
        self.received = 0
        if announced is not None and announced > self._limit:
            raise self._too_large(f"{announced} bytes")

    def add(self, count: int) -> None:
        """Bytes came, and may be kept.

        Raises:
            AdapterMemoryError: more than the limit, whatever was announced.
        """
        self.received += count
        if self.received > self._limit:
            raise self._too_large(f"more than {self._limit} bytes")
        self._report()

    def finish(self) -> None:
        """The sender says that this was all.

        Raises:
            TransferError: it had announced another number of bytes.
        """
        if self._announced is not None and self.received != self._announced:
            raise TransferError(f"{self.received} of {self._announced} announced bytes came")

    def _report(self) -> None:
        if not self._announced:
            return
        tenths = self.received * 10 // self._announced
        if tenths > self._tenths and time.monotonic() - self._started >= PROGRESS_AFTER_S:
            _log.info(
                "adapter_fetch_progress",
                uri=self._uri,
                file=self._file,
                percent=tenths * 10,
                received_bytes=self.received,
                total_bytes=self._announced,
            )
        self._tenths = max(self._tenths, tenths)

    def _too_large(self, size: str) -> AdapterMemoryError:
        return AdapterMemoryError(
            f"{self._file} of {self._uri} has {size}; at most {self._limit} are fetched here (--adapter-fetch-bytes is "
            "the limit for the files of one adapter).",
            {"file": self._file},
        )
