"""Operators who do not know of one another: they load, unload, pin and alias the same few ids at the same time."""

from typing import Final

from lorikeet.adapters.info import Tier

from .actor import Actor
from .world import World

# All that calls which get in each other's way may end with. Never an error that says nothing.
COLLISIONS: Final = {
    "ADAPTER_NOT_FOUND",
    "ADAPTER_EXISTS",
    "ADAPTER_IN_USE",
    "ADAPTER_NO_VERSION",
    "ADAPTER_MEMORY",
    "ADAPTER_NOT_READY",
    "ADAPTER_UNLOADED",
    "ADAPTER_UNREADABLE",
    "ADAPTER_INVALID",  # a watched folder that is being written
    "ADAPTER_INCOMPATIBLE",  # likewise: the config is new, the weights are not yet
    "ADAPTER_ID_INVALID",  # an alias where an id is asked for, and vice versa
    "QUEUE_FULL",  # the engine has no time for a golden file
    "ADAPTER_MISMATCH",  # the folder that a version must be read from again has changed
}


class WildOperator(Actor):
    """See the module.

    Args:
        world, name, seed, pause_s: see Actor.
        ids, aliases: shared with other operators, and with watched folders of these names.
    """

    def __init__(self, world: World, name: str, seed: int, pause_s: float, ids: list[str], aliases: list[str]) -> None:
        super().__init__(world, name, seed, pause_s)
        self._ids, self._aliases = ids, aliases

    def act(self) -> None:
        """One operation."""
        rng, manager = self.rng, self.world.app.manager
        adapter_id, alias, content = rng.choice(self._ids), rng.choice(self._aliases), rng.choice(self.world.contents)
        either, tier, timeout_s = (
            rng.choice([adapter_id, alias]),
            rng.choice([Tier.HOST, Tier.DEVICE]),
            rng.uniform(0, 0.2),
        )
        targets = [(rng.choice([either, f"{adapter_id}@{content.digest[:10]}"]), 1.0)]
        operations = {
            "wild load": (lambda: manager.load(either, rng.choice([None, f".staged/{content.name}"])), 12),
            "wild dry run": (lambda: manager.plan_load(adapter_id), 2),
            "wild unload": (lambda: manager.unload(either), 8),
            "wild rollback": (lambda: manager.rollback(adapter_id, rng.choice(["", content.digest[:9]])), 5),
            "wild pin": (lambda: manager.pin(adapter_id, tier, timeout_s), 4),
            "wild unpin": (lambda: manager.unpin(adapter_id), 8),
            "wild prefetch": (lambda: manager.prefetch(either, tier, timeout_s), 5),
            "wild alias": (lambda: manager.set_alias(rng.choice([alias, adapter_id]), targets), 6),
            "wild alias deleted": (lambda: manager.delete_alias(alias), 5),
            "wild describe": (lambda: manager.describe(either), 3),
        }
        name = rng.choices(list(operations), [weight for _, weight in operations.values()])[0]
        self.attempt(name, operations[name][0], COLLISIONS)
