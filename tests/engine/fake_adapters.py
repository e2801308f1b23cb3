"""Adapters without weights, and a manager of them with a few device slots, as the engine sees it."""

import hashlib
import random
from collections import Counter, OrderedDict
from collections.abc import Sequence

from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.composition import CompositionPort
from lorikeet.adapters.errors import AdapterUnloadedError
from lorikeet.adapters.record import LEASE_S
from lorikeet.adapters.version import AdapterVersion

LEASE_ROUNDS = 8
NEVER = 10**9  # load_steps of an adapter that does not come in


def version(adapter_id: str, content: str = "1") -> Adaptation:
    """One adapter as it was trained."""
    digest = hashlib.sha256(f"{adapter_id}/{content}".encode()).hexdigest()
    return Adaptation.single(AdapterVersion(adapter_id, digest))


def blend(*parts: tuple[str, float]) -> Adaptation:
    """Several of them, with weights."""
    return Adaptation.of((version(adapter_id).versions[0], weight) for adapter_id, weight in parts)


# What adapts a token: digests and weights.
Applied = tuple[tuple[str, float], ...]


def applied(adapter: Adaptation | None) -> Applied:
    return tuple((member.version.digest, member.weight) for member in adapter.members) if adapter else ()


class FakeAdapters:
    """An adapter manager with a few device slots; the engine sees it through `port`.

    The loader brings in one wanted version per `step_work`, `load_steps` rounds after it was asked. With `seed` the
    order is random, and unused versions are thrown out now and then, as far as the promises of the port allow.

    What was brought in stays for LEASE_ROUNDS, and so does what is kept for a composition. `now` counts rounds.
    """

    def __init__(self, num_slots: int, *, load_steps: int = 0, seed: int | None = None) -> None:
        self.on_ready = lambda: None
        self.now = 0.0
        self.port = CompositionPort(self, num_slots, clock=lambda: self.now * LEASE_S / LEASE_ROUNDS)
        self.slots: list[AdapterVersion | None] = [None] * num_slots
        self._kept_until: dict[AdapterVersion, float] = {}
        self.active: Counter[AdapterVersion] = Counter()
        self.pins: Counter[AdapterVersion] = Counter()
        self.num_releases = 0
        self.failed: set[AdapterVersion] = set()
        self.num_step_works = 0
        self._wanted: OrderedDict[AdapterVersion, int] = OrderedDict()
        self._used: list[AdapterVersion] = []  # least recently first
        self._load_steps = load_steps
        self._random = random.Random(seed) if seed is not None else None

    def pin(self, adapter: Adaptation | None) -> None:
        self.pins.update(adapter.versions if adapter is not None else ())

    def unpin(self, adapter: Adaptation | None) -> None:
        """What the service does for a request that was refused."""
        self.pins.subtract(adapter.versions if adapter is not None else ())

    def put(self, *adapters: Adaptation) -> None:
        """They are in the first slots from now on."""
        for slot, version in enumerate(version for adapter in adapters for version in adapter.versions):
            self.slots[slot] = version

    def num_users(self, adapter: Adaptation) -> int:
        """Activations of one adapter."""
        return self.active[adapter.versions[0]]

    def fail(self, adapter: Adaptation) -> None:
        """Its versions were dropped by force."""
        self.failed.update(adapter.versions)

    def try_activate(self, adapter: AdapterVersion) -> int | None:
        if adapter in self.failed:
            raise AdapterUnloadedError("gone")
        assert self.pins[adapter] > 0, "asked for a version that nobody pins"
        if adapter not in self.slots:
            self._wanted.setdefault(adapter, self._load_steps)
            if self._load_steps < NEVER:
                self.on_ready()
            return None
        return self._use(adapter)

    def try_activate_all(self, versions: Sequence[AdapterVersion], *, keep: bool) -> list[int] | None:
        if self.failed.intersection(versions):
            raise AdapterUnloadedError("gone")
        if all(version in self.slots for version in versions):
            return [self._use(version) for version in versions]
        for version in versions:
            if version not in self.slots:
                assert self.try_activate(version) is None
            elif keep:
                self._kept_until[version] = self.now + LEASE_ROUNDS
        return None

    def deactivate(self, adapter: AdapterVersion) -> None:
        assert self.active[adapter] > 0, "deactivated more often than activated"
        self.active[adapter] -= 1
        self.on_ready()

    def release(self, adapter: AdapterVersion) -> None:
        assert self.pins[adapter] > 0, "released more often than pinned"
        self.pins[adapter] -= 1
        self.num_releases += 1

    def step_work(self) -> None:
        self.num_step_works += 1
        self.now += 1
        if self._random is not None and self._random.random() < 0.3:
            self._evict()
        for adapter in self._wanted:
            self._wanted[adapter] -= 1
        due = [adapter for adapter, steps in self._wanted.items() if steps <= 0]
        if not due:
            return
        adapter = self._random.choice(due) if self._random else due[0]
        if None not in self.slots:
            self._evict()
        if None in self.slots:
            self.slots[self.slots.index(None)] = adapter
            self._kept_until[adapter] = self.now + 1.5
            self._touch(adapter)
            del self._wanted[adapter]

    def _use(self, adapter: AdapterVersion) -> int:
        self.active[adapter] += 1
        self._kept_until.pop(adapter, None)
        self._touch(adapter)
        return self.slots.index(adapter)

    def _touch(self, adapter: AdapterVersion) -> None:
        if adapter in self._used:
            self._used.remove(adapter)
        self._used.append(adapter)

    def _evict(self) -> None:
        kept = {adapter for adapter, until in self._kept_until.items() if until > self.now}
        idle = [adapter for adapter in self._used if not self.active[adapter] and adapter not in kept]
        if idle:
            victim = self._random.choice(idle) if self._random else idle[0]
            self._used.remove(victim)
            self.slots[self.slots.index(victim)] = None
