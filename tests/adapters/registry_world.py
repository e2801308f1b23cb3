"""A registry, and what manager and loader do with it, one call each."""

import hashlib
from pathlib import Path

from lorikeet.adapters.errors import AdapterMemoryError, Code
from lorikeet.adapters.info import AliasInfo, AliasTarget, Tier
from lorikeet.adapters.origin import Origin
from lorikeet.adapters.record import LEASE_S, Record
from lorikeet.adapters.registry import Registry
from lorikeet.adapters.report import AdapterReport
from lorikeet.adapters.rules import check_room
from lorikeet.adapters.version import AdapterVersion

DRAIN_S = 30.0


class Copy:
    """A host copy."""

    def __init__(self, nbytes):
        self.nbytes = nbytes


def make_origin(name="x", **found):
    report = {"method": "LoRA", "trained_for": "", "max_rank": 1, "num_modules": 1, "slices": {}} | found
    return Origin(Path("/adapters") / name, AdapterReport(**report), None, 0.0, name)


ORIGIN = make_origin()


def digest_of(content):
    return hashlib.sha256(str(content).encode()).hexdigest()


def make_alias(name, *targets):
    """An alias of versions, each alone or with its weight."""
    pairs = [target if isinstance(target, tuple) else (target, 1.0) for target in targets]
    return AliasInfo(name, tuple(AliasTarget(v.adapter_id, v.digest, weight) for v, weight in pairs))


class World:
    """Time stands still unless `now` is moved."""

    def __init__(self, host_budget=100, device_budget=100, max_slots=4):
        self.free_slots = list(range(max_slots))
        self.evictions = []
        self.now = 0.0
        self.registry = Registry(
            host_budget=host_budget,
            device_budget=device_budget,
            max_slots=max_slots,
            free_slot=self.free_slot,
            on_evict=self.evictions.append,
        )

    def free_slot(self, slot):
        assert slot not in self.free_slots, "slot freed twice"
        self.free_slots.append(slot)

    @property
    def drain_until(self):
        return self.now + DRAIN_S

    def record(self, version):
        return self.registry.records[version]

    def tier(self, version):
        return self.record(version).tier

    def finish(self, adapter_id, digest, ticket, size=10, *, device_size=None, origin=ORIGIN):
        return self.registry.finish_load(
            AdapterVersion(adapter_id, digest),
            ticket,
            origin,
            host_bytes=size,
            device_bytes=device_size or size,
            drain_until=self.drain_until,
        )

    def load(self, adapter_id, digest="d1", size=10, *, device_size=None, origin=ORIGIN):
        """A load from disk from its beginning to its end: the version."""
        ticket = self.registry.loading.begin(adapter_id)
        version = self.finish(adapter_id, digest, ticket, size, device_size=device_size, origin=origin).version
        if self.registry.claim_host(version, urgent=False):
            self.registry.fill_host(version, Copy(size))
        return version

    def add_candidate(self, adapter_id, digest="d1", size=10, device_size=None):
        version = AdapterVersion(adapter_id, digest)
        return self.registry.add_candidate(version, ORIGIN, host_bytes=size, device_bytes=device_size or size)

    def resolve(self, name, digest_prefix="", routing_key=""):
        return self.registry.resolve(name, digest_prefix, routing_key)

    def set_alias(self, name, *targets):
        self.registry.set_alias(make_alias(name, *targets), self.drain_until)

    def delete_alias(self, name):
        self.registry.delete_alias(name, self.drain_until)

    def unload(self, adapter_id):
        self.registry.unload(adapter_id, self.drain_until)

    def has_room(self, record, pin, replaced=None):
        """Whether a version, pinned or not, could always come in; `replaced` is no longer current then."""
        assert replaced in (None, self.registry.current.get(record.version.adapter_id))
        try:
            check_room(self.registry, record, pin, replaced)
        except AdapterMemoryError as error:
            assert error.code is Code.RESOURCE_EXHAUSTED and repr(record.version.adapter_id) in error.message
            return False
        return True

    def can_pin(self, adapter_id, tier):
        return self.has_room(self.registry.current[adapter_id], tier)

    def can_load(self, adapter_id, size=10, device_size=None, digest="new"):
        """Whether content that has been read may become current."""
        known = self.registry.by_id.get(adapter_id, {}).get(digest)
        record = known or Record(AdapterVersion(adapter_id, digest), ORIGIN, size, device_size or size)
        current = self.registry.current.get(adapter_id)
        return self.has_room(record, self.registry.pins.get(adapter_id), None if current is record else current)

    def can_alias(self, record):
        """Whether an alias may lead to a version that is held as a candidate."""
        return self.has_room(record, None)

    def bring_in(self, version):
        """What the loader does for a wanted version; whether it could."""
        record = self.record(version)
        if record.host is None:
            if not self.registry.claim_host(version, urgent=True):
                return False
            self.registry.fill_host(version, Copy(record.host_bytes))
        if not self.registry.claim_device(version, self.now):
            return False
        self.registry.fill_device(version, self.free_slots.pop(), self.now)
        return True

    def serve_wishes(self):
        """What the loader does until nothing moves any more, in its order; every copy takes no time."""
        while self._serve_wish():
            pass

    def _serve_wish(self):
        registry = self.registry
        read = []
        for version, record in registry.wanted.items():
            if record.host is None and not record.host_claimed:
                if not registry.claim_host(version, urgent=True):
                    break
                read.append(version)
        for version, record in list(registry.host_wanted.items()):
            if registry.claim_host(version, urgent=record.pinned is Tier.HOST):
                read.append(version)
        for version in read:
            registry.fill_host(version, Copy(self.record(version).host_bytes))
        head = next((r for r in registry.wanted.values() if r.host is not None and not r.device_claimed), None)
        if head is None or not registry.claim_device(head.version, self.now):
            return bool(read)
        registry.fill_device(head.version, self.free_slots.pop(), self.now)
        return True

    def end_leases(self):
        self.now += LEASE_S

    def run(self, name, digest_prefix="", routing_key=""):
        """A request that got as far as running: its version."""
        version = self.resolve(name, digest_prefix, routing_key)
        if self.registry.activate(version) is None:
            assert self.bring_in(version)
            assert self.registry.activate(version) is not None
        return version

    def end(self, version):
        """A running request ends."""
        self.registry.deactivate(version)
        self.registry.release(version)

    def is_empty(self):
        """Whether nothing is known, nothing is kept and no memory is used."""
        registry = self.registry
        names = (registry.records, registry.by_id, registry.digests, registry.current, registry.loading)
        waiting = (registry.wanted, registry.host_wanted, registry.draining, registry.pins, registry.aliases.all())
        unused = registry.memory.host_used == registry.memory.device_used == 0
        return not any(names) and not any(waiting) and unused and len(self.free_slots) == registry.memory.max_slots


def held_copy(record):
    """Which tiers hold a copy of a version."""
    return {t for t, c in ((Tier.HOST, record.host), (Tier.DEVICE, record.slot)) if c is not None}
