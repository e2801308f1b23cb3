"""Errors of the serving process; the root of the tree and the adapter branch live in `adapters/errors.py`."""

from ..adapters.errors import Code, ServingError


class BadRequestError(ServingError):
    """A parameter is missing, contradictory or out of range."""

    code = Code.INVALID_ARGUMENT
    reason = "BAD_REQUEST"


class PromptTooLongError(BadRequestError):
    """Prompt plus max_tokens exceeds the context, or the prompt can never fit into the KV cache."""

    reason = "PROMPT_TOO_LONG"


class QueueFullError(ServingError):
    """Too many requests are waiting."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class AdapterQueueFullError(ServingError):
    """As many requests of this adapter are waiting as may wait (`max_waiting` of its limits)."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "ADAPTER_QUEUE_FULL"


class AdapterRateError(ServingError):
    """The adapter has used its tokens up (`tokens_per_minute` of its limits); `retry_after_s` says until when."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "ADAPTER_RATE"


class ClientNotAllowedError(ServingError):
    """The policy does not let this client do that; says nothing about whether what it named exists."""

    code = Code.PERMISSION_DENIED
    reason = "CLIENT_NOT_ALLOWED"


class MergeNotConfiguredError(ServingError):
    """The server was not told where merged models go."""

    code = Code.FAILED_PRECONDITION
    reason = "MERGE_NOT_CONFIGURED"


class MergeQueueFullError(ServingError):
    """Too many merges are waiting."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "MERGE_QUEUE_FULL"


class OperationNotFoundError(ServingError):
    """There is no operation of that name, not any more, or not for this client."""

    code = Code.NOT_FOUND
    reason = "OPERATION_NOT_FOUND"


class OperationNotDoneError(ServingError):
    """The operation has to end first."""

    code = Code.FAILED_PRECONDITION
    reason = "OPERATION_NOT_DONE"


class DrainingError(ServingError):
    """The server is shutting down and accepts nothing new."""

    code = Code.UNAVAILABLE
    reason = "DRAINING"


class EngineDeadError(ServingError):
    """The step loop ended with an unexpected error; the process is about to exit."""

    code = Code.UNAVAILABLE
    reason = "ENGINE_DEAD"


class DeadlineError(ServingError):
    """The request's deadline passed before it ended."""

    code = Code.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class CancelledError(ServingError):
    """The client cancelled the request."""

    code = Code.CANCELLED
    reason = "CANCELLED"


class BaseModelError(ServingError):
    """The base model cannot be loaded or served; raised at start, printed by the CLI without a traceback."""

    code = Code.FAILED_PRECONDITION
    reason = "BASE_MODEL"


class ConfigError(ServingError):
    """A flag, environment variable or TOML key is unknown or out of range; printed by the CLI without a traceback."""

    code = Code.INVALID_ARGUMENT
    reason = "CONFIG"
