"""ServingError to gRPC status and back: the code, the message and the google.rpc details that clients can act on."""

import contextlib
from dataclasses import dataclass, field

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import (  # type: ignore[import-untyped]
    BadRequest,
    ErrorInfo,
    RequestInfo,
    RetryInfo,
)
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

from ..adapters.errors import ServingError

DOMAIN = "lorikeet"
DETAILS_KEY = "grpc-status-details-bin"

# Trailing metadata above 8 KiB is refused by gRPC's clients, and the message travels twice in it.
MAX_MESSAGE_LENGTH = 2000
MAX_METADATA_LENGTH = 200


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    """What an RPC that failed ends with."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def error_status(error: ServingError, request_id: str) -> ErrorStatus:
    """The status of an error, with ErrorInfo and RequestInfo.

    BadRequest is added where `metadata["field"]` blames a field, RetryInfo where `metadata["retry_after_s"]` says when
    to try again.

    Args:
        error: its message is written for the client; see adapters/errors.py.
        request_id: goes into RequestInfo, so that a client can quote it.
    """
    status = status_message(error, request_id)
    code = grpc.StatusCode[error.code.value]
    return ErrorStatus(code, status.message, ((DETAILS_KEY, status.SerializeToString()),))


def status_message(error: ServingError, request_id: str) -> Status:
    """The same as a message."""
    code = grpc.StatusCode[error.code.value]
    message = _shorten(error.message, MAX_MESSAGE_LENGTH)
    status = Status(code=code.value[0], message=message)
    metadata = {key: _shorten(value, MAX_METADATA_LENGTH) for key, value in error.metadata.items()}
    status.details.add().Pack(ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    if "field" in metadata:
        violation = BadRequest.FieldViolation(
            field=metadata["field"], description=_shorten(message, MAX_METADATA_LENGTH)
        )
        status.details.add().Pack(BadRequest(field_violations=[violation]))
    if "retry_after_s" in metadata:
        delay = Duration()
        delay.FromMilliseconds(round(float(metadata["retry_after_s"]) * 1000))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    status.details.add().Pack(RequestInfo(request_id=request_id))
    return status


@dataclass(slots=True)
class RemoteError(Exception):
    """A server's answer that is not OK, as a client sees it.

    Attributes:
        code: gRPC status code name, such as NOT_FOUND.
        reason: ErrorInfo reason, such as ADAPTER_NOT_FOUND; empty when the server sent none (an unreachable server).
        message: for people.
        metadata: ErrorInfo metadata.
        request_id: to look for in the server's log.
    """

    code: str
    message: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    request_id: str = ""

    def __str__(self) -> str:
        """`CODE (REASON): message`."""
        return f"{self.code}{f' ({self.reason})' if self.reason else ''}: {self.message}"


def remote_error(error: grpc.RpcError) -> RemoteError:
    """Read the status of a failed call.

    Args:
        error: what a call of a sync or async channel raised.
    """
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    found = RemoteError(error.code().name, error.details() or "")
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            with contextlib.suppress(DecodeError):
                _read_details(found, Status.FromString(value))
    return found


def operation_error(status: Status) -> RemoteError:
    """Read the status of an operation that failed."""
    (code,) = (code.name for code in grpc.StatusCode if code.value[0] == status.code)
    found = RemoteError(code, status.message)
    _read_details(found, status)
    return found


def _read_details(error: RemoteError, status: Status) -> None:
    for detail in status.details:
        info, request = ErrorInfo(), RequestInfo()
        if detail.Unpack(info):
            error.reason, error.metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(request):
            error.request_id = request.request_id


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
