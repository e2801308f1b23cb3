"""`s3://` and `gs://`: a prefix in a bucket, read with fsspec's file systems (s3fs, gcsfs).

Both are asynchronous underneath and are used so, on the loop of one fetch: cancelling it closes their connections.
Credentials, endpoints and regions come from where those libraries look for them (AWS_* and GOOGLE_* variables, profile
files, the machine's role, FSSPEC_S3_* and FSSPEC_GS_*).
"""

import errno
import importlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

from ..errors import ServingError
from .failures import AccessError, MissingFileError, TransferError, storage_failure
from .locate import RemoteSource
from .meter import Meter

_log = structlog.get_logger(__name__)


class _Kind(NamedTuple):
    """What differs between the stores.

    Attributes:
        module, name: the class.
        options: for its constructor.
        fetch_options: for reading a file.
        session: attribute of its session, None before the first request.
        refusals: (module, class) of exceptions that mean: no credentials, or none that work.
        mark: of a file's description.
    """

    module: str
    name: str
    options: Mapping[str, Any]
    fetch_options: Mapping[str, Any]
    session: str
    refusals: tuple[tuple[str, str], ...]
    mark: Callable[[Mapping[str, Any]], object]


_KINDS: Final = {
    "s3": _Kind(
        module="s3fs",
        name="S3FileSystem",
        options={"config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 15, "read_timeout": 30}},
        fetch_options={"max_concurrency": 1},
        session="_s3",
        refusals=(
            ("botocore.exceptions", "NoCredentialsError"),
            ("botocore.exceptions", "PartialCredentialsError"),
            ("botocore.exceptions", "CredentialRetrievalError"),
            ("botocore.exceptions", "TokenRetrievalError"),
            ("botocore.exceptions", "SSOError"),
        ),
        mark=lambda info: info.get("ETag"),
    ),
    # Its core class: the one that gcsfs exports first asks a second service over gRPC what kind of bucket it is.
    "gs": _Kind(
        module="gcsfs.core",
        name="GCSFileSystem",
        options={"access": "read_only", "requests_timeout": 30},
        fetch_options={"concurrency": 1},
        session="_session",
        refusals=(("google.auth.exceptions", "GoogleAuthError"),),
        mark=lambda info: info.get("generation") or info.get("etag"),
    ),
}


class ObjectFolder:
    """An opened prefix; see transfer.RemoteFolder."""

    def __init__(self, source: RemoteSource) -> None:
        self._path = "/".join((source.location.authority, *source.location.path))
        self._kind = kind = _KINDS[source.location.scheme]
        self._system: Any = None
        self._refusals = tuple(getattr(importlib.import_module(m), name) for m, name in kind.refusals)

    async def fetch(self, name: str, target: Path, meter: Meter) -> str | None:
        """Get one object."""
        mark, size = await self._describe(name)
        meter.begin(size)
        with self._translated():
            await self._system._get_file(
                f"{self._path}/{name}", str(target), callback=_Callback(meter), **self._kind.fetch_options
            )
        meter.finish()
        return mark

    async def mark(self, name: str) -> str | None:
        """Its entity tag or generation."""
        return (await self._describe(name))[0]

    async def _describe(self, name: str) -> tuple[str | None, int]:
        with self._translated():
            if self._system is None:
                self._system = self._create_system()  # may ask for credentials, and then blocks this fetch's thread
            info = await self._system._info(f"{self._path}/{name}")
        if info.get("type") != "file":
            raise MissingFileError
        mark = self._kind.mark(info)
        return None if mark is None else str(mark), int(info["size"])

    async def close(self) -> None:
        """Close the connections."""
        session = getattr(self._system, self._kind.session, None)
        if session is not None:
            await session.close()

    def _create_system(self) -> Any:
        create = getattr(importlib.import_module(self._kind.module), self._kind.name)
        system = create(asynchronous=True, skip_instance_cache=True, use_listings_cache=False, **self._kind.options)
        system.retries = 1  # further attempts are made in one place, transfer.py
        return system

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what these libraries raise into our failures. Their texts stay here: they may hold signed URLs."""
        try:
            yield
        except (ServingError, MissingFileError, AccessError, TransferError):
            raise
        except FileNotFoundError:
            raise MissingFileError from None
        except (PermissionError, *self._refusals):
            raise AccessError from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise storage_failure() from None
            # gcsfs: a plain OSError for 403, its HttpError for 401.
            if str(error).startswith("Forbidden") or getattr(error, "code", None) in (401, 403):
                raise AccessError from None
            _log.info("adapter_store_error", store=self._kind.module, error=type(error).__name__)
            raise TransferError("the store did not answer as it should, or the connection failed") from None


class _Callback:
    """The part of fsspec's Callback that is called for one file."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def set_size(self, size: int | None) -> None:
        """An attempt of the library begins."""
        self._meter.begin(size)

    def relative_update(self, count: int = 1) -> None:
        """Bytes were written."""
        self._meter.add(count)


@asynccontextmanager
async def open_object_folder(source: RemoteSource) -> AsyncIterator[ObjectFolder]:
    """Open a prefix of a bucket; connects at the first file."""
    folder = ObjectFolder(source)
    try:
        yield folder
    finally:
        await folder.close()


def check_installed(scheme: str) -> None:
    """Import what a scheme needs; the first time takes a second.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    importlib.import_module(_KINDS[scheme].module)
