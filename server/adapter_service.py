"""AdapterService on top of the adapter manager. Runs on the event loop's thread, what may block in a thread pool."""

import asyncio
import base64
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import structlog

from ..adapters.info import AdapterInfo, AdapterState
from ..adapters.paths import check_adapter_id
from ..protos.v1 import adapters_pb2 as pb
from ..protos.v1.adapters_pb2_grpc import AdapterServiceServicer
from .convert_adapter import adapter_message
from .errors import BadRequestError
from .interceptors import Context

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
# Loads read disks and hash; two at a time keep a slow one from holding up the rest without flooding the disk.
NUM_THREADS = 2

Key = tuple[str, bool, str]

T = TypeVar("T")


class AdapterManagement(Protocol):
    """What is used of the adapter manager. All may block and may be called on any thread."""

    def load(self, adapter_id: str, path: Path | None) -> AdapterInfo:
        """Read, check and publish an adapter."""
        ...

    def unload(self, adapter_id: str) -> None:
        """Make an adapter unknown to later requests."""
        ...

    def get(self, adapter_id: str) -> AdapterInfo:
        """Describe one adapter."""
        ...

    def list(self) -> Sequence[AdapterInfo]:
        """Describe all adapters."""
        ...


class AdapterService(AdapterServiceServicer):
    """The RPCs of AdapterService.

    Args:
        manager: does the work.
    """

    def __init__(self, manager: AdapterManagement) -> None:
        self._manager = manager
        self._executor = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="adapter-rpc")

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:
        """Read, check and publish an adapter."""
        check_adapter_id(request.adapter_id)
        path = Path(request.path) if request.path else None
        info = await self._blocking(request.adapter_id, lambda: self._manager.load(request.adapter_id, path))
        return pb.LoadAdapterResponse(adapter=adapter_message(info))

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Context) -> pb.UnloadAdapterResponse:
        """Make an adapter unknown to later requests."""
        check_adapter_id(request.adapter_id)
        await self._blocking(request.adapter_id, lambda: self._manager.unload(request.adapter_id))
        return pb.UnloadAdapterResponse()

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        """Describe one adapter."""
        check_adapter_id(request.adapter_id)
        info = await self._blocking(request.adapter_id, lambda: self._manager.get(request.adapter_id))
        return pb.GetAdapterResponse(adapter=adapter_message(info))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        """Describe all adapters, a page at a time."""
        if not 0 <= request.page_size <= MAX_PAGE_SIZE:
            raise BadRequestError(
                f"page_size is {request.page_size}; allowed: 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}.",
                {"field": "page_size"},
            )
        page_size = request.page_size or DEFAULT_PAGE_SIZE
        after = _read_token(request.page_token)
        infos = await self._blocking("", self._manager.list)
        rest = sorted((info for info in infos if _key(info) > after), key=_key)
        page = rest[:page_size]
        return pb.ListAdaptersResponse(
            adapters=[adapter_message(info) for info in page],
            next_page_token=_page_token(_key(page[-1])) if len(rest) > page_size else "",
        )

    def close(self) -> None:
        """End the threads; what they are doing is finished first."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    async def _blocking(self, adapter_id: str, work: Callable[[], T]) -> T:
        structlog.contextvars.bind_contextvars(adapter=adapter_id)
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def _key(info: AdapterInfo) -> Key:
    """The order of a list: by id, and of one id's versions the one that requests get first."""
    return info.adapter_id, info.state is not AdapterState.READY, info.digest


def _page_token(last: Key) -> str:
    """A page begins after a key, so adapters that come or go in between shift nothing."""
    return base64.urlsafe_b64encode(json.dumps(last).encode()).decode()


def _read_token(token: str) -> Key:
    if not token:
        return "", False, ""
    try:
        adapter_id, old, digest = json.loads(base64.urlsafe_b64decode(token.encode()))
    except ValueError:
        raise BadRequestError(
            "page_token is not one of ours; give next_page_token of the page before, or none.", {"field": "page_token"}
        ) from None
    return str(adapter_id), bool(old), str(digest)
