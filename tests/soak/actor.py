"""A thread that does one random operation after another."""

import random
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Collection
from typing import TypeVar

from lorikeet.adapters.errors import ServingError

from .world import World

Result = TypeVar("Result")

# What a fault that was injected may make of an operation that reads an adapter, or waits for one.
READ_FAULTS = frozenset({"ADAPTER_INVALID", "ADAPTER_UNREADABLE"})
DEVICE_FAULTS = frozenset({"ADAPTER_MEMORY"})


class Actor(threading.Thread):
    """One thread; ends when the world stops, or by itself with a report.

    Args:
        world: where it acts.
        name: of the thread; with the seed it decides what the thread draws.
        seed: of the soak.
        pause_s: mean time between operations.
    """

    def __init__(self, world: World, name: str, seed: int, pause_s: float) -> None:
        super().__init__(name=f"soak-{name}", daemon=True)
        self.world = world
        self.rng = random.Random(f"{seed}/{name}")
        self._pause_s = pause_s

    @abstractmethod
    def act(self) -> None:
        """One operation."""

    def excused(self) -> Collection[str]:
        """Reasons that what happened to the adapters before, not this operation, may have."""
        return ()

    def forget(self) -> None:
        """Everything was unloaded and removed; called while no operation is under way."""

    def run(self) -> None:
        """Act until the world stops."""
        try:
            while not self.world.stopping.is_set():
                with self.world.gate.passing():
                    self.act()
                self.world.stopping.wait(self.rng.expovariate(1 / self._pause_s))
        except BaseException:
            self.world.report_exception(self.name)

    def attempt(
        self, operation: str, call: Callable[[], Result], allowed: Collection[str] = (), *, reads: bool = False
    ) -> Result | ServingError:
        """Do something that may fail in known ways.

        Args:
            operation: what it is called in tallies.
            call: does it.
            allowed: reasons that it may fail for.
            reads: whether a fault of a disk or a device, meanwhile or before, may make it fail, too.

        Returns:
            What the call returned, or its error.
        """
        self.world.count(operation)
        asked_at = time.monotonic()
        try:
            return call()
        except ServingError as error:
            expected = set(allowed)
            if reads:
                if self.world.faults.happened_since("read", asked_at):
                    expected |= READ_FAULTS
                if self.world.faults.happened_since("device", asked_at):
                    expected |= DEVICE_FAULTS
                expected.update(self.excused())
            self.world.check_reason(operation, error.reason, error.message, expected)
            return error
