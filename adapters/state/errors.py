"""The error of the state directory. Imports no torch."""

from ..errors import Code, ServingError


class AdapterStateError(ServingError):
    """The state directory failed or cannot be used: nothing is acknowledged that would not survive a restart.

    Those raised while the directory is opened are for the operator and name its path; later ones may reach a client.
    """

    code = Code.UNAVAILABLE
    reason = "ADAPTER_STATE"
