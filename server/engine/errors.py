"""Errors that only the step loop raises. Imports no torch."""

from ...adapters.errors import Code, ServingError


class DeviceMemoryError(ServingError):
    """The device ran out of memory in a step that this request was part of."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "DEVICE_MEMORY"


class NonFiniteLogitsError(ServingError):
    """The model's output for this request was NaN or infinite."""

    code = Code.INTERNAL
    reason = "NON_FINITE_LOGITS"
