"""Who may do what with which adapter: what the services ask before they look anything up.

A name is an adapter id or an alias, without `@digest`. The services ask before they look it up, so a client that is
refused cannot tell a name that exists from one that does not.
"""

from typing import Final, Protocol

from ..adapters.errors import AdapterNotFoundError

# Metadata in which a client says who it is, and the environment variable from which our own client takes it.
CLIENT_KEY: Final = "x-lorikeet-client"
CLIENT_ENV: Final = "LORIKEET_CLIENT"
MAX_CLIENT_NAME: Final = 128  # characters


class Access(Protocol):
    """Decides for the client whose call is being served.

    Called in the context of that call (`contextvars`), on the event loop's thread and, for lists, on a thread of a
    pool; it must not block.
    """

    def may_use(self, name: str) -> None:
        """Raise a ServingError unless the client may send requests to what is called so."""
        ...

    def may_manage(self, name: str) -> None:
        """Raise a ServingError unless the client may load, unload, pin or move what is called so."""
        ...

    def may_see(self, name: str) -> bool:
        """Whether the client may know what is called so."""
        ...


class OpenAccess:
    """Every client may do everything."""

    def may_use(self, name: str) -> None:
        """Yes."""

    def may_manage(self, name: str) -> None:
        """Yes."""

    def may_see(self, name: str) -> bool:
        """Yes."""
        return True


def hidden(name: str) -> AdapterNotFoundError:
    """The error for a name that the client may not see, whether it exists or not."""
    return AdapterNotFoundError(f"There is no adapter {name!r} that this client may see.", {"adapter_id": name})


def check_client_name(name: str) -> str:
    """The name, if it can be sent as metadata.

    Raises:
        ValueError: it is empty or too long, or has characters that metadata cannot carry.
    """
    if not 1 <= len(name) <= MAX_CLIENT_NAME or not all("!" <= character <= "~" for character in name):
        raise ValueError(
            f"{name[:128]!r} is no client name; allowed: 1 to {MAX_CLIENT_NAME} printable ASCII characters, no spaces."
        )
    return name
