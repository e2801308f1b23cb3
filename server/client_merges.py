"""The calls of a client that merge adapters on a server, and follow that; `LorikeetClient.merges`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypedDict, Unpack

import grpc
from google.longrunning import operations_pb2 as pb  # type: ignore[import-untyped]
from google.longrunning.operations_pb2_grpc import OperationsStub  # type: ignore[import-untyped]
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from ..protos.v1 import merges_pb2
from ..protos.v1.merges_pb2_grpc import MergeServiceStub
from .status import operation_error

Call = Callable[[Callable[..., Any], Message], Any]
OnProgress = Callable[[merges_pb2.MergeProgress], None]
# Between two looks at a merge that is being followed.
_LOOK_S: Final = 2.0


class MergeOptions(TypedDict, total=False):
    """Keyword arguments of a merge; each is the field of that name in merges.proto, which documents it."""

    onto: Literal["original", "nf4"]
    to: Literal["bf16", "fp32", "nf4", "autoround", "awq", "gptq"]
    calibration: str
    iterations: int
    texts: Sequence[str]
    unverified: bool
    accept_loss: bool
    allow_other_base: bool


class MergeCalls:
    """See the module. Every method raises RemoteError when the server answers with an error or not at all.

    Args:
        channel: to the server.
        call: makes a call of a stub with the client's deadline and metadata.
    """

    def __init__(self, channel: grpc.Channel, call: Call) -> None:
        self._call = call
        # The stubs' types know the async channel only.
        self._merges: Any = MergeServiceStub(channel)
        self._operations: Any = OperationsStub(channel)

    def start(
        self, adapters: Mapping[str, float] | Sequence[tuple[str, float]], output: str, **options: Unpack[MergeOptions]
    ) -> pb.Operation:
        """Begin a merge.

        Args:
            adapters: an id, an alias with one target or `id@digest-prefix` of each, and what it is multiplied by.
            output: what the model's directory is called below the server's `--merge-dir`.
            options: other fields of the request.
        """
        pairs = adapters.items() if isinstance(adapters, Mapping) else adapters
        fields: dict[str, Any] = dict(options)
        if "onto" in fields:
            fields["onto"] = merges_pb2.MergeOnto.Value(f"MERGE_ONTO_{fields['onto'].upper()}")
        if "to" in fields:
            fields["to"] = merges_pb2.MergeTarget.Value(f"MERGE_TARGET_{fields['to'].upper()}")
        request = merges_pb2.MergeAdapterRequest(
            adapters=[merges_pb2.MergeMember(adapter_id=reference, weight=weight) for reference, weight in pairs],
            output=output,
            **fields,
        )
        return self._call(self._merges.MergeAdapter, request)

    def get(self, name: str) -> pb.Operation:
        """How far a merge is."""
        return self._call(self._operations.GetOperation, pb.GetOperationRequest(name=name))

    def wait(self, name: str, timeout_s: float | None = None) -> pb.Operation:
        """How far a merge is once it is done or the time is over, which the server limits, too."""
        request = pb.WaitOperationRequest(name=name)
        if timeout_s is not None:
            timeout = Duration()
            timeout.FromMilliseconds(round(1000 * timeout_s))
            request.timeout.CopyFrom(timeout)
        return self._call(self._operations.WaitOperation, request)

    def list(self) -> list[pb.Operation]:
        """All merges that the server remembers, in the order in which they were begun; fetches every page."""
        found: list[pb.Operation] = []
        token = ""
        while True:
            page = self._call(self._operations.ListOperations, pb.ListOperationsRequest(page_token=token))
            found.extend(page.operations)
            token = page.next_page_token
            if not token:
                return found

    def cancel(self, name: str) -> None:
        """Let a merge end; nothing of it is left soon after."""
        self._call(self._operations.CancelOperation, pb.CancelOperationRequest(name=name))

    def delete(self, name: str) -> None:
        """Forget a merge that is done; its model stays."""
        self._call(self._operations.DeleteOperation, pb.DeleteOperationRequest(name=name))

    def follow(
        self, operation: pb.Operation, on_progress: OnProgress = lambda progress: None
    ) -> merges_pb2.MergeReport:
        """Wait until a merge is done.

        Args:
            operation: as `start` or `get` answered.
            on_progress: called every two seconds.

        Raises:
            RemoteError: it failed or was cancelled, too.
        """
        while True:
            on_progress(progress_of(operation))
            if operation.done:
                return report_of(operation)
            operation = self.wait(operation.name, _LOOK_S)


def progress_of(operation: pb.Operation) -> merges_pb2.MergeProgress:
    """How far a merge is."""
    progress = merges_pb2.MergeProgress()
    operation.metadata.Unpack(progress)
    return progress


def report_of(operation: pb.Operation) -> merges_pb2.MergeReport:
    """What a merge that is done has written.

    Raises:
        RemoteError: it failed or was cancelled.
    """
    if operation.HasField("error"):
        raise operation_error(operation.error)
    report = merges_pb2.MergeReport()
    operation.response.Unpack(report)
    return report
