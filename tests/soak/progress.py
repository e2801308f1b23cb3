"""A line every ten seconds, so that whoever watches an hour's soak sees what it does."""

import threading
import time

from lorikeet.adapters.info import AdapterState, Tier

from .footprint import rss_bytes
from .world import World

EVERY_S = 10.0


class Progress(threading.Thread):
    """Prints until the world stops."""

    def __init__(self, world: World) -> None:
        super().__init__(name="soak-progress", daemon=True)
        self._world = world
        self._began = time.monotonic()

    def run(self) -> None:
        """See the class."""
        while not self._world.stopping.wait(EVERY_S):
            print(self.line(), flush=True)

    def line(self) -> str:
        """Everything so far."""
        world = self._world
        stats = world.app.manager.snapshot()
        tiers = stats.names_by_tier()
        by_state = {state: sum(info.state is state for info in stats.adapters) for state in AdapterState}
        return "\n".join(
            (
                f"soak {time.monotonic() - self._began:6.0f} s: {world.live} requests in flight, "
                f"RSS {rss_bytes() / 2**20:.0f} MiB; ready versions: "
                + ", ".join(f"{len(tiers[tier])} {tier}" for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK))
                + f"; {by_state[AdapterState.DRAINING]} draining, {by_state[AdapterState.FAILED]} failed; "
                f"{world.app.engine.stats().num_preemptions} preemptions",
                f"  did:    {_tally(world.operations)}",
                f"  got:    {_tally(world.errors)}",
                f"  faults: {_tally(world.faults.counts())}",
            )
        )


def _tally(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "nothing"
