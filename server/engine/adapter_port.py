"""What the step loop needs from whoever owns the adapters. Imports no torch."""

from collections.abc import Callable
from typing import Protocol

from ...adapters.adaptation import Adaptation


class AdapterPort(Protocol):
    """The step thread's view of the adapters; `CompositionPort` is the real one.

    A request's versions were pinned (`resolve`) before it was submitted. The scheduler balances every slot returned by
    `try_activate` with one `deactivate`; the engine calls `release` once for each accepted request, at its end.

    For the scheduler's promise that no request starves, an implementation keeps two of its own:

    1. An adaptation with an activation keeps its slot until its last `deactivate`.
    2. When no other adaptation has an activation and none but one is asked for any more, `try_activate` of that one,
       repeated, returns a slot or raises in the end: what was brought in because it was asked for stays for longer than
       a step, but not for ever.

    Attributes:
        on_ready: set by the engine; to be called, from any thread, when a `try_activate` that returned None may have
            another outcome now, or `step_work` is wanted. Wakes an idle engine.
    """

    on_ready: Callable[[], None]

    def try_activate(self, adaptation: Adaptation) -> int | None:
        """Return the adaptation's batch slot and count one more user of it.

        None, and nothing is held, if a version of it is not resident; the loader is then asked to bring it in (asking
        again is harmless).

        Raises:
            ServingError: a version failed to load or was dropped; no request of it can be served.
        """
        ...

    def deactivate(self, adaptation: Adaptation) -> None:
        """One user less of the slot."""
        ...

    def release(self, adaptation: Adaptation) -> None:
        """One request less of each of the versions; one may go when there is none."""
        ...

    def step_work(self) -> None:
        """Do what may not happen during a step; called before each, cheap when there is nothing to do."""
        ...
