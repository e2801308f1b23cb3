"""AdapterService on top of the adapter manager. Runs on the event loop's thread, what may block on others.

Every call goes the same way: check the message, ask whether this client may, and only then look anything up. Loads,
waits for a tier, returns to kept versions, and quick calls have threads of their own: none holds up another kind.
"""

import time
from pathlib import Path

import structlog

from ..adapters.info import AdapterInfo
from ..adapters.paths import check_adapter_id
from ..adapters.reference import parse_reference
from ..protos.v1 import adapters_pb2 as pb
from .access import Access, OpenAccess, hidden
from .adapter_management import AdapterManagement
from .alias_service import AliasService
from .call_deadline import call_deadline
from .convert_adapter import (
    adapter_message,
    brief_message,
    digest_prefix,
    load_options,
    load_source,
    plan_message,
    requested_tier,
)
from .field_errors import blaming
from .interceptors import Context
from .paging import Key, Page, read_page_request
from .workers import Workers

# Loads and dry runs fetch, read and hash: a few at a time keep a slow one from holding up the rest without flooding the
# disk.
LOAD_THREADS = 4
# Pins and prefetches mostly wait for memory to become free, which costs a thread and nothing else.
WAIT_THREADS = 32
# How long they wait at most, whatever the client's deadline: the thread of a call that was cancelled is free by then.
MAX_WAIT_S = 300.0
# They give up this much before the client's deadline, or its last tenth, so that the client hears why.
ANSWER_S = 0.2


class AdapterService(AliasService):
    """The RPCs of AdapterService.

    Args:
        manager: does the work.
        access: decides what each client may do; None: everything.
    """

    def __init__(self, manager: AdapterManagement, access: Access | None = None) -> None:
        super().__init__(manager, OpenAccess() if access is None else access)
        self._loads = Workers("adapter-load-rpc", LOAD_THREADS)
        self._waits = Workers("adapter-wait-rpc", WAIT_THREADS)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:
        """Read, check and publish an adapter; with `dry_run`, read and check only."""
        adapter_id = self._adapter_to_manage(request.adapter_id)
        source, options = load_source(request), load_options(request)
        if isinstance(source, Path):
            # Who may manage `mine` may not take the folder of `yours` for it.
            self._access.may_manage(source.name)
        with blaming("source" if request.source else "path" if request.path else "adapter_id"):
            if request.dry_run:
                plan = await self._loads.run(lambda: self._manager.plan_load(adapter_id, source, options))
                return pb.LoadAdapterResponse(
                    adapter=self._message(plan.adapter), plan=plan_message(plan, self._access.may_see)
                )
            info = await self._loads.run(lambda: self._manager.load(adapter_id, source, options))
        return pb.LoadAdapterResponse(adapter=self._message(info))

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Context) -> pb.UnloadAdapterResponse:
        """Make an adapter unknown to later requests."""
        adapter_id = self._adapter_to_manage(request.adapter_id)
        with blaming("adapter_id"):
            await self._quick.run(lambda: self._manager.unload(adapter_id))
        return pb.UnloadAdapterResponse()

    async def RollbackAdapter(self, request: pb.RollbackAdapterRequest, context: Context) -> pb.RollbackAdapterResponse:
        """Make an earlier version current again."""
        adapter_id = self._adapter_to_manage(request.adapter_id)
        prefix = digest_prefix("version", request.version)
        with blaming("version" if prefix else "adapter_id"):
            info = await self._stored.run(lambda: self._manager.rollback(adapter_id, prefix))
        return pb.RollbackAdapterResponse(adapter=self._message(info))

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        """Describe one adapter and all its versions."""
        name = self._name(request.adapter_id)
        if not self._access.may_see(name):
            raise hidden(name)
        with blaming("adapter_id"):
            details = await self._quick.run(lambda: self._manager.describe(request.adapter_id))
        if not self._access.may_see(details.adapter.adapter_id):
            # An alias that this client may see leads to an adapter that it may not.
            raise hidden(name)
        return pb.GetAdapterResponse(
            adapter=self._message(details.adapter), versions=[self._message(version) for version in details.versions]
        )

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        """Describe all adapters, a page at a time."""
        asked = read_page_request(request.page_size, request.page_token, ("", False, "", ""))

        def page() -> Page[AdapterInfo]:
            visible = (info for info in self._manager.list() if self._access.may_see(info.adapter_id))
            return asked.of(visible, _key)

        found = await self._quick.run(page)
        return pb.ListAdaptersResponse(
            adapters=[self._message(info) for info in found.items], next_page_token=found.next_token
        )

    async def PrefetchAdapter(self, request: pb.PrefetchAdapterRequest, context: Context) -> pb.PrefetchAdapterResponse:
        """Bring a version into a tier. A request for it does the same, so who may use it may call this."""
        self._access.may_use(self._name(request.adapter_id))
        tier, deadline = requested_tier(request.tier), call_deadline(context)
        with blaming("adapter_id"):
            info = await self._waits.run(
                lambda: self._manager.prefetch(request.adapter_id, tier, _patience_s(deadline))
            )
        if not self._access.may_see(info.adapter_id):
            # By an alias; that much the answer to a request would tell, too.
            return pb.PrefetchAdapterResponse(adapter=brief_message(info))
        return pb.PrefetchAdapterResponse(adapter=self._message(info))

    async def PinAdapter(self, request: pb.PinAdapterRequest, context: Context) -> pb.PinAdapterResponse:
        """Keep an adapter in a tier."""
        adapter_id = self._adapter_to_manage(request.adapter_id)
        tier, deadline = requested_tier(request.tier), call_deadline(context)
        with blaming("adapter_id"):
            info = await self._waits.run(lambda: self._manager.pin(adapter_id, tier, _patience_s(deadline)))
        return pb.PinAdapterResponse(adapter=self._message(info))

    async def UnpinAdapter(self, request: pb.UnpinAdapterRequest, context: Context) -> pb.UnpinAdapterResponse:
        """Let a pinned adapter be evicted again."""
        adapter_id = self._adapter_to_manage(request.adapter_id)
        with blaming("adapter_id"):
            info = await self._quick.run(lambda: self._manager.unpin(adapter_id))
        return pb.UnpinAdapterResponse(adapter=self._message(info))

    def close(self) -> None:
        """Begin nothing more, and wait for nothing: the manager ends what its callers wait for when it is closed."""
        for workers in (self._quick, self._stored, self._loads, self._waits):
            workers.close()

    def _adapter_to_manage(self, adapter_id: str) -> str:
        """The id of an adapter that this client may manage."""
        with blaming("adapter_id"):
            check_adapter_id(adapter_id)
        structlog.contextvars.bind_contextvars(adapter=adapter_id)
        self._access.may_manage(adapter_id)
        return adapter_id

    def _name(self, reference: str) -> str:
        """What a well-formed reference names, without its version."""
        with blaming("adapter_id"):
            name = parse_reference(reference).name
        structlog.contextvars.bind_contextvars(adapter=reference)
        return name

    def _message(self, info: AdapterInfo) -> pb.Adapter:
        return adapter_message(info, self._access.may_see)


def _patience_s(deadline: float | None) -> float:
    """How many seconds a call may still wait.

    Args:
        deadline: `time.monotonic()` second by which its client wants the answer.
    """
    if deadline is None:
        return MAX_WAIT_S
    remaining = deadline - time.monotonic()
    return max(0.0, min(MAX_WAIT_S, remaining - min(ANSWER_S, remaining / 10)))


def _key(info: AdapterInfo) -> Key:
    """The order of a list: by id, and of one id's versions the one that requests get first."""
    return info.adapter_id, not info.current, info.digest, info.state.value
