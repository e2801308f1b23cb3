"""The policy in force, and how another one takes its place."""

import threading
from collections.abc import Callable
from pathlib import Path

import structlog

from ..engine.limits import AdapterLimits
from ..errors import ConfigError
from ..interceptors import current_client
from .document import read_document
from .policy import Policy

log = structlog.stdlib.get_logger(__name__)


class PolicyHolder:
    """Answers by the policy in force; implements `Access` (for the client of the current call) and `LimitsOf`.

    Args:
        path: the policy file; None: everybody may do everything, without caps.

    Attributes:
        on_change: called after another policy has come into force, on the thread of `reload`.

    Raises:
        ConfigError: the file cannot be read or is wrong. A server does not start open to all by mistake.
    """

    def __init__(self, path: Path | None) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._path = path
        self._policy = Policy() if path is None else Policy(read_document(path))
        self._reloading = threading.Lock()

    @property
    def policy(self) -> Policy:
        """The policy in force; each is immutable."""
        return self._policy

    def reload(self) -> bool:
        """Read the file again. A file that is wrong changes nothing, and the log says why. Reads a disk; any thread.

        Returns:
            Whether what the file says is in force.
        """
        with self._reloading:
            if self._path is None:
                log.info("policy_not_reloaded", reason="The server has no policy file.")
                return True
            try:
                self._policy = Policy(read_document(self._path))
            except ConfigError as error:
                log.error("policy_not_reloaded", reason=error.message)
                return False
            log.info("policy_reloaded", path=str(self._path))
            self.on_change()
            return True

    def limits(self, adapter_id: str) -> AdapterLimits:
        """The limits of an adapter, by its id; "" is the base."""
        return self._policy.limits(adapter_id)

    def may_use(self, name: str) -> None:
        """Raise ClientNotAllowedError unless the client of this call may send requests to what is called so."""
        self._policy.may_use(current_client.get(), name)

    def may_manage(self, name: str) -> None:
        """Raise ClientNotAllowedError unless the client of this call may load, unload, pin or move it."""
        self._policy.may_manage(current_client.get(), name)

    def may_see(self, name: str) -> bool:
        """Whether the client of this call may know what is called so."""
        return self._policy.may_list(current_client.get(), name)
