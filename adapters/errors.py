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
    PERMISSION_DENIED = "PERMISSION_DENIED"
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
    """The name is taken: an alias may not be called like an adapter, nor an adapter like an alias."""

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


class AdapterCompositionError(ServingError):
    """These adapters, or these weights, cannot answer together."""

    code = Code.FAILED_PRECONDITION
    reason = "ADAPTER_COMPOSITION"


class AdapterDigestError(ServingError):
    """The digest prefix of a reference `id@digest-prefix` is malformed or fits several versions."""

    code = Code.INVALID_ARGUMENT
    reason = "ADAPTER_DIGEST_INVALID"


class AdapterInUseError(ServingError):
    """The call would take away what a pin or an alias holds; lift that first."""

    code = Code.FAILED_PRECONDITION
    reason = "ADAPTER_IN_USE"


class AdapterNoVersionError(ServingError):
    """There is no earlier version to go back to, or its content is not kept any more."""

    code = Code.FAILED_PRECONDITION
    reason = "ADAPTER_NO_VERSION"


class AdapterMismatchError(ServingError):
    """The content is not what the caller expected (`expected_version`), or what the server had read before."""

    code = Code.FAILED_PRECONDITION
    reason = "ADAPTER_MISMATCH"


class AdapterProofError(ServingError):
    """The adapter's golden file was replayed, and its logits are off."""

    code = Code.FAILED_PRECONDITION
    reason = "ADAPTER_PROOF_FAILED"


class AdapterSourceError(ServingError):
    """The source is not a path or URI that this server may load from."""

    code = Code.INVALID_ARGUMENT
    reason = "ADAPTER_SOURCE_INVALID"


class AdapterUnreadableError(ServingError):
    """A disk or a remote store failed while the adapter was read; the same call may succeed later."""

    code = Code.UNAVAILABLE
    reason = "ADAPTER_UNREADABLE"


class AdapterMemoryError(ServingError):
    """The adapter does not fit into the configured byte budget, or the device or host had no memory left for it."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "ADAPTER_MEMORY"


class AdapterNotReadyError(ServingError):
    """The adapter did not come to the tier that was asked for in time."""

    code = Code.DEADLINE_EXCEEDED
    reason = "ADAPTER_NOT_READY"


class AdapterUnloadedError(ServingError):
    """The adapter version went away (drain deadline) before the request could end."""

    code = Code.UNAVAILABLE
    reason = "ADAPTER_UNLOADED"
