"""Candidates, holds by calls, wishes, pins: what keeps a version, and for how long."""

import pytest
from lorikeet.adapters.errors import AdapterInUseError, AdapterMemoryError, AdapterNotFoundError, AdapterUnloadedError
from lorikeet.adapters.info import AdapterState, Tier
from lorikeet.adapters.listing import find_info, record_info
from lorikeet.adapters.rules import check_integrity, check_unload

from .registry_world import Copy, World


@pytest.fixture
def world():
    world = World()
    yield world
    check_integrity(world.registry)


# Candidates.


def test_candidate_can_be_held_and_run_but_not_named(world):
    record = world.add_candidate("a", "abcd")
    for reference in (("a", ""), ("a", "abcd")):
        with pytest.raises(AdapterNotFoundError):
            world.resolve(*reference)
    assert record_info(record).state is AdapterState.LOADING and record_info(record).in_flight == 0
    world.registry.hold(record.version)  # the prover's request
    assert world.registry.activate(record.version) is None
    assert world.bring_in(record.version) and world.registry.activate(record.version) is not None
    world.end(record.version)


def test_refused_candidate_is_gone_at_once(world):
    record = world.add_candidate("a")
    assert world.registry.claim_host(record.version, urgent=True)
    world.registry.fill_host(record.version, Copy(10))
    world.registry.drop_candidate(record, world.drain_until)
    assert world.is_empty()


def test_refused_candidate_waits_for_the_requests_that_prove_it(world):
    record = world.add_candidate("a")
    world.registry.hold(record.version)
    world.registry.drop_candidate(record, world.drain_until)
    assert record_info(record).state is AdapterState.DRAINING and world.registry.next_deadline() == world.drain_until
    world.registry.release(record.version)
    assert world.is_empty()


def test_candidate_that_becomes_current_stays(world):
    ticket = world.registry.loading.begin("a")
    record = world.add_candidate("a")
    assert world.finish("a", "d1", ticket) is record
    world.registry.drop_candidate(record, world.drain_until)
    assert world.resolve("a") == record.version and record.deadline is None and record.holds == 0


def test_candidate_that_an_alias_takes_stays(world):
    record = world.add_candidate("a", "v0")
    world.set_alias("prod", record.version)
    world.registry.drop_candidate(record, world.drain_until)
    assert world.resolve("prod") == record.version
    with pytest.raises(AdapterNotFoundError):
        world.resolve("a")


def test_known_content_as_candidate_is_merely_held(world):
    version = world.load("a", "v1")
    record = world.add_candidate("a", "v1")
    assert record is world.record(version) and world.resolve("a") == version
    world.load("a", "v2")
    world.registry.drop_candidate(record, world.drain_until)
    assert version in world.registry.records, "a request holds it"
    world.registry.release(version)
    assert version not in world.registry.records


def test_draining_content_as_candidate_is_not_dropped_at_the_deadline(world):
    version = world.load("a")
    world.resolve("a")
    world.unload("a")
    record = world.add_candidate("a")
    assert record.version == version and world.registry.expire(1000.0) == []
    world.registry.drop_candidate(record, 2000.0)
    assert world.registry.expire(2000.0) == [version]
    world.registry.release(version)
    assert world.is_empty()


def test_candidate_of_two_calls_stays_one_until_both_have_ended(world):
    """One call that fails must not set a deadline to the other."""
    first, second = world.add_candidate("a"), world.add_candidate("a")
    assert first is second
    world.registry.drop_candidate(first, world.drain_until)
    assert world.registry.expire(1000.0) == [] and second.error is None
    world.registry.drop_candidate(second, world.drain_until)
    assert world.is_empty()


def test_candidate_that_fails_while_it_is_proven_is_not_found_again(world):
    record = world.add_candidate("a")
    world.registry.fail_waiting(record.version, AdapterMemoryError("no memory"))
    assert record.error is not None and "a" not in world.registry.by_id
    again = world.add_candidate("a")
    assert again is not record and again.error is None
    for candidate in (record, again):
        world.registry.drop_candidate(candidate, world.drain_until)
    assert world.is_empty()


def test_device_without_memory_just_after_a_candidate_became_current(world):
    """Between publishing and the end of the call it is both; later requests get a version without the error."""
    ticket = world.registry.loading.begin("a")
    record = world.add_candidate("a")
    world.finish("a", "d1", ticket)
    world.registry.fail_waiting(record.version, AdapterMemoryError("no memory"))
    world.registry.drop_candidate(record, world.drain_until)
    later = world.resolve("a")
    assert later != record.version and world.record(later).error is None


def test_device_without_memory_just_after_an_alias_took_a_candidate(world):
    record = world.add_candidate("a")
    world.set_alias("prod", record.version)
    world.registry.fail_waiting(record.version, AdapterMemoryError("no memory"))
    world.registry.drop_candidate(record, world.drain_until)
    assert world.resolve("prod") != record.version


# Holds by calls, and wishes.


def test_call_that_holds_a_version_is_no_request_in_flight(world):
    record = world.record(world.load("a"))
    world.resolve("a")
    world.registry.hold_for_call(record)
    assert record.in_flight == 2 and record.holds == 1 and find_info(world.registry, "a").in_flight == 1
    world.registry.release_for_call(record)
    assert record.in_flight == 1 and record.holds == 0


def test_call_keeps_a_version_that_is_unloaded_meanwhile(world):
    record = world.record(world.load("a"))
    world.registry.hold_for_call(record)
    world.unload("a")
    assert world.registry.records and world.registry.next_deadline() is not None
    world.registry.release_for_call(record)
    assert world.is_empty()


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DEVICE])
def test_wish_of_a_call_brings_the_version_in_and_ends_with_it(tier):
    world = World(host_budget=10)
    world.load("a")
    world.load("b")
    record = world.registry.current["a"]
    assert record.tier is Tier.DISK
    world.registry.hold_for_call(record)
    (world.registry.want if tier is Tier.DEVICE else world.registry.want_host)(record)
    world.serve_wishes()
    assert record.tier is tier
    world.registry.release_for_call(record)
    assert not world.registry.wanted and not world.registry.host_wanted
    check_integrity(world.registry)


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DEVICE])
def test_wish_of_a_call_that_gives_up_is_forgotten(tier):
    world = World(host_budget=10)
    world.load("a")
    world.load("b")
    record = world.registry.current["a"]
    world.registry.hold_for_call(record)
    (world.registry.want if tier is Tier.DEVICE else world.registry.want_host)(record)
    assert [*world.registry.wanted, *world.registry.host_wanted] == [record.version]
    world.registry.release_for_call(record)
    assert not world.registry.wanted and not world.registry.host_wanted and not record.wanted
    check_integrity(world.registry)


def test_wish_of_a_cancelled_request_is_forgotten(world):
    version = world.load("a")
    world.resolve("a")
    world.registry.activate(version)
    assert list(world.registry.wanted) == [version]
    world.registry.release(version)
    assert not world.registry.wanted


def test_wish_outlives_the_request_whose_it_was_while_another_holds_the_version(world):
    version = world.load("a")
    world.resolve("a"), world.resolve("a")
    world.registry.activate(version)
    world.registry.release(version)
    assert list(world.registry.wanted) == [version]


def test_wish_is_not_made_for_what_is_there_or_failed(world):
    world.load("a")
    record = world.record(world.run("a"))
    world.registry.want(record)
    world.registry.want_host(record)
    assert not world.registry.wanted and not world.registry.host_wanted
    world.registry.deactivate(record.version)
    world.registry.fail_version(record.version, AdapterUnloadedError("gone"))
    assert record.tier is Tier.DISK
    world.registry.want(record)
    world.registry.want_host(record)
    assert not world.registry.wanted and not world.registry.host_wanted
    world.registry.release(record.version)


def test_wishes_are_served_oldest_first(world):
    names = ["c", "a", "b"]
    for name in names:
        world.load(name)
        world.registry.activate(world.resolve(name))
    world.registry.activate(world.resolve("c"))
    assert [v.adapter_id for v in world.registry.wanted] == names


# Pins.


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DEVICE])
def test_pin_brings_the_current_version_in_without_any_request(tier):
    world = World(host_budget=10)
    world.load("a")
    world.load("b")
    world.registry.pin("a", tier)
    assert find_info(world.registry, "a").pinned is tier
    world.serve_wishes()
    assert find_info(world.registry, "a").tier is tier
    check_integrity(world.registry)


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DEVICE])
def test_unpin_takes_back_the_wish_of_the_pin(world, tier):
    version = world.load("a", size=100)
    world.load("b", size=100)  # pushes it out
    assert world.tier(version) is Tier.DISK
    world.registry.pin("a", tier)
    assert [*world.registry.wanted, *world.registry.host_wanted] == [version]
    world.registry.pin("a", None)
    assert not world.registry.wanted and not world.registry.host_wanted


def test_change_of_the_pinned_tier_changes_the_wish(world):
    version = world.load("a", size=100)
    world.load("b", size=100)
    world.registry.pin("a", Tier.DEVICE)
    world.registry.pin("a", Tier.HOST)
    assert not world.registry.wanted and list(world.registry.host_wanted) == [version]
    world.registry.pin("a", Tier.DEVICE)
    assert list(world.registry.wanted) == [version] and not world.registry.host_wanted


def test_unpin_leaves_the_wish_of_a_waiting_request(world):
    version = world.load("a")
    world.registry.activate(world.resolve("a"))
    world.registry.pin("a", Tier.DEVICE)
    world.registry.pin("a", None)
    assert list(world.registry.wanted) == [version]


def test_pin_moves_to_the_version_that_becomes_current(world):
    old = world.load("a", "v1")
    world.registry.pin("a", Tier.DEVICE)
    world.serve_wishes()
    world.resolve("a")
    new = world.load("a", "v2")
    assert world.record(old).pinned is None and world.record(new).pinned is Tier.DEVICE
    world.serve_wishes()
    assert world.tier(new) is Tier.DEVICE
    world.registry.release(old)
    assert old not in world.registry.records


def test_pin_of_an_id_without_version_waits_for_one(world):
    world.registry.pin("a", Tier.DEVICE)
    version = world.load("a")
    assert world.record(version).pinned is Tier.DEVICE and list(world.registry.wanted) == [version]


def test_pin_outlives_a_version_that_fails(world):
    world.registry.pin("a", Tier.DEVICE)
    world.registry.fail_version(world.load("a"), AdapterUnloadedError("gone"))
    assert not world.registry.wanted
    assert world.record(world.load("a")).pinned is Tier.DEVICE


# What may not be unloaded.


def test_unload_of_a_pinned_adapter_is_refused(world):
    world.load("a")
    world.registry.pin("a", Tier.HOST)
    with pytest.raises(AdapterInUseError, match="pinned"):
        check_unload(world.registry, "a")
    world.registry.pin("a", None)
    check_unload(world.registry, "a")


def test_unload_of_an_aliased_adapter_is_refused_and_names_the_alias(world):
    old = world.load("a", "v1")
    world.set_alias("prod", old)
    world.load("a", "v2")  # the alias leads to an old version of it
    with pytest.raises(AdapterInUseError, match="'prod'") as error:
        check_unload(world.registry, "a")
    assert error.value.metadata == {"alias": "prod"}
    world.delete_alias("prod")
    check_unload(world.registry, "a")


def test_unload_of_what_is_loading_failed_or_unknown(world):
    world.registry.loading.begin("a")
    check_unload(world.registry, "a")
    world.registry.fail_load("b", world.registry.loading.begin("b"), AdapterMemoryError("no memory"))
    check_unload(world.registry, "b")
    with pytest.raises(AdapterNotFoundError):
        check_unload(world.registry, "c")
