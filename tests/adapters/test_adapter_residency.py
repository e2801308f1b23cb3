"""Which copies are evicted for which, which never are, and what finding that out costs."""

import pytest
from lorikeet.adapters.errors import AdapterUnloadedError
from lorikeet.adapters.info import Tier
from lorikeet.adapters.record import LEASE_S, Record
from lorikeet.adapters.residency import Residency
from lorikeet.adapters.rules import check_integrity
from lorikeet.adapters.version import AdapterVersion

from .registry_world import ORIGIN, Copy, World, held_copy

# Eviction from the device.


def test_least_recently_used_idle_adapter_is_evicted_from_the_device():
    world = World(device_budget=25)
    a, b, _ = (world.load(name) for name in "abc")
    for name in "abac":
        world.end(world.run(name))
    assert (world.tier(a), world.tier(b)) == (Tier.DEVICE, Tier.HOST)
    assert world.evictions == [Tier.DEVICE]


def test_running_adapters_are_never_evicted():
    world = World(device_budget=20)
    for name in "abc":
        world.load(name)
    running = [world.run("a"), world.run("b")]
    waiting = world.resolve("c")
    assert world.registry.activate(waiting) is None
    world.end_leases()
    assert not world.bring_in(waiting)
    world.end(running[0])
    assert world.bring_in(waiting)


def test_slots_limit_adapters_too():
    world = World(max_slots=1)
    a, _ = world.load("a"), world.load("b")
    world.end(world.run("a"))
    world.end(world.run("b"))
    assert world.tier(a) is Tier.HOST


def test_slot_that_is_being_filled_counts():
    world = World(max_slots=1)
    first, second = world.load("a"), world.load("b")
    world.resolve("a"), world.resolve("b")
    assert world.registry.claim_device(first, 0.0)
    assert not world.registry.claim_device(second, 0.0)
    world.registry.abandon_device(first)
    assert world.registry.claim_device(second, 0.0)


def test_several_small_copies_go_for_a_large_one_and_no_more_than_it_takes():
    world = World(device_budget=40)
    small = [world.load(name) for name in "abcd"]
    for version in small:
        world.end(world.run(version.adapter_id))
    large = world.load("large", size=15)
    world.end(world.run("large"))
    assert [world.tier(v) for v in small] == [Tier.HOST, Tier.HOST, Tier.DEVICE, Tier.DEVICE]
    assert world.tier(large) is Tier.DEVICE and world.registry.memory.device_used == 35


def test_nothing_is_evicted_for_a_copy_that_would_not_fit_anyway():
    world = World(device_budget=20)
    idle, _ = world.load("idle"), world.load("busy")
    world.end(world.run("idle"))
    world.run("busy")
    large = world.load("large", size=15)
    world.resolve("large")
    assert not world.registry.claim_device(large, 1000.0)
    assert world.tier(idle) is Tier.DEVICE and world.evictions == []


def test_adapter_brought_in_for_a_request_is_kept_until_the_request_had_time_to_run():
    world = World(device_budget=10)
    world.load("a"), world.load("b")
    first, second = world.resolve("a"), world.resolve("b")
    assert world.registry.activate(first) is None and world.registry.activate(second) is None
    assert world.bring_in(first)
    world.now += LEASE_S - 0.001
    assert not world.bring_in(second)
    world.now += 0.001
    assert world.bring_in(second)
    assert world.tier(first) is Tier.HOST


def test_lease_ends_with_the_requests_it_was_for():
    world = World(device_budget=10)
    world.load("a"), world.load("b")
    first, second = world.resolve("a"), world.resolve("b")
    world.registry.activate(first), world.registry.activate(second)
    assert world.bring_in(first)
    world.registry.release(first)
    assert world.bring_in(second)


def test_copy_that_nobody_waits_for_any_more_gets_no_lease():
    world = World(device_budget=10)
    first, second = world.load("a"), world.load("b")
    world.registry.activate(world.resolve("a"))
    assert world.registry.claim_device(first, 0.0)
    world.registry.release(first)  # cancelled while it is copied
    world.registry.fill_device(first, world.free_slots.pop(), 0.0)
    world.registry.activate(world.resolve("b"))
    assert world.bring_in(second)


def test_eviction_prefers_adapters_that_no_request_holds():
    world = World(device_budget=20)
    world.load("held"), world.load("idle"), world.load("new")
    held = world.run("held")
    world.registry.deactivate(held)  # preempted: older than idle, but a request holds it
    world.end(world.run("idle"))
    world.end(world.run("new"))
    assert world.tier(held) is Tier.DEVICE


def test_copy_of_a_pinned_adapter_is_never_evicted_from_its_tier():
    world = World(device_budget=20)
    pinned, other, new = world.load("pinned"), world.load("other"), world.load("new")
    world.registry.pin("pinned", Tier.DEVICE)
    world.serve_wishes()
    world.end_leases()
    world.end(world.run("other"))
    world.end(world.run("new"))
    assert [world.tier(v) for v in (pinned, other, new)] == [Tier.DEVICE, Tier.HOST, Tier.DEVICE]
    world.registry.pin("pinned", None)
    world.end_leases()
    world.end(world.run("other"))
    assert world.tier(pinned) is Tier.HOST


def test_pin_to_the_host_keeps_nothing_on_the_device():
    world = World(device_budget=10)
    pinned, _ = world.load("pinned"), world.load("other")
    world.registry.pin("pinned", Tier.HOST)
    world.end(world.run("pinned"))
    world.end(world.run("other"))
    assert world.tier(pinned) is Tier.HOST


# Eviction from host memory.


def test_host_budget_evicts_idle_copies_and_keeps_the_adapters_known():
    world = World(host_budget=20)
    versions = [world.load(name) for name in "abc"]
    assert [world.tier(v) for v in versions] == [Tier.DISK, Tier.HOST, Tier.HOST]
    assert world.resolve("a") == versions[0]
    assert world.evictions == [Tier.HOST]


def test_new_adapter_does_not_push_out_the_last_copy_of_one_that_requests_hold():
    world = World(host_budget=10)
    a = world.load("a")
    world.resolve("a")
    b = world.load("b")
    assert (world.tier(a), world.tier(b)) == (Tier.HOST, Tier.DISK)


@pytest.mark.parametrize("held_by", ["alias", "pin"])
def test_new_adapter_does_not_push_out_the_last_copy_of_one_that_is_kept_on_purpose(held_by):
    world = World(host_budget=10)
    a = world.load("a")
    if held_by == "alias":
        world.set_alias("prod", a)
    else:
        world.registry.pin("a", Tier.HOST)
    assert (world.tier(a), world.tier(world.load("b"))) == (Tier.HOST, Tier.DISK)


def test_host_copy_of_a_pinned_adapter_does_not_go_for_waiting_requests_either():
    world = World(host_budget=20)
    pinned = world.load("pinned")
    world.registry.pin("pinned", Tier.HOST)
    on_disk, in_host = world.load("b"), world.load("c")
    world.resolve("b"), world.resolve("c")
    assert (world.tier(on_disk), world.tier(in_host)) == (Tier.DISK, Tier.HOST)
    assert world.registry.claim_host(on_disk, urgent=True)
    assert (world.tier(pinned), world.tier(in_host)) == (Tier.HOST, Tier.DISK)


def test_copy_beside_one_on_the_device_goes_before_a_last_copy():
    world = World(host_budget=20)
    both, last = world.load("both"), world.load("last")
    world.run("both")
    world.resolve("last")
    third = world.load("third")
    assert held_copy(world.record(both)) == {Tier.DEVICE} and held_copy(world.record(last)) == {Tier.HOST}
    assert world.tier(third) is Tier.HOST


def test_copy_beside_one_on_the_device_goes_before_a_last_copy_that_waiting_requests_could_push_out():
    world = World(host_budget=20)
    world.load("waiting")
    last = world.load("last")
    world.resolve("last")
    both = world.load("both")
    world.run("both")
    waiting = world.resolve("waiting")
    assert world.tier(waiting) is Tier.DISK and world.registry.claim_host(waiting, urgent=True)
    assert held_copy(world.record(both)) == {Tier.DEVICE} and held_copy(world.record(last)) == {Tier.HOST}


def test_device_copy_beside_one_in_host_memory_goes_before_a_last_copy():
    world = World(host_budget=20, device_budget=20)
    last, both = world.load("last"), world.load("both")
    for version in (world.run("last"), world.run("both")):
        world.registry.deactivate(version)  # preempted
    third = world.load("third")  # takes the host copy of the one used longest ago
    assert held_copy(world.record(last)) == {Tier.DEVICE}
    assert world.registry.claim_device(third, world.now)
    assert held_copy(world.record(last)) == {Tier.DEVICE} and held_copy(world.record(both)) == {Tier.HOST}


def test_host_copy_that_is_being_copied_from_stays():
    world = World(host_budget=10)
    source = world.load("source")
    world.resolve("source")
    assert world.registry.claim_device(source, 0.0)
    other = world.load("other")
    assert world.tier(other) is Tier.DISK and not world.registry.claim_host(other, urgent=True)
    world.registry.fill_device(source, world.free_slots.pop(), 0.0)
    assert world.registry.claim_host(other, urgent=True)


def test_last_copy_of_a_draining_version_is_never_evicted():
    """Its folder has other content by now: it could not be read again."""
    world = World(host_budget=10, device_budget=10)
    draining = world.load("a", "v1")
    world.resolve("a")
    world.load("a", "v2")
    waiting = world.resolve("a")
    assert world.registry.activate(waiting) is None
    assert not world.registry.claim_host(waiting, urgent=True)
    assert world.tier(draining) is Tier.HOST


def test_last_copy_of_a_draining_version_stays_on_the_device_too():
    world = World(host_budget=10, device_budget=10)
    draining, other = world.load("a", "v1"), world.load("b")
    running = world.run("a")
    assert world.record(draining).host is not None
    waiting = world.resolve("b")
    assert world.registry.activate(waiting) is None
    assert world.registry.claim_host(other, urgent=True), "the copy beside the one on the device may go"
    world.registry.fill_host(other, Copy(10))
    world.load("a", "v2")
    world.registry.deactivate(running)  # preempted
    assert not world.registry.claim_device(other, 1000.0)
    assert world.tier(draining) is Tier.DEVICE


@pytest.mark.parametrize("why", ["draining", "aliased"])
def test_last_copy_of_an_old_version_may_go_when_its_files_are_stored(why):
    world = World(host_budget=10, device_budget=10)
    old = world.load("a", "v1")
    world.record(old).is_stored = True
    if why == "draining":
        world.resolve("a")
    else:
        world.set_alias("prod", old)
    world.load("a", "v2")
    waiting = world.resolve("a")
    assert world.registry.activate(waiting) is None and world.bring_in(waiting)
    assert world.tier(old) is Tier.DISK


def test_waiting_request_may_push_out_last_copies_that_can_be_read_again():
    world = World(host_budget=10)
    a, b = world.load("a"), world.load("b")
    world.resolve("a")
    waiting = world.resolve("b")
    assert world.registry.activate(waiting) is None
    assert world.bring_in(waiting)
    assert (world.tier(a), world.tier(b)) == (Tier.DISK, Tier.DEVICE)


def test_two_waiting_requests_do_not_push_out_each_others_copy():
    """Or each would be read for ever, and neither would run."""
    world = World(host_budget=10)
    first = world.load("a")
    world.registry.activate(world.resolve("a"))
    second = world.load("b")
    world.registry.activate(world.resolve("b"))
    assert world.tier(first) is Tier.HOST and not world.registry.claim_host(second, urgent=True)
    assert world.bring_in(first) and world.bring_in(second)


# Bookkeeping.


def test_no_second_claim_while_a_copy_is_there_or_under_way():
    world = World()
    version = world.load("a")
    assert not world.registry.claim_host(version, urgent=True)
    large = world.load("large", size=200)
    world.registry.memory.host_budget = 300
    assert world.registry.claim_host(large, urgent=False)
    assert not world.registry.claim_host(large, urgent=True)
    world.registry.abandon_host(large)
    assert world.registry.memory.host_used == 10 and world.registry.claim_host(large, urgent=True)


def test_copy_larger_than_the_budget_never_fits():
    world = World(host_budget=10, device_budget=10)
    memory = world.registry.memory
    assert memory.room_in_host(10).fits and memory.room_on_device(10, 0.0).fits
    assert not memory.room_in_host(11, urgent=True).fits and not memory.room_on_device(11, 0.0).fits


def test_asking_for_room_names_the_victims_and_changes_nothing():
    world = World(host_budget=30, device_budget=20)
    a, b = world.load("a"), world.load("b")
    for name in "ab":
        world.end(world.run(name))
    world.end_leases()
    memory = world.registry.memory
    in_host, on_device = memory.room_in_host(25), memory.room_on_device(15, world.now)
    assert in_host.fits and [r.version for r in in_host.victims] == [a, b]
    assert on_device.fits and [r.version for r in on_device.victims] == [a, b]
    assert world.evictions == [] and world.tier(a) is world.tier(b) is Tier.DEVICE


def test_heir_of_the_same_content_takes_over_the_host_copy_and_its_bytes():
    slots = []
    memory = Residency(host_budget=10, device_budget=10, max_slots=1, free_slot=slots.append, on_evict=slots.append)
    record, heir = (Record(AdapterVersion("a", "d", i), ORIGIN, 10, 10, is_current=True) for i in (1, 2))
    assert memory.claim_host(record, urgent=False)
    copy = Copy(10)
    memory.fill_host(record, copy)
    memory.hand_over(record, heir)
    assert (record.host, heir.host, memory.host_used) == (None, copy, 10)
    memory.check_integrity()
    memory.drop_host(record)
    memory.drop_host(heir)
    memory.check_integrity()
    assert memory.host_used == 0 and not slots


def test_heir_of_a_version_without_copy_has_none_either():
    world = World(host_budget=5)
    version = world.load("a")
    world.resolve("a")
    world.registry.fail_waiting(version, AdapterUnloadedError("no memory"))
    assert world.registry.current["a"].tier is Tier.DISK and world.registry.memory.host_used == 0
    check_integrity(world.registry)


# Cost.


class Landmine(Record):
    """A record that nobody may look at."""

    __slots__ = ()

    def __getattribute__(self, name):
        raise AssertionError(f"a version on disk was looked at: {name}")


def test_cost_does_not_grow_with_the_adapters_on_disk():
    """Ten thousand versions have been in memory and are on disk; bringing others in and out does not look at them."""
    world = World(host_budget=40, device_budget=20, max_slots=2)
    registry = world.registry
    for i in range(10_000):
        world.load(f"disk-{i}")
    few = [world.load(f"few-{i}") for i in range(8)]
    on_disk = [r for r in registry.records.values() if r.tier is Tier.DISK and r.version not in few]
    assert len(on_disk) > 9_990
    for record in on_disk:
        record.__class__ = Landmine
    for _ in range(3):
        for version in few:
            world.end(world.run(version.adapter_id))
            world.end_leases()
    assert len(world.evictions) > 9_990 + 3 * 8
    registry.pin("few-0", Tier.DEVICE)
    world.set_alias("prod", few[1], few[2])
    world.end(world.run("prod"))
    world.load("few-3", "v2")
    world.unload("few-3")
    world.serve_wishes()
    assert registry.expire(1000.0) == [] and world.tier(few[0]) is Tier.DEVICE
    registry.memory.check_integrity()
