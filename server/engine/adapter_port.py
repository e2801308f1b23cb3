"""What the step loop needs from whoever owns the adapters. Imports no torch."""

from collections.abc import Callable
from typing import Protocol

from ...adapters.version import AdapterVersion


class AdapterPort(Protocol):
    """The step thread's view of the adapters; `AdapterManager` is the real one.

    A request's version was pinned (`resolve`) before it was submitted. The scheduler balances every slot returned by
    `try_activate` with one `deactivate`; the engine calls `release` once for each accepted request, at its end.

    For the scheduler's promise that no request starves, an implementation keeps two of its own:

    1. A version with an activation keeps its slot until its last `deactivate`.
    2. When no other version has an activation and none but one is asked for any more, `try_activate` of that one,
       repeated, returns a slot or raises in the end: what was brought in because it was asked for stays for longer than
       a step, but not for ever.

    Attributes:
        on_ready: set by the engine; to be called, from any thread, when a `try_activate` that returned None may have
            another outcome now, or `step_work` is wanted. Wakes an idle engine.
    """

    on_ready: Callable[[], None]

    def try_activate(self, version: AdapterVersion) -> int | None:
        """Return the version's device slot and count one more user of it.

        None if it is not resident; the loader is then asked to bring it in (asking again is harmless).

        Raises:
            ServingError: the version failed to load or was dropped; no request of it can be served.
        """
        ...

    def deactivate(self, version: AdapterVersion) -> None:
        """One user less of the slot."""
        ...

    def release(self, version: AdapterVersion) -> None:
        """One request less of the version; it may go when there is none."""
        ...

    def step_work(self) -> None:
        """Do what may not happen during a step; called before each, cheap when there is nothing to do."""
        ...
