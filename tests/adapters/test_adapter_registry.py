"""The registry's state machine: versions, references, draining, tiers, budgets."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule
from lorikeet.adapters.errors import (
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterUnloadedError,
    ServingError,
)
from lorikeet.adapters.info import AdapterState, Tier
from lorikeet.adapters.listing import get_info, list_infos
from lorikeet.adapters.registry import MAX_FAILED, Registry
from lorikeet.adapters.report import AdapterReport, Origin
from lorikeet.adapters.residency import LEASE_S
from lorikeet.adapters.version import AdapterVersion

ORIGIN = Origin(Path("/adapters/x"), AdapterReport("LoRA", "", 1, 1, {}), None, 0.0)


class Copy:
    """A host copy."""

    def __init__(self, nbytes):
        self.nbytes = nbytes


class World:
    """A registry with the parts of manager and loader that drive it, one call each."""

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

    def finish(self, version, ticket, size=10):
        return self.registry.finish_load(
            version, ticket, ORIGIN, host_bytes=size, device_bytes=size, drain_until=self.now + 30
        )

    def load(self, adapter_id, digest="d1", size=10):
        version = AdapterVersion(adapter_id, digest)
        self.finish(version, self.registry.begin_load(adapter_id), size)
        if self.registry.claim_host(version, urgent=False):
            self.registry.fill_host(version, Copy(size))
        return version

    def bring_in(self, version):
        """What the loader does for a wanted version; whether it could."""
        record = self.registry.records[version]
        if record.host is None:
            if not self.registry.claim_host(version, urgent=True):
                return False
            self.registry.fill_host(version, Copy(record.host_bytes))
        if not self.registry.claim_device(version, self.now):
            return False
        self.registry.fill_device(version, self.free_slots.pop(), self.now)
        return True

    def run(self, adapter_id):
        """A request that got as far as running: its version."""
        version = self.registry.resolve(adapter_id)
        if self.registry.activate(version) is None:
            assert self.bring_in(version)
            assert self.registry.activate(version) is not None
        return version

    def end(self, version):
        self.registry.deactivate(version)
        self.registry.release(version)

    def tier(self, version):
        return self.registry.records[version].tier


@pytest.fixture
def world():
    return World()


def test_registry_imports_no_torch():
    """The state machine is plain Python; anyone may reason about it without a device."""
    import subprocess

    code = "import sys, lorikeet.adapters.registry, lorikeet.adapters.listing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_id_is_not_found_and_never_the_base(world):
    with pytest.raises(AdapterNotFoundError, match="'nope'"):
        world.registry.resolve("nope")


def test_ten_thousand_invented_ids_store_nothing(world):
    for i in range(10_000):
        with pytest.raises(AdapterNotFoundError):
            world.registry.resolve(f"invented-{i}")
        with pytest.raises(AdapterNotFoundError):
            world.registry.unload(f"invented-{i}", 0.0)
    assert not (world.registry.records or world.registry.current or world.registry.failed or world.registry.loading)


def test_ten_thousand_failed_ids_are_bounded(world):
    for i in range(10_000):
        ticket = world.registry.begin_load(f"bad-{i}")
        world.registry.fail_load(f"bad-{i}", ticket, AdapterInvalidError("broken"))
    assert len(world.registry.failed) == MAX_FAILED and not world.registry.loading
    assert get_info(world.registry, "bad-9999").error == "broken"


def test_replacing_makes_a_new_version_and_the_old_one_drains(world):
    old = world.load("a", "v1")
    pinned = world.registry.resolve("a")
    new = world.load("a", "v2")
    assert pinned == old and world.registry.resolve("a") == new
    assert [i.state for i in list_infos(world.registry)] == [AdapterState.READY, AdapterState.DRAINING]
    world.registry.release(pinned)
    assert old not in world.registry.records and world.registry.memory.host_used == 10


def test_version_without_requests_goes_at_once_when_replaced(world):
    old = world.load("a", "v1")
    world.load("a", "v2")
    assert list(world.registry.records) == [AdapterVersion("a", "v2")] and old.digest == "v1"


def test_same_content_again_changes_nothing(world):
    version = world.load("a")
    world.registry.resolve("a")
    assert world.load("a") == version
    assert world.registry.records[version].in_flight == 1 and len(world.registry.records) == 1


def test_going_back_to_draining_content_revives_it(world):
    first = world.load("a", "v1")
    world.registry.resolve("a")
    world.load("a", "v2")
    world.load("a", "v1")
    record = world.registry.records[first]
    assert record.current and record.in_flight == 1
    assert world.registry.expire(1000.0) == []


def test_same_digest_under_two_ids_is_two_versions(world):
    a, b = world.load("a", "v"), world.load("b", "v")
    assert a != b
    world.registry.unload("a", 30.0)
    assert world.registry.resolve("b") == b


def test_unload_makes_later_resolves_fail_and_lets_running_requests_finish(world):
    world.load("a")
    version = world.run("a")
    world.registry.unload("a", 30.0)
    with pytest.raises(AdapterNotFoundError):
        world.registry.resolve("a")
    assert world.tier(version) is Tier.DEVICE
    world.end(version)
    assert not world.registry.records and len(world.free_slots) == 4 and world.registry.memory.device_used == 0


def test_drain_deadline_drops_what_requests_still_hold(world):
    version = world.load("a")
    waiting, running = world.registry.resolve("a"), world.run("a")
    world.registry.unload("a", 30.0)
    assert world.registry.next_deadline() == 30.0
    assert world.registry.expire(29.0) == []
    assert world.registry.expire(30.0) == [version]
    assert world.registry.expire(31.0) == []
    with pytest.raises(AdapterUnloadedError, match="drain deadline"):
        world.registry.activate(waiting)
    assert world.tier(version) is Tier.DEVICE, "rows still run on it"
    world.registry.deactivate(running)
    assert world.tier(version) is Tier.DISK
    for _ in range(2):
        world.registry.release(version)
    assert not world.registry.records


def test_unload_during_the_first_load_discards_it(world):
    ticket = world.registry.begin_load("a")
    assert get_info(world.registry, "a").state is AdapterState.LOADING
    with pytest.raises(AdapterNotFoundError, match="still being loaded"):
        world.registry.resolve("a")
    world.registry.unload("a", 0.0)
    assert world.finish(AdapterVersion("a", "v"), ticket) is None
    assert not world.registry.records and not world.registry.loading


def test_load_that_was_overtaken_by_a_later_one_is_discarded(world):
    slow, fast = world.registry.begin_load("a"), world.registry.begin_load("a")
    assert world.finish(AdapterVersion("a", "new"), fast) is not None
    assert world.finish(AdapterVersion("a", "old"), slow) is None
    assert world.registry.resolve("a").digest == "new"


def test_failed_replacement_keeps_the_current_version_and_says_so(world):
    version = world.load("a")
    world.registry.fail_load("a", world.registry.begin_load("a"), AdapterInvalidError("half a file"))
    info = get_info(world.registry, "a")
    assert (info.state, info.digest, info.error) == (AdapterState.READY, version.digest, "half a file")
    world.load("a", "v2")
    assert get_info(world.registry, "a").error is None


def test_failed_first_load_is_listed_with_its_reason_and_forgotten_by_unload(world):
    world.registry.fail_load("a", world.registry.begin_load("a"), AdapterInvalidError("no config"))
    assert get_info(world.registry, "a").state is AdapterState.FAILED
    with pytest.raises(AdapterNotFoundError, match="no config"):
        world.registry.resolve("a")
    world.registry.unload("a", 0.0)
    assert list_infos(world.registry) == []


def test_least_recently_used_idle_adapter_is_evicted_from_the_device():
    world = World(device_budget=25)
    for name in "abc":
        world.load(name)
    for name in "aba":
        world.end(world.run(name))
    world.end(world.run("c"))
    assert world.tier(AdapterVersion("b", "d1")) is Tier.HOST
    assert world.tier(AdapterVersion("a", "d1")) is Tier.DEVICE
    assert world.evictions == [Tier.DEVICE]


def test_running_adapters_are_never_evicted():
    world = World(device_budget=20)
    for name in "abc":
        world.load(name)
    running = [world.run("a"), world.run("b")]
    waiting = world.registry.resolve("c")
    assert world.registry.activate(waiting) is None
    assert not world.bring_in(waiting)
    world.end(running[0])
    assert world.bring_in(waiting)


def test_slots_limit_adapters_too():
    world = World(max_slots=1)
    world.load("a"), world.load("b")
    world.end(world.run("a"))
    world.end(world.run("b"))
    assert world.tier(AdapterVersion("a", "d1")) is Tier.HOST


def test_base_requests_need_no_slot(world):
    """There is no version for the base, so nothing to resolve, activate or evict for it."""
    assert world.registry.memory.device_used == 0 and len(world.free_slots) == 4


def test_adapter_brought_in_for_a_request_is_kept_until_the_request_had_time_to_run():
    world = World(device_budget=10)
    world.load("a"), world.load("b")
    first, second = world.registry.resolve("a"), world.registry.resolve("b")
    assert world.registry.activate(first) is None and world.registry.activate(second) is None
    assert world.bring_in(first)
    assert not world.bring_in(second)
    world.now += LEASE_S
    assert world.bring_in(second)
    assert world.tier(first) is Tier.HOST


def test_eviction_prefers_adapters_that_no_request_holds():
    world = World(device_budget=20)
    world.load("held"), world.load("idle"), world.load("new")
    held = world.run("held")
    world.registry.deactivate(held)  # preempted: older than idle, but a request holds it
    world.end(world.run("idle"))
    world.end(world.run("new"))
    assert world.tier(held) is Tier.DEVICE


def test_host_budget_evicts_idle_copies_and_keeps_the_adapters_known():
    world = World(host_budget=20)
    versions = [world.load(name) for name in "abc"]
    assert [world.tier(v) for v in versions] == [Tier.DISK, Tier.HOST, Tier.HOST]
    assert world.registry.resolve("a") == versions[0]
    assert world.evictions == [Tier.HOST]


def test_new_adapter_does_not_push_out_the_last_copy_of_one_that_requests_hold():
    world = World(host_budget=10)
    a = world.load("a")
    world.registry.resolve("a")
    b = world.load("b")
    assert (world.tier(a), world.tier(b)) == (Tier.HOST, Tier.DISK)


def test_last_copy_of_a_draining_version_is_never_evicted():
    """Its folder has other content by now: it could not be read again."""
    world = World(host_budget=10, device_budget=10)
    draining = world.load("a", "v1")
    world.registry.resolve("a")
    world.load("a", "v2")
    waiting = world.registry.resolve("a")
    assert world.registry.activate(waiting) is None
    assert not world.registry.claim_host(waiting, urgent=True)
    assert world.tier(draining) is Tier.HOST


def test_last_copy_of_a_draining_version_stays_on_the_device_too():
    world = World(host_budget=10, device_budget=10)
    draining, other = world.load("a", "v1"), world.load("b")
    running = world.run("a")
    assert world.registry.records[draining].host is not None
    waiting = world.registry.resolve("b")
    assert world.registry.activate(waiting) is None
    assert world.registry.claim_host(other, urgent=True), "the copy beside the one on the device may go"
    world.registry.fill_host(other, Copy(10))
    world.load("a", "v2")
    world.registry.deactivate(running)  # preempted
    assert not world.registry.claim_device(other, 1000.0)
    assert world.tier(draining) is Tier.DEVICE


def test_waiting_request_may_push_out_last_copies_that_can_be_read_again():
    world = World(host_budget=10)
    a, b = world.load("a"), world.load("b")
    world.registry.resolve("a")
    waiting = world.registry.resolve("b")
    assert world.registry.activate(waiting) is None
    assert world.bring_in(waiting)
    assert (world.tier(a), world.tier(b)) == (Tier.DISK, Tier.DEVICE)


def test_wish_of_a_cancelled_request_is_forgotten(world):
    version = world.load("a")
    world.registry.resolve("a")
    world.registry.activate(version)
    assert list(world.registry.wanted) == [version]
    world.registry.release(version)
    assert not world.registry.wanted


def test_version_that_cannot_be_read_again_fails_its_requests_only(world):
    version, other = world.load("a"), world.load("b")
    world.registry.resolve("a")
    world.registry.resolve("b")
    world.registry.fail_version(version, AdapterUnloadedError("folder changed"))
    with pytest.raises(AdapterUnloadedError, match="folder changed"):
        world.registry.activate(version)
    assert world.registry.activate(other) is None
    assert get_info(world.registry, "a").state is AdapterState.FAILED
    world.load("a", "v2")
    assert get_info(world.registry, "a").state is AdapterState.READY
    world.registry.release(version)
    world.registry.check_integrity()


def test_error_is_raised_as_a_new_instance_each_time(world):
    version = world.load("a")
    world.registry.resolve("a")
    world.registry.fail_version(version, AdapterUnloadedError("gone", {"k": "v"}))
    errors = []
    for _ in range(2):
        with pytest.raises(AdapterUnloadedError) as error:
            world.registry.activate(version)
        errors.append(error.value)
    assert errors[0] is not errors[1] and errors[1].metadata == {"k": "v"}


def test_copy_that_finishes_after_its_version_was_dropped_is_freed(world):
    version = world.load("a")
    world.registry.resolve("a")
    world.registry.activate(version)
    assert world.registry.claim_device(version, 0.0)
    world.registry.unload("a", 0.0)
    world.registry.expire(0.0)
    world.registry.release(version)
    assert version in world.registry.records, "its memory is being written"
    world.registry.fill_device(version, world.free_slots.pop(), 0.0)
    assert not world.registry.records and world.registry.memory.device_used == 0 and len(world.free_slots) == 4


def test_unmatched_release_and_deactivate_are_our_bugs(world):
    version = world.load("a")
    with pytest.raises(AssertionError):
        world.registry.release(version)
    with pytest.raises(AssertionError):
        world.registry.deactivate(version)
    with pytest.raises(AssertionError):
        world.registry.activate(version)


IDS = st.sampled_from("abc")
DIGESTS = st.sampled_from(["d1", "d2", "d3"])
SIZES = {"d1": 5, "d2": 12, "d3": 20}


class RegistryMachine(RuleBasedStateMachine):
    """Loads, requests and copies in any order and interleaving, against a small model."""

    tickets = Bundle("tickets")
    requests = Bundle("requests")
    running = Bundle("running")
    host_claims = Bundle("host_claims")
    device_claims = Bundle("device_claims")

    def __init__(self):
        super().__init__()
        self.world = World(host_budget=30, device_budget=30, max_slots=2)
        self.registry = self.world.registry
        self.held = []  # versions, once for each request
        self.active = []  # (version, slot), once for each running request
        self.loading = []  # (id, ticket) begun
        self.claims = []  # (kind, version)
        self.had_copy = set()
        self.outdated = set()  # tickets whose results must be discarded

    @rule(target=tickets, adapter_id=IDS)
    def begin_load(self, adapter_id):
        ticket = (adapter_id, self.registry.begin_load(adapter_id))
        self.loading.append(ticket)
        return ticket

    @rule(ticket=consumes(tickets), digest=DIGESTS)
    def finish_load(self, ticket, digest):
        self.loading.remove(ticket)
        version = AdapterVersion(ticket[0], digest)
        record = self.world.finish(version, ticket[1], SIZES[digest])
        assert (record is None) == (ticket in self.outdated)
        if record is not None:
            assert self.registry.current[ticket[0]] is record and record.version == version
            self.outdated.update(t for t in self.loading if t[0] == ticket[0] and t[1] < ticket[1])

    @rule(adapter_id=IDS, digest=DIGESTS, keep=st.booleans())
    def load(self, adapter_id, digest, keep):
        """All of a load at once, so that random walks get further."""
        version = AdapterVersion(adapter_id, digest)
        self.world.finish(version, self.registry.begin_load(adapter_id), SIZES[digest])
        self.outdated.update(t for t in self.loading if t[0] == adapter_id)
        if keep and self.registry.claim_host(version, urgent=False):
            self.registry.fill_host(version, Copy(SIZES[digest]))

    @rule(target=running, adapter_id=IDS)
    def run(self, adapter_id):
        """All of a request's start at once, if there is room."""
        if adapter_id not in self.registry.current:
            return multiple()
        version = self.resolve(adapter_id)
        slot = self.registry.activate(version)
        record = self.registry.records[version]
        if slot is None and not record.host_claimed and not record.device_claimed and self.world.bring_in(version):
            slot = self.registry.activate(version)
        if slot is None:
            self.release(version)
            return multiple()
        self.active.append((version, slot))
        return version, slot

    @rule(target=requests, run=consumes(running))
    def finish_run(self, run):
        self.registry.deactivate(run[0])
        self.active.remove(run)
        self.release(run[0])
        return multiple()

    @rule(ticket=consumes(tickets))
    def fail_load(self, ticket):
        self.loading.remove(ticket)
        current = self.registry.current.get(ticket[0])
        self.registry.fail_load(*ticket, AdapterInvalidError("broken"))
        self.outdated.update(t for t in self.loading if t[0] == ticket[0] and t[1] < ticket[1])
        assert self.registry.current.get(ticket[0]) is current

    @rule(adapter_id=IDS, drain_s=st.integers(0, 20))
    def unload(self, adapter_id, drain_s):
        known = {i.adapter_id for i in list_infos(self.registry) if i.state is not AdapterState.DRAINING}
        try:
            self.registry.unload(adapter_id, self.world.now + drain_s)
        except AdapterNotFoundError:
            assert adapter_id not in self.registry.current and adapter_id not in self.registry.loading
        else:
            assert adapter_id in known and adapter_id not in self.registry.current
            self.outdated.update(t for t in self.loading if t[0] == adapter_id)

    @rule(target=requests, adapter_id=IDS)
    def resolve(self, adapter_id):
        try:
            version = self.registry.resolve(adapter_id)
        except AdapterNotFoundError:
            assert adapter_id not in self.registry.current
            return multiple()
        assert version == self.registry.current[adapter_id].version
        self.held.append(version)
        return version

    @rule(version=consumes(requests))
    def release(self, version):
        self.registry.release(version)
        self.held.remove(version)

    @rule(target=running, version=consumes(requests))
    def activate(self, version):
        try:
            slot = self.registry.activate(version)
        except ServingError:
            self.registry.release(version)
            self.held.remove(version)
            return multiple()
        if slot is None:
            self.registry.release(version)  # the model only: a waiting request that is cancelled later or now
            self.held.remove(version)
            return multiple()
        self.active.append((version, slot))
        return version, slot

    @rule(target=requests, version=requests)
    def wish(self, version):
        """A waiting request asks; it stays a waiting request."""
        try:
            slot = self.registry.activate(version)
        except ServingError:
            return multiple()
        if slot is not None:
            self.registry.deactivate(version)
        return multiple()

    @rule(target=requests, run=consumes(running))
    def preempt(self, run):
        self.registry.deactivate(run[0])
        self.active.remove(run)
        return run[0]

    @precondition(lambda self: any(r.host is None for r in self.registry.records.values()))
    @rule(target=host_claims, data=st.data(), urgent=st.booleans())
    def claim_host(self, data, urgent):
        on_disk = [v for v, r in self.registry.records.items() if r.host is None]
        version = data.draw(st.sampled_from(on_disk))
        if not self.registry.claim_host(version, urgent=urgent):
            return multiple()
        self.claims.append(("host", version))
        return version

    @rule(version=consumes(host_claims), works=st.booleans())
    def end_host_claim(self, version, works):
        self.claims.remove(("host", version))
        if works:
            self.registry.fill_host(version, Copy(SIZES[version.digest]))
        else:
            self.registry.abandon_host(version)

    @rule(target=device_claims)
    def claim_device(self):
        """Like the loader: the oldest wish that is in host memory."""
        head = next((r for r in self.registry.wanted.values() if r.host is not None and not r.device_claimed), None)
        if head is None or not self.registry.claim_device(head.version, self.world.now):
            return multiple()
        self.claims.append(("device", head.version))
        return head.version, self.world.free_slots.pop()

    @rule(claim=consumes(device_claims), works=st.booleans())
    def end_device_claim(self, claim, works):
        version, slot = claim
        self.claims.remove(("device", version))
        if works:
            self.registry.fill_device(version, slot, self.world.now)
        else:
            self.world.free_slot(slot)
            self.registry.abandon_device(version)
            self.registry.fail_version(version, AdapterUnloadedError("copy failed"))

    @rule(seconds=st.integers(1, 10))
    def time_passes(self, seconds):
        self.world.now += seconds
        for version in self.registry.expire(self.world.now):
            assert version in self.held

    @invariant()
    def bookkeeping_is_consistent(self):
        self.registry.check_integrity()

    @invariant()
    def no_version_is_freed_while_referenced(self):
        for version in self.held:
            assert self.registry.records[version].in_flight == self.held.count(version)
        for version, slot in self.active:
            assert self.registry.records[version].slot == slot and slot not in self.world.free_slots
            assert self.registry.records[version].active == sum(v == version for v, _ in self.active)

    @invariant()
    def draining_versions_keep_the_copy_they_had(self):
        """Their folders hold other content by now."""
        for version in self.held:
            record = self.registry.records[version]
            if record.error is None and record.deadline is not None:
                had_copy = version in self.had_copy
                assert not had_copy or record.host is not None or record.slot is not None
        self.had_copy = {v for v, r in self.registry.records.items() if r.host is not None or r.slot is not None}

    @invariant()
    def copies_under_way_keep_their_source_and_target(self):
        for kind, version in self.claims:
            record = self.registry.records[version]
            assert record.host_claimed if kind == "host" else record.device_claimed and record.host is not None

    @invariant()
    def every_slot_is_free_or_owned_once(self):
        owned = [r.slot for r in self.registry.records.values() if r.slot is not None]
        copying = sum(kind == "device" for kind, _ in self.claims)
        assert len(set(owned)) == len(owned) and not set(owned) & set(self.world.free_slots)
        assert len(owned) + copying + len(self.world.free_slots) == 2

    def teardown(self):
        """When everything ends, nothing is left."""
        for kind, version in self.claims:
            if kind == "host":
                self.registry.abandon_host(version)
            else:
                self.registry.abandon_device(version)
        for version, _ in self.active:
            self.registry.deactivate(version)
        for version in self.held:
            self.registry.release(version)
        for ticket in self.loading:
            self.registry.fail_load(*ticket, AdapterInvalidError("shut down"))
        for adapter_id in "abc":
            if adapter_id in self.registry.current:
                self.registry.unload(adapter_id, self.world.now)
        self.registry.check_integrity()
        assert not self.registry.records and not self.registry.wanted and not self.registry.loading
        assert self.registry.memory.host_used == self.registry.memory.device_used == 0


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
