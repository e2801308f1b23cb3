"""`s3://` and `gs://`: a prefix in a bucket, read with fsspec's file systems (s3fs, gcsfs).

Both are asynchronous underneath and are used so, on the loop of one fetch: cancelling it closes their connections.
Credentials, endpoints and regions come from where those libraries look for them (AWS_* and GOOGLE_* variables, profile
files, the machine's role, FSSPEC_S3_* and FSSPEC_GS_*).
"""

import errno
import functools
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
from .transfer import CONNECT_S, STALL_S

_log = structlog.get_logger(__name__)


class _Kind(NamedTuple):
    """What differs between the stores.

    Attributes:
        module: to be imported.
        create: makes the file system.
        fetch_options: for reading a file.
        session: attribute of its session, None before the first request.
        refusals: (module, class) of exceptions that mean: no credentials, or none that work.
        mark: of a file's description.
    """

    module: str
    create: Callable[[], Any]
    fetch_options: Mapping[str, Any]
    session: str
    refusals: tuple[tuple[str, str], ...]
    mark: Callable[[Mapping[str, Any]], object]


def _create_s3() -> Any:
    session = importlib.import_module("aiobotocore.session").AioSession()
    session.register_component("data_loader", _s3_models())
    system = importlib.import_module("s3fs").S3FileSystem(
        session=session,
        config_kwargs={"retries": {"total_max_attempts": 1}, "connect_timeout": CONNECT_S, "read_timeout": STALL_S},
        **_COMMON,
    )
    system.retries = 1  # further attempts are made in one place, transfer.py
    return system


@functools.cache
def _s3_models() -> Any:
    """What botocore knows of S3. Parsing that, megabytes of JSON, holds up all other threads: once, not each time."""
    return importlib.import_module("aiobotocore.session").AioSession().get_component("data_loader")


def _create_gs() -> Any:
    aiohttp = importlib.import_module("aiohttp")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S)
    # The core class: the one that gcsfs exports first asks a second service over gRPC what kind of bucket it is.
    return importlib.import_module("gcsfs.core").GCSFileSystem(access="read_only", requests_timeout=timeout, **_COMMON)


# Instances belong to one event loop, which ends with the fetch; nothing is listed.
_COMMON: Final = {"asynchronous": True, "skip_instance_cache": True, "use_listings_cache": False}
_KINDS: Final = {
    "s3": _Kind(
        module="s3fs",
        create=_create_s3,
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
    "gs": _Kind(
        module="gcsfs.core",
        create=_create_gs,
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
                self._system = self._kind.create()  # may ask for credentials, and then blocks this fetch's thread
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
