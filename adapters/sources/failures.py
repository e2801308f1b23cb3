"""How fetching one file can fail, whatever the protocol. `transfer.py` turns these into what a client sees."""

from ..errors import AdapterUnreadableError


class MissingFileError(Exception):
    """The folder has no file of that name."""


class AccessError(Exception):
    """The store wants other credentials than it got."""


class TransferError(Exception):
    """It did not work this time. The message is for clients: a short clause without URLs or foreign text."""


def storage_failure() -> AdapterUnreadableError:
    """The error of a download that could not be written to the local disk."""
    return AdapterUnreadableError("The server could not write the download to its disk; is that full?")
