"""Where the server listens by default, how an address is written, and whether one is free. Imports nothing heavy."""

import socket

from .errors import ConfigError

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 50051
DEFAULT_METRICS_PORT = 9464
DEFAULT_ADDRESS = f"{DEFAULT_HOST}:{DEFAULT_PORT}"


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def cannot_listen(what: str, host: str, port: int, flag_prefix: str) -> ConfigError:
    """The error for an address that cannot be listened on.

    Args:
        what: who wanted to listen.
        host, port: where.
        flag_prefix: of the two flags that change it: "--" or "--metrics-".
    """
    return ConfigError(
        f"{what} cannot listen on {join_address(host, port)}: the port is in use, not allowed, or the address is not "
        f"one of this machine. Choose others with {flag_prefix}host and {flag_prefix}port (0: any free port)."
    )


def require_free(what: str, host: str, port: int, flag_prefix: str) -> None:
    """Listen for a moment, so that a server fails before it loads a model and not after.

    Args: as for `cannot_listen`.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
    except OSError as error:
        raise cannot_listen(what, host, port, flag_prefix) from error
