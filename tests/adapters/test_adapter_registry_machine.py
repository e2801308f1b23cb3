"""Loads, names, requests, calls and copies in any order and interleaving, against a small model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, consumes, initialize, multiple, precondition, rule
from lorikeet.adapters.errors import (
    AdapterInUseError,
    AdapterInvalidError,
    AdapterMemoryError,
    AdapterNotFoundError,
    AdapterUnloadedError,
    ServingError,
)
from lorikeet.adapters.info import Tier
from lorikeet.adapters.rules import check_integrity, check_unload

from .registry_model import RegistryModel
from .registry_world import Copy, make_alias

IDS = st.sampled_from("abc")
NAMES = st.sampled_from(["prod", "staging"])
KEYS = st.sampled_from([f"user-{i}" for i in range(8)])
TIERS = st.sampled_from([Tier.HOST, Tier.DEVICE])
DRAIN_S = st.integers(0, 20)
# Two digests begin alike. Host and device bytes differ, so that taking one for the other would show.
SIZES = {"abcd1" + "0" * 59: (5, 6), "abcd2" + "0" * 59: (12, 10), "ef01" + "0" * 60: (20, 19)}
DIGESTS = st.sampled_from(sorted(SIZES))
PREFIXES = st.sampled_from(["abcd", "abcd1", "abcd2", "ef01", "0123", *sorted(SIZES)])
GONE = AdapterUnloadedError("copy failed")
NO_MEMORY = AdapterMemoryError("no memory")


def some(value):
    """What a rule puts into its bundle."""
    return multiple() if value is None else value


class RegistryMachine(RegistryModel):
    tickets = Bundle("tickets")
    requests = Bundle("requests")
    running = Bundle("running")
    calls = Bundle("calls")
    candidates = Bundle("candidates")
    host_claims = Bundle("host_claims")
    device_claims = Bundle("device_claims")

    @initialize(digests=st.lists(DIGESTS, min_size=3, max_size=3))
    def start(self, digests):
        for adapter_id, digest in zip("abc", digests, strict=True):
            self.load(adapter_id, digest, False)

    # Loads.

    @rule(target=tickets, adapter_id=IDS)
    def begin_load(self, adapter_id):
        ticket = (adapter_id, self.registry.loading.begin(adapter_id))
        self.loading.append(ticket)
        return ticket

    @rule(ticket=consumes(tickets), digest=DIGESTS, is_stored=st.booleans())
    def finish_load(self, ticket, digest, is_stored):
        adapter_id = ticket[0]
        host_bytes, device_bytes = SIZES[digest]
        assert self.registry.loading.is_outdated(*ticket) == (ticket in self.outdated)
        if not self.world.can_load(adapter_id, host_bytes, device_bytes, digest):
            return self.fail_load(ticket)
        record = self.world.finish(adapter_id, digest, ticket[1], host_bytes, device_size=device_bytes)
        assert (record is None) == (ticket in self.outdated)
        self.loading.remove(ticket)
        if record is not None:
            assert (record.version.adapter_id, record.version.digest) == (adapter_id, digest)
            assert record.version not in self.dropped and record.error is None
            self.current[adapter_id] = record.version
            record.is_stored |= is_stored
            self.overtake(adapter_id, ticket[1])
        return None

    @rule(adapter_id=IDS, digest=DIGESTS, is_stored=st.booleans())
    def load(self, adapter_id, digest, is_stored):
        """All of a load at once, so that random walks get further."""
        self.finish_load(self.begin_load(adapter_id), digest, is_stored)
        version = self.current.get(adapter_id)
        if version is not None and self.registry.claim_host(version, urgent=False):
            self.registry.fill_host(version, Copy(SIZES[version.digest][0]))

    @rule(ticket=consumes(tickets))
    def fail_load(self, ticket):
        self.registry.fail_load(*ticket, AdapterInvalidError("broken"))
        self.loading.remove(ticket)
        if ticket not in self.outdated:
            self.overtake(*ticket)

    @rule(adapter_id=IDS, drain_s=DRAIN_S, asked=st.booleans())
    def unload(self, adapter_id, drain_s, asked):
        """By a call, which the rules may refuse; or because the folder is gone."""
        is_named = any(t.adapter_id == adapter_id for alias in self.aliases.values() for t in alias.targets)
        is_known = adapter_id in self.current or any(t[0] == adapter_id for t in self.loading)
        try:
            if asked:
                check_unload(self.registry, adapter_id)
            self.registry.unload(adapter_id, self.world.now + drain_s)
        except AdapterNotFoundError:
            assert not is_known
        except AdapterInUseError:
            assert is_named or adapter_id in self.pins
        else:
            assert not (asked and (is_named or adapter_id in self.pins))
            self.current.pop(adapter_id, None)
            self.overtake(adapter_id)

    @rule(target=candidates, adapter_id=IDS, digest=DIGESTS, is_stored=st.booleans())
    def add_candidate(self, adapter_id, digest, is_stored):
        known = self.live(adapter_id, digest)
        record = self.world.add_candidate(adapter_id, digest, *SIZES[digest])
        assert known in (None, record.version) and record.version not in self.dropped
        record.is_stored |= is_stored
        self.proven.append(record.version)
        return record.version

    @rule(version=consumes(candidates), drain_s=DRAIN_S)
    def drop_candidate(self, version, drain_s):
        self.registry.drop_candidate(self.world.record(version), self.world.now + drain_s)
        self.proven.remove(version)

    # Names.

    @precondition(lambda self: self.registry.by_id)
    @rule(name=NAMES, weights=st.lists(st.sampled_from([0.5, 1.0, 9.0]), min_size=1, max_size=3), data=st.data())
    def set_alias(self, name, weights, data):
        live = sorted((r.version for rs in self.registry.by_id.values() for r in rs.values()), key=str)
        versions = data.draw(st.lists(st.sampled_from(live), min_size=1, max_size=3, unique=True))
        alias = make_alias(name, *zip(versions, weights, strict=False))
        for version in versions:
            self.world.record(version).is_stored |= data.draw(st.booleans())
        self.registry.set_alias(alias, self.world.now + data.draw(DRAIN_S))
        self.aliases[name] = alias

    @rule(name=NAMES, drain_s=DRAIN_S)
    def delete_alias(self, name, drain_s):
        self.registry.delete_alias(name, self.world.now + drain_s)
        self.aliases.pop(name, None)

    @rule(adapter_id=IDS, tier=TIERS)
    def pin(self, adapter_id, tier):
        if adapter_id in self.current and self.world.can_pin(adapter_id, tier):
            self.registry.pin(adapter_id, tier)
            self.pins[adapter_id] = tier

    @rule(adapter_id=IDS)
    def unpin(self, adapter_id):
        self.registry.pin(adapter_id, None)
        self.pins.pop(adapter_id, None)

    # Requests and calls.

    @rule(target=requests, name=IDS | NAMES, prefix=st.just("") | PREFIXES, key=KEYS)
    def resolve(self, name, prefix, key):
        return some(self.admit(name, prefix, key))

    def admit(self, name, prefix, key):
        """A request's version; None: it is refused."""
        expected = self.expected(name, prefix, key)
        if isinstance(expected, type):
            with pytest.raises(expected):
                self.world.resolve(name, prefix, key)
            return None
        version = self.world.resolve(name, prefix, key)
        assert version == expected and version not in self.dropped
        self.held.append(version)
        return version

    @rule(target=requests, adapter_id=IDS, digest=DIGESTS)
    def replace_in_use(self, adapter_id, digest):
        version = self.admit(adapter_id, "", "")
        self.load(adapter_id, digest, is_stored=False)
        return some(version)

    @rule(version=consumes(requests))
    def release(self, version):
        self.registry.release(version)
        self.held.remove(version)

    @rule(version=requests)
    def wish(self, version):
        """A waiting request asks; it stays a waiting request."""
        if self.activated(version) is not None:
            self.registry.deactivate(version)

    def activated(self, version):
        """The slot; None: not yet, or never."""
        try:
            slot = self.registry.activate(version)
        except ServingError:
            assert version in self.dropped
            return None
        assert version not in self.dropped
        return slot

    @rule(target=running, version=consumes(requests))
    def activate(self, version):
        return some(self.start_or_cancel(version))

    @rule(target=running, name=IDS | NAMES, key=KEYS)
    def run(self, name, key):
        """All of a request's start at once, if there is room."""
        return some(self.admit_and_start(name, key))

    def admit_and_start(self, name, key):
        version = self.admit(name, "", key)
        if version is None:
            return None
        self.wish(version)
        record = self.world.record(version)
        if record.slot is None and not (record.host_claimed or record.device_claimed):
            self.world.bring_in(version)
        return self.start_or_cancel(version)

    def start_or_cancel(self, version):
        slot = self.activated(version)
        if slot is None:
            self.release(version)
            return None
        self.active.append((version, slot))
        return version, slot

    @rule(target=requests, run=consumes(running))
    def preempt(self, run):
        self.registry.deactivate(run[0])
        self.active.remove(run)
        return run[0]

    @rule(run=consumes(running))
    def finish_run(self, run):
        self.release(self.preempt(run))

    @rule(names=st.permutations(["a", "b", "c", "prod", "staging"]), key=KEYS)
    def visit(self, names, key):
        """Whole requests, where there is room; they leave idle copies."""
        for name in names:
            self.world.end_leases()
            run = self.admit_and_start(name, key)
            if run is not None:
                self.finish_run(run)

    @precondition(lambda self: self.named())
    @rule(target=calls, data=st.data(), tier=TIERS)
    def hold_for_call(self, data, tier):
        record = self.world.record(data.draw(st.sampled_from(sorted(self.named().values(), key=str))))
        self.registry.hold_for_call(record)
        (self.registry.want if tier is Tier.DEVICE else self.registry.want_host)(record)
        self.called.append(record.version)
        return record.version

    @rule(version=consumes(calls))
    def release_for_call(self, version):
        self.registry.release_for_call(self.world.record(version))
        self.called.remove(version)

    # Copies and time.

    @precondition(lambda self: any(r.host is None for r in self.registry.records.values()))
    @rule(target=host_claims, data=st.data(), urgent=st.booleans())
    def claim_host(self, data, urgent):
        on_disk = [v for v, r in self.registry.records.items() if r.host is None]
        version = data.draw(st.sampled_from(on_disk))
        if not self.registry.claim_host(version, urgent=urgent):
            return multiple()
        self.reading.append(version)
        return version

    @rule(version=consumes(host_claims), works=st.booleans())
    def end_host_claim(self, version, works):
        self.reading.remove(version)
        if works:
            self.registry.fill_host(version, Copy(SIZES[version.digest][0]))
        else:
            self.registry.abandon_host(version)
            self.drop(version, may_pass=False)

    @rule(target=device_claims)
    def claim_device(self):
        return some(self.start_copy())

    def start_copy(self):
        """Like the loader: the oldest wish that is in host memory; None: it does not fit."""
        head = next((r for r in self.registry.wanted.values() if r.host is not None and not r.device_claimed), None)
        if head is None or not self.registry.claim_device(head.version, self.world.now):
            return None
        self.copying.append((head.version, self.world.free_slots.pop()))
        return self.copying[-1]

    @rule(claim=consumes(device_claims), end=st.sampled_from(["works", "fails", "out of memory"]))
    def end_device_claim(self, claim, end):
        version, slot = claim
        self.copying.remove(claim)
        if end == "works":
            self.registry.fill_device(version, slot, self.world.now)
        else:
            self.world.free_slot(slot)
            self.registry.abandon_device(version)
            self.drop(version, may_pass=end == "out of memory")

    @rule(target=requests, name=IDS | NAMES, key=KEYS, end=st.sampled_from(["fails", "out of memory"]))
    def run_into_trouble(self, name, key, end):
        """A request waits for a copy, and the one under way does not come."""
        version = self.admit(name, "", key)
        if version is not None:
            self.wish(version)
            claim = self.start_copy()
            if claim is not None:
                self.end_device_claim(claim, end)
        return some(version)

    @rule()
    def loader_catches_up(self):
        self.world.serve_wishes()

    @precondition(lambda self: self.registry.records)
    @rule(data=st.data())
    def fail_version(self, data):
        self.drop(data.draw(st.sampled_from(sorted(self.registry.records, key=str))), may_pass=False)

    def drop(self, version, *, may_pass):
        """A version cannot be served; if that may pass, one that requests can name gets an heir."""
        was_known = version in self.registry.records and version not in self.dropped
        was_named = version in self.named().values()
        if may_pass:
            self.registry.fail_waiting(version, NO_MEMORY)
        else:
            self.registry.fail_version(version, GONE)
        if not was_known:
            return
        self.dropped.add(version)
        heir = self.live(version.adapter_id, version.digest)
        assert (heir is not None) == (may_pass and was_named)
        assert heir is None or heir.incarnation > version.incarnation
        if self.current.get(version.adapter_id) == version:
            del self.current[version.adapter_id]
            self.current |= {heir.adapter_id: heir} if heir else {}

    @rule(seconds=st.integers(1, 10))
    def time_passes(self, seconds):
        self.world.now += seconds
        late = {r.version for r in self.registry.draining if r.deadline <= self.world.now}
        assert not late & {*self.named().values(), *self.proven}
        expired = self.registry.expire(self.world.now)
        self.dropped |= late
        assert set(expired) == late & {*self.held, *self.called} and len(expired) == len(set(expired))

    def teardown(self):
        """When everything ends, nothing is left."""
        for version in self.reading:
            self.registry.abandon_host(version)
        for version, slot in self.copying:
            self.world.free_slot(slot)
            self.registry.abandon_device(version)
        for version, _ in self.active:
            self.registry.deactivate(version)
        for version in self.held:
            self.registry.release(version)
        for version in self.called:
            self.registry.release_for_call(self.world.record(version))
        for version in self.proven:
            self.registry.drop_candidate(self.world.record(version), self.world.now)
        for ticket in self.loading:
            self.registry.fail_load(*ticket, AdapterInvalidError("shut down"))
        for name in self.aliases:
            self.world.delete_alias(name)
        for adapter_id in "abc":
            self.registry.pin(adapter_id, None)
            if adapter_id in self.registry.current:
                self.world.unload(adapter_id)
        check_integrity(self.registry)
        assert self.world.is_empty()


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
