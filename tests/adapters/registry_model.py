"""What the registry must know and keep after any calls: the model that the state machine compares it with."""

from collections import Counter

from hypothesis.stateful import RuleBasedStateMachine, invariant
from lorikeet.adapters.aliases import choose_target
from lorikeet.adapters.errors import AdapterDigestError, AdapterIdError, AdapterNotFoundError
from lorikeet.adapters.info import Tier
from lorikeet.adapters.rules import check_integrity

from .registry_world import World, held_copy

NUM_SLOTS = 2


class RegistryModel(RuleBasedStateMachine):
    """The rules are elsewhere; they keep these attributes up to date."""

    def __init__(self):
        super().__init__()
        self.world = World(host_budget=30, device_budget=24, max_slots=NUM_SLOTS)
        self.registry = self.world.registry
        self.held = []  # versions, once for each request
        self.called = []  # versions, once for each call
        self.proven = []  # versions, once for each call that has them as candidate
        self.active = []  # (version, slot), once for each of those that runs
        self.loading = []  # (id, ticket) begun
        self.outdated = set()  # tickets whose results must be discarded
        self.reading = []  # versions whose host copy is under way
        self.copying = []  # (version, slot) of device copies under way
        self.current = {}  # id -> version
        self.aliases = {}
        self.pins = {}
        self.dropped = set()  # by force
        self.before = {}  # version -> what was seen of it after the step before
        self.named_before = {}

    def live(self, adapter_id, digest):
        """The version that stands for some content, if one does."""
        record = self.registry.by_id.get(adapter_id, {}).get(digest)
        return record and record.version

    def named(self):
        """Versions that new requests can name, by content."""
        contents = {(t.adapter_id, t.digest) for alias in self.aliases.values() for t in alias.targets}
        contents |= {(v.adapter_id, v.digest) for v in self.current.values()}
        return {content: self.live(*content) for content in contents if self.live(*content)}

    def overtake(self, adapter_id, ticket=None):
        self.outdated.update(t for t in self.loading if t[0] == adapter_id and (ticket is None or t[1] < ticket))

    def expected(self, name, prefix, key):
        """The version that a reference leads to, or the error that it meets."""
        if name in self.aliases:
            target = choose_target(self.aliases[name], key)
            return AdapterIdError if prefix else self.live(target.adapter_id, target.digest) or AdapterNotFoundError
        if not prefix:
            return self.current.get(name, AdapterNotFoundError)
        found = [v for (i, digest), v in self.named().items() if i == name and digest.startswith(prefix)]
        return AdapterDigestError if len(found) > 1 else found[0] if found else AdapterNotFoundError

    # What must hold after every step.

    @invariant()
    def bookkeeping_is_consistent(self):
        check_integrity(self.registry)
        assert {i: r.version for i, r in self.registry.current.items()} == self.current
        assert {alias.name: alias for alias in self.registry.aliases.all()} == self.aliases
        assert self.registry.pins == self.pins
        assert {v for v, r in self.registry.records.items() if r.error} <= self.dropped

    @invariant()
    def no_version_is_freed_while_it_is_held(self):
        holds = Counter(self.called) + Counter(self.proven)
        in_flight = holds + Counter(self.held)
        active = Counter(version for version, _ in self.active)
        assert in_flight.keys() <= self.registry.records.keys()
        for version, record in self.registry.records.items():
            assert (record.in_flight, record.holds) == (in_flight[version], holds[version])
            assert record.active == active[version]
        for version, slot in self.active:
            assert self.world.record(version).slot == slot and slot not in self.world.free_slots
        assert not {r.version for r in self.registry.draining} & set(self.proven)

    @invariant()
    def no_version_is_freed_while_it_is_named(self):
        named = self.named()
        for content, version in self.named_before.items():
            if content in named and version not in self.dropped:
                assert named[content] == version and self.world.record(version).error is None
        self.named_before = named

    @invariant()
    def copies_that_are_needed_stay(self):
        now = {}
        for version, record in self.registry.records.items():
            is_last = record.is_needed and not record.is_readable and not record.error
            is_leased = record.leased_until > self.world.now
            now[version] = (record.pinned, is_leased, is_last, held_copy(record))
            pinned, was_leased, was_last, had = self.before.get(version, (None, False, False, set()))
            has = held_copy(record)
            assert not (pinned and pinned is record.pinned and pinned in had) or pinned in has
            assert not (was_leased and is_leased and Tier.DEVICE in had) or Tier.DEVICE in has
            # Nothing could be read again: its folder holds other content by now.
            assert not (was_last and is_last and had) or has
        self.before = now

    @invariant()
    def every_wish_is_somebodys(self):
        for version, record in self.registry.host_wanted.items():
            assert record.host is None and (record.in_flight or self.pins.get(version.adapter_id) is Tier.HOST)

    @invariant()
    def copies_under_way_keep_their_source_and_target(self):
        assert all(self.world.record(version).host_claimed for version in self.reading)
        for record in (self.world.record(version) for version, _ in self.copying):
            assert record.device_claimed and record.host is not None and record.slot is None

    @invariant()
    def every_slot_is_free_or_owned_once(self):
        owned = [r.slot for r in self.registry.records.values() if r.slot is not None]
        copying = [slot for _, slot in self.copying]
        assert sorted(owned + copying + self.world.free_slots) == list(range(NUM_SLOTS))
