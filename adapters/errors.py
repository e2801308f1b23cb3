"""The error tree. Domain code raises these; one gRPC interceptor turns them into a Status with ErrorInfo.

`message` is written for the client: what was given, what is allowed, what to change. Nothing else reaches a client
(`str()` of a foreign exception never does).
"""

from collections.abc import Mapping
from enum import StrEnum


class Code(StrEnum):
    """gRPC status code names, so that code below the service layer needs no grpc import."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


class ServingError(Exception):
    """Root of every error that a client may see.

    Args:
        message: full sentence(s) for the client.
        metadata: ErrorInfo metadata (values are short strings, never secrets or paths outside the adapter roots).
    """

    code: Code = Code.INTERNAL
    reason: str = "INTERNAL"

    def __init__(self, message: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})


class AdapterNotFoundError(ServingError):
    """No adapter of that id is known. Never answered by the base model instead."""

    code = Code.NOT_FOUND
    reason = "ADAPTER_NOT_FOUND"


class AdapterIdError(ServingError):
    """The id does not match `[A-Za-z0-9][A-Za-z0-9._-]{0,127}` or names a path outside the configured roots."""

    code = Code.INVALID_ARGUMENT
    reason = "ADAPTER_ID_INVALID"


class AdapterExistsError(ServingError):
    """The id is taken by an adapter that this call may not replace."""

    code = Code.ALREADY_EXISTS
    reason = "ADAPTER_EXISTS"


class AdapterInvalidError(ServingError):
    """The folder is not a complete, finite, well-formed PEFT checkpoint."""

    code = Code.INVALID_ARGUMENT
    reason = "ADAPTER_INVALID"


class AdapterIncompatibleError(ServingError):
    """A well-formed adapter that this server or this base cannot serve exactly; names the field or tensor."""

    code = Code.FAILED_PRECONDITION
    reason = "ADAPTER_INCOMPATIBLE"


class AdapterMemoryError(ServingError):
    """The adapter can never fit into the configured byte budget."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "ADAPTER_MEMORY"


class AdapterUnloadedError(ServingError):
    """The adapter version went away (drain deadline) before the request could end."""

    code = Code.UNAVAILABLE
    reason = "ADAPTER_UNLOADED"
