"""The RPCs of AdapterService that are about aliases. Runs on the event loop's thread, what may block on others."""

import structlog

from ..adapters.info import AliasInfo
from ..adapters.paths import check_adapter_id
from ..protos.v1 import adapters_pb2 as pb
from ..protos.v1.adapters_pb2_grpc import AdapterServiceServicer
from .access import Access
from .adapter_management import AdapterManagement
from .convert_adapter import alias_message, alias_targets
from .field_errors import blaming
from .interceptors import Context
from .paging import Key, Page, read_page_request
from .workers import Workers

# What takes the manager's lock and at most writes a row of its state.
QUICK_THREADS = 8
# What may read versions that were replaced, from the server's own copies: a moment, unlike loads from anywhere.
STORED_THREADS = 4


class AliasService(AdapterServiceServicer):
    """Aliases: names that lead to versions.

    Args:
        manager: does the work.
        access: decides what each client may do.
    """

    def __init__(self, manager: AdapterManagement, access: Access) -> None:
        self._manager = manager
        self._access = access
        self._quick = Workers("adapter-quick-rpc", QUICK_THREADS)
        self._stored = Workers("adapter-stored-rpc", STORED_THREADS)

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        """Create an alias, or move it."""
        name = self._alias_to_change("alias.name", request.alias.name)
        targets = alias_targets(request.alias)
        for target in targets:
            # It gives the target to whoever may use the alias, and keeps it from being unloaded.
            self._access.may_manage(target.name)
        asked = [(target.reference, target.weight) for target in targets]
        with blaming("alias.targets"):
            alias = await self._stored.run(lambda: self._manager.set_alias(name, asked))
        return pb.SetAliasResponse(alias=alias_message(alias))

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> pb.DeleteAliasResponse:
        """Make an alias unknown to later requests."""
        name = self._alias_to_change("name", request.name)
        await self._quick.run(lambda: self._manager.delete_alias(name))
        return pb.DeleteAliasResponse()

    async def ListAliases(self, request: pb.ListAliasesRequest, context: Context) -> pb.ListAliasesResponse:
        """Describe all aliases, a page at a time."""
        asked = read_page_request(request.page_size, request.page_token, ("",))

        def page() -> Page[AliasInfo]:
            visible = (alias for alias in self._manager.list_aliases() if self._access.may_see(alias.name))
            return asked.of(visible, _key)

        found = await self._quick.run(page)
        return pb.ListAliasesResponse(
            aliases=[alias_message(alias) for alias in found.items], next_page_token=found.next_token
        )

    def _alias_to_change(self, field: str, name: str) -> str:
        with blaming(field):
            check_adapter_id(name)
        structlog.contextvars.bind_contextvars(alias=name)
        self._access.may_manage(name)
        return name


def _key(alias: AliasInfo) -> Key:
    return (alias.name,)
