"""An operator who alone manages some ids and aliases, and so knows after every call what the server must say."""

from dataclasses import dataclass
from typing import Final

from lorikeet.adapters.errors import ServingError
from lorikeet.adapters.info import AdapterInfo, LoadOptions, Tier

from .actor import DEVICE_FAULTS, Actor
from .contents import Content, place
from .world import World

NOT_FOUND, IN_USE, NO_VERSION = "ADAPTER_NOT_FOUND", "ADAPTER_IN_USE", "ADAPTER_NO_VERSION"
MEMORY, NOT_READY, UNLOADED = "ADAPTER_MEMORY", "ADAPTER_NOT_READY", "ADAPTER_UNLOADED"
UNREADABLE, MISMATCH = "ADAPTER_UNREADABLE", "ADAPTER_MISMATCH"
# Pins may leave no room for it, and the engine may have no time for its golden file.
LOAD_REFUSALS: Final = {MEMORY, "QUEUE_FULL"}


@dataclass(slots=True)
class Owned:
    """What the server was told of one id.

    Attributes:
        current: digest, or "".
        previous: what a rollback brings back, or "".
        pinned: or None.
    """

    current: str = ""
    previous: str = ""
    pinned: Tier | None = None

    def become(self, digest: str) -> None:
        """Another version is current, or the same again."""
        if self.current not in ("", digest):
            self.previous = self.current
        self.current = digest


class Owner(Actor):
    """See the module.

    Args:
        world, name, seed, pause_s: see Actor.
        ids, aliases: nobody else touches these.
        moves: whether what it loads does not always stay where it was loaded from.
    """

    def __init__(
        self,
        world: World,
        name: str,
        seed: int,
        pause_s: float,
        *,
        ids: list[str],
        aliases: list[str],
        moves: bool,
    ) -> None:
        super().__init__(world, name, seed, pause_s)
        self.manager = world.app.manager
        self._ids, self._alias_names, self._moves = ids, aliases, moves
        self.forget()

    def forget(self) -> None:
        """Everything was unloaded and removed."""
        self.owned = {adapter_id: Owned() for adapter_id in self._ids}
        self.aliases: dict[str, list[tuple[str, str]]] = {}
        for name in (*self._ids, *self._alias_names):
            self.world.ledger.set(name, [None])

    def act(self) -> None:
        """One operation."""
        operations = (
            (self._load, 30),
            (self._load_from_moving_folder, 6 if self._moves else 0),
            (self._load_unexpected, 3),
            (self._plan, 6),
            (self._unload, 4),
            (self._roll_back, 10),
            (self._pin, 8),
            (self._unpin, 10),
            (self._prefetch, 12),
            (self._set_alias, 10),
            (self._delete_alias, 6),
            (self._look, 10),
        )
        act = self.rng.choices([a for a, _ in operations], [w for _, w in operations])[0]
        act(self.rng.choice(self._ids))

    def _load(self, adapter_id: str) -> None:
        content = self.rng.choice(self.world.contents)
        digest = self.rng.choice(["", content.digest])
        self._load_from(adapter_id, f".staged/{content.name}", content, LoadOptions(expected_digest=digest))

    def _load_from_moving_folder(self, adapter_id: str) -> None:
        """What is loaded does not stay where it was loaded from."""
        content = self.rng.choice(self.world.contents)
        place(content, self.world.root / f".moving-{adapter_id}")
        self._load_from(adapter_id, f".moving-{adapter_id}", content, LoadOptions())

    def _load_from(self, adapter_id: str, source: str, content: Content, options: LoadOptions) -> None:
        with self.world.ledger.changing(adapter_id, content.digest) as change:
            info = self.attempt(
                "load", lambda: self.manager.load(adapter_id, source, options), LOAD_REFUSALS, reads=True
            )
            if not isinstance(info, ServingError):
                change.acknowledged()
                self.owned[adapter_id].become(content.digest)
                self._check_current(adapter_id, info)
                if bool(info.proof) != content.is_proven:
                    self.world.report(f"{adapter_id} was loaded from {content}, and its proof is {info.proof!r}")

    def _load_unexpected(self, adapter_id: str) -> None:
        content, other = self.rng.sample(self.world.contents, 2)
        options = LoadOptions(expected_digest=other.digest)
        info = self.attempt(
            "load unexpected",
            lambda: self.manager.load(adapter_id, f".staged/{content.name}", options),
            {MISMATCH},
            reads=True,
        )
        if not isinstance(info, ServingError):
            self.world.report(f"{content.digest} was loaded as {adapter_id}; expected was {other.digest}")

    def _plan(self, adapter_id: str) -> None:
        content, before = self.rng.choice(self.world.contents), self._served(adapter_id)
        plan = self.attempt(
            "dry run", lambda: self.manager.plan_load(adapter_id, f".staged/{content.name}"), LOAD_REFUSALS, reads=True
        )
        if isinstance(plan, ServingError):
            return
        if plan.adapter.digest != content.digest:
            self.world.report(f"a dry run of {content.digest} found {plan.adapter.digest}")
        if plan.is_new not in {content.digest != digest for digest in (before, self._served(adapter_id))}:
            self.world.report(f"a dry run says is_new {plan.is_new}; {self.owned[adapter_id]}, {content.digest}")

    def _unload(self, adapter_id: str) -> None:
        owned = self.owned[adapter_id]
        is_held = owned.pinned is not None or any(adapter_id == i for t in self.aliases.values() for i, _ in t)
        allowed = {IN_USE} if is_held else {NOT_FOUND} if not owned.current else set()
        with self.world.ledger.changing(adapter_id, None) as change:
            result = self.attempt("unload", lambda: self.manager.unload(adapter_id), allowed)
            if not isinstance(result, ServingError):
                change.acknowledged()
                if is_held:
                    self.world.report(f"{adapter_id} was unloaded although {owned}, {self.aliases}")
                self.owned[adapter_id] = Owned()

    def _roll_back(self, adapter_id: str) -> None:
        owned = self.owned[adapter_id]
        digest = owned.previous or owned.current
        prefix = "" if self.rng.random() < 0.6 else digest[: self.rng.randint(8, 64)]
        if prefix and self.rng.random() < 0.1:
            prefix = "0" * 8
        target = digest if prefix else owned.previous
        with self.world.ledger.changing(adapter_id, target or None) as change:
            info = self.attempt(
                "rollback",
                lambda: self.manager.rollback(adapter_id, prefix),
                # The store has little room, so the files may not be kept any more.
                {NO_VERSION, *LOAD_REFUSALS} | (set() if owned.current else {NOT_FOUND}),
                reads=True,
            )
            if not isinstance(info, ServingError):
                change.acknowledged()
                owned.become(target)
                self._check_current(adapter_id, info)

    def _pin(self, adapter_id: str) -> None:
        owned, tier = self.owned[adapter_id], self.rng.choice([Tier.HOST, Tier.DEVICE])
        allowed = {MEMORY, NOT_READY} if owned.current else {NOT_FOUND}
        info = self.attempt(
            "pin",
            lambda: self.manager.pin(adapter_id, tier, self.rng.uniform(0, 0.2)),
            allowed,
            reads=True,
        )
        if not isinstance(info, ServingError):
            if (info.pinned, info.digest) != (tier, owned.current):
                self.world.report(f"{adapter_id} was pinned to {tier}: {info}, {owned}")
            owned.pinned = tier
        else:
            # Depending on when it failed, the pin is there or not.
            with self.manager._core.changed:
                now = self.manager._core.registry.pins.get(adapter_id)
            if now not in (tier, owned.pinned):
                self.world.report(f"{adapter_id} is pinned to {now}; it was {owned.pinned}, and {tier} was asked for")
            owned.pinned = now

    def _unpin(self, adapter_id: str) -> None:
        owned = self.owned[adapter_id]
        # What is pinned can be unpinned, also when it has failed.
        allowed = set() if owned.pinned or (owned.current and not self.world.was_lost(adapter_id)) else {NOT_FOUND}
        info = self.attempt("unpin", lambda: self.manager.unpin(adapter_id), allowed)
        if not isinstance(info, ServingError):
            owned.pinned = None
            if info.pinned is not None:
                self.world.report(f"{adapter_id} is pinned after it was unpinned: {info}")

    def _prefetch(self, adapter_id: str) -> None:
        names = [adapter_id, *(name for name, targets in self.aliases.items() if len(targets) == 1)]
        reference, tier = self.rng.choice(names), self.rng.choice([Tier.HOST, Tier.DEVICE])
        allowed = {NOT_READY, MEMORY}
        if not self.owned[adapter_id].current:
            allowed.add(NOT_FOUND)
        timeout_s = self.rng.uniform(0, 0.3)
        self.attempt("prefetch", lambda: self.manager.prefetch(reference, tier, timeout_s), allowed, reads=True)

    def _set_alias(self, adapter_id: str) -> None:
        name = self.rng.choice(self._alias_names)
        chosen = self.rng.sample(self._ids, self.rng.choice([1, 1, 2]))
        targets: list[tuple[str, str]] = []
        references: list[tuple[str, float]] = []
        for target in chosen:
            owned = self.owned[target]
            digest = self.rng.choice([owned.current, owned.current, owned.previous or owned.current])
            targets.append((target, digest))
            is_plain = digest == owned.current and self.rng.random() < 0.5
            reference = target if is_plain or not digest else f"{target}@{digest[:12]}"
            references.append((reference, self.rng.choice([1.0, 3.0])))
        # Files of aliased versions must be kept, and the store may have no room or its disk be full.
        allowed = {NO_VERSION, MEMORY, UNREADABLE}
        if not all(digest for _, digest in targets):
            allowed.add(NOT_FOUND)
        with self.world.ledger.changing(name, *(digest for _, digest in targets)) as change:
            alias = self.attempt("set alias", lambda: self.manager.set_alias(name, references), allowed, reads=True)
            if not isinstance(alias, ServingError):
                change.acknowledged()
                self.aliases[name] = targets
                if [(t.adapter_id, t.digest) for t in alias.targets] != targets:
                    self.world.report(f"alias {name} was set to {targets}: {alias}")

    def _delete_alias(self, _: str) -> None:
        name = self.rng.choice(self._alias_names)
        allowed = set() if name in self.aliases else {NOT_FOUND}
        with self.world.ledger.changing(name, None) as change:
            result = self.attempt("delete alias", lambda: self.manager.delete_alias(name), allowed)
            if not isinstance(result, ServingError):
                change.acknowledged()
                del self.aliases[name]

    def _look(self, adapter_id: str) -> None:
        """What is listed and described is what was acknowledged."""
        owned = self.owned[adapter_id]
        details = self.attempt(
            "describe", lambda: self.manager.describe(adapter_id), set() if owned.current else {NOT_FOUND}
        )
        if not isinstance(details, ServingError) and owned.current:
            self._check_current(adapter_id, details.adapter)
        names = {alias.name: [(t.adapter_id, t.digest) for t in alias.targets] for alias in self.manager.list_aliases()}
        if {name: names.get(name) for name in self.aliases} != self.aliases:
            self.world.report(f"aliases are {names}; set were {self.aliases}")
        self.manager.list()
        self.manager.snapshot()

    def _check_current(self, adapter_id: str, info: AdapterInfo) -> None:
        owned = self.owned[adapter_id]
        if info.digest != owned.current and not self.world.was_lost(adapter_id):
            self.world.report(f"{adapter_id} is {info}; acknowledged was {owned}")
        if info.digest and (info.pinned != owned.pinned or not info.current):
            self.world.report(f"{adapter_id} is {info}; acknowledged was {owned}")

    def _served(self, adapter_id: str) -> str:
        """The digest that requests get; empty also when the version was lost."""
        core = self.manager._core
        with core.changed:
            record = core.registry.current.get(adapter_id)
            return record.version.digest if record is not None else ""

    def excused(self) -> set[str]:
        """What calls answer for versions that left memory and could not be read again."""
        return {NOT_FOUND, UNLOADED, *DEVICE_FAULTS} if any(map(self.world.was_lost, self._ids)) else set()
