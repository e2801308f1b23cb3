"""google.longrunning.Operations for merges: how far they are, and their end. Runs on the event loop's thread."""

import asyncio
import contextlib
from typing import Final

import structlog
from google.longrunning import operations_pb2  # type: ignore[import-untyped]
from google.longrunning.operations_pb2_grpc import OperationsServicer  # type: ignore[import-untyped]
from google.protobuf.empty_pb2 import Empty

from ..adapters.errors import ServingError
from .access import Access, OpenAccess
from .convert_merge import operation_message
from .errors import BadRequestError
from .interceptors import Context
from .merge_operations import MergeOperation, MergeOperations, unknown
from .paging import Key, read_page_request

COLLECTION: Final = "operations"
# How long WaitOperation waits at most; then its client asks again.
MAX_WAIT_S: Final = 300.0


class OperationsService(OperationsServicer):  # type: ignore[misc]
    """google.longrunning.Operations for the merges of a MergeService.

    Args:
        operations: all of them.
        access: decides of which a client knows.
    """

    def __init__(self, operations: MergeOperations, access: Access | None = None) -> None:
        self._operations = operations
        self._access = OpenAccess() if access is None else access

    async def GetOperation(
        self, request: operations_pb2.GetOperationRequest, context: Context
    ) -> operations_pb2.Operation:
        """How far a merge is."""
        return operation_message(self._find(request.name))

    async def ListOperations(
        self, request: operations_pb2.ListOperationsRequest, context: Context
    ) -> operations_pb2.ListOperationsResponse:
        """All merges in the order in which they were asked for, a page at a time."""
        if request.name not in ("", COLLECTION):
            raise BadRequestError(f"name is {request.name[:128]!r}; allowed: {COLLECTION!r}.", {"field": "name"})
        if request.filter:
            raise BadRequestError("filter is not supported; leave it empty.", {"field": "filter"})
        asked = read_page_request(request.page_size, request.page_token, ("",))
        page = asked.of((each for each in self._operations.all() if self._may_know(each)), _key)
        return operations_pb2.ListOperationsResponse(
            operations=[operation_message(each) for each in page.items], next_page_token=page.next_token
        )

    async def WaitOperation(
        self, request: operations_pb2.WaitOperationRequest, context: Context
    ) -> operations_pb2.Operation:
        """How far a merge is once it is done, or the time is over."""
        operation = self._find(request.name)
        timeout_s = request.timeout.ToTimedelta().total_seconds() if request.HasField("timeout") else MAX_WAIT_S
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(operation.over.wait(), max(0.0, min(timeout_s, MAX_WAIT_S)))
        return operation_message(operation)

    async def CancelOperation(self, request: operations_pb2.CancelOperationRequest, context: Context) -> Empty:
        """Let a merge end; nothing of it is left soon after. Nothing happens if it has ended."""
        self._operations.cancel(self._find(request.name))
        return Empty()

    async def DeleteOperation(self, request: operations_pb2.DeleteOperationRequest, context: Context) -> Empty:
        """Forget a merge that has ended; the model that it wrote stays."""
        self._operations.delete(self._find(request.name))
        return Empty()

    def _find(self, name: str) -> MergeOperation:
        structlog.contextvars.bind_contextvars(operation=name[:128])
        operation = self._operations.get(name)
        if not self._may_know(operation):
            raise unknown(name)
        return operation

    def _may_know(self, operation: MergeOperation) -> bool:
        try:
            for name in operation.names:
                self._access.may_manage(name)
        except ServingError:
            return False
        return True


def _key(operation: MergeOperation) -> Key:
    return (f"{operation.number:012}",)
