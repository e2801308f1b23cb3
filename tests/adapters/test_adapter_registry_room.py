"""`check_room`: what pins leave holds every other adapter, so no request waits for ever."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorikeet.adapters.errors import AdapterMemoryError
from lorikeet.adapters.info import Tier
from lorikeet.adapters.record import Record
from lorikeet.adapters.rules import check_integrity, check_room
from lorikeet.adapters.version import AdapterVersion

from .registry_world import ORIGIN, World, held_copy

IDS = st.sampled_from("ab")
SIZES = st.integers(1, 12)
NAMES = st.sampled_from(["prod", "staging"])
BUDGETS = st.integers(12, 26)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("load"), IDS, SIZES, SIZES),
        st.tuples(st.just("pin"), IDS, st.sampled_from([Tier.HOST, Tier.DEVICE])),
        st.tuples(st.just("unpin"), IDS),
        st.tuples(st.just("alias"), IDS, NAMES),
        st.tuples(st.just("alias stored"), IDS, NAMES, SIZES),
        st.tuples(st.just("unload"), IDS),
    ),
    min_size=4,
    max_size=16,
)


def change(world, number, kind, adapter_id, *args):
    """One call of a client, refused by the rules or done."""
    registry = world.registry
    if kind == "load":
        if world.can_load(adapter_id, *args):
            version = world.load(adapter_id, f"v{number}", args[0], device_size=args[1])
            world.record(version).is_stored = True  # as what an alias or a rollback may need is
    elif kind == "alias stored":
        candidate = world.add_candidate(adapter_id, f"v{number}", args[1])
        candidate.is_stored = True
        if world.can_alias(candidate):
            world.set_alias(args[0], candidate.version)
        registry.drop_candidate(candidate, world.drain_until)
    elif adapter_id not in registry.current:
        return
    elif kind == "pin" and world.can_pin(adapter_id, args[0]):
        registry.pin(adapter_id, args[0])
    elif kind == "unpin":
        registry.pin(adapter_id, None)
    elif kind == "alias":
        world.set_alias(args[0], registry.current[adapter_id].version)
    elif kind == "unload" and adapter_id not in registry.pins:
        registry.unload(adapter_id, world.drain_until)


def runs(world, record):
    """Whether a request for a version gets to run when no other is in flight."""
    registry = world.registry
    registry.hold(record.version)
    slot = registry.activate(record.version)
    if slot is None:
        world.serve_wishes()
        slot = registry.activate(record.version)
    if slot is not None:
        registry.deactivate(record.version)
    registry.release(record.version)
    return slot is not None


@given(host=BUDGETS, device=BUDGETS, slots=st.integers(1, 3), changes=CHANGES, rounds=st.permutations(range(8)))
@settings(max_examples=300, deadline=None)
def test_whatever_is_allowed_every_adapter_comes_in_when_nothing_is_in_flight(host, device, slots, changes, rounds):
    world = World(host, device, slots)
    for number, arguments in enumerate(changes):
        change(world, number, *arguments)
        check_integrity(world.registry)
    world.serve_wishes()
    records = [record for record in world.registry.records.values() if record.is_servable]
    for record in records:
        assert record.pinned is None or record.pinned in held_copy(record)
    for i in rounds * 2:
        world.end_leases()
        if i < len(records):
            assert runs(world, records[i]), f"{records[i].version} never comes in"
        check_integrity(world.registry)
    for record in records:
        assert record.pinned is None or record.pinned in held_copy(record)


@given(host=BUDGETS, device=BUDGETS, slots=st.integers(1, 3), changes=CHANGES, size=SIZES, pin=st.sampled_from(Tier))
@settings(max_examples=100, deadline=None)
def test_what_is_refused_leaves_some_adapter_no_room(host, device, slots, changes, size, pin):
    """No refusal without need: the new one's own sizes and the pins' really are too much for the budgets."""
    world = World(host, device, slots)
    for number, arguments in enumerate(changes):
        if not arguments[0].startswith("alias"):
            change(world, number, *arguments)
    registry = world.registry
    pin = None if pin is Tier.DISK else pin
    new = Record(AdapterVersion("e", "new"), ORIGIN, size, size)
    sizes = {i: (r.host_bytes, r.device_bytes) for i, r in registry.current.items()} | {"e": (size, size)}
    pins = registry.pins | ({"e": pin} if pin else {})
    too_much = False
    for column, tier, budget, most in ((0, Tier.HOST, host, len(sizes)), (1, Tier.DEVICE, device, slots)):
        kept = [sizes[i][column] for i in sizes if pins.get(i) is tier]
        rest = [sizes[i][column] for i in sizes if pins.get(i) is not tier]
        too_much |= bool(kept) and (sum(kept) + max(rest, default=0) > budget or len(kept) + bool(rest) > most)
    assert world.has_room(new, pin) != too_much


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DEVICE])
def test_pin_that_leaves_no_room_for_the_largest_other_is_refused(tier):
    world = World(host_budget=30, device_budget=30)
    world.load("a", size=15)
    world.load("b", size=16)
    assert not world.can_pin("a", tier) and not world.can_pin("b", tier)
    world.unload("b")
    world.load("b", "v2", size=15)
    assert world.can_pin("a", tier)


def test_pin_of_the_last_slot_is_refused_while_there_are_others():
    world = World(max_slots=2)
    for name in "abc":
        world.load(name)
    world.registry.pin("a", Tier.DEVICE)
    assert not world.can_pin("b", Tier.DEVICE)
    assert world.can_pin("b", Tier.HOST)
    world.unload("c")
    assert world.can_pin("b", Tier.DEVICE)


def test_pin_to_the_host_comes_in_although_aliased_adapters_fill_the_memory():
    world = World(host_budget=15)
    world.load("b", size=5)
    for name, size in (("x", 10), ("y", 5)):
        version = world.load(name, size=size)
        world.record(version).is_stored = True
        world.set_alias(f"prod-{name}", version)
    pinned = world.registry.current["b"]
    assert pinned.tier is Tier.DISK and world.can_pin("b", Tier.HOST)
    world.registry.pin("b", Tier.HOST)
    world.serve_wishes()
    assert pinned.tier is Tier.HOST


def test_pin_that_exists_may_be_repeated_and_moved():
    world = World(host_budget=20, device_budget=20)
    world.load("a"), world.load("b")
    world.registry.pin("a", Tier.DEVICE)
    assert world.can_pin("a", Tier.DEVICE) and world.can_pin("a", Tier.HOST)


def test_new_content_of_a_pinned_adapter_must_fit_too():
    world = World(device_budget=30)
    world.load("a"), world.load("b")
    world.registry.pin("a", Tier.DEVICE)
    assert world.can_load("a", 20) and not world.can_load("a", 21)


def test_new_adapter_must_fit_beside_the_pins():
    world = World(device_budget=30)
    world.load("a")
    assert world.can_load("b", 21)
    world.registry.pin("a", Tier.DEVICE)
    assert world.can_load("b", 20) and not world.can_load("b", 21)


def test_old_version_that_an_alias_keeps_needs_room_beside_the_pinned_one_of_its_adapter():
    world = World(device_budget=22)
    world.set_alias("prod", world.load("a", "v1", size=20))
    world.load("a", "v2", size=5)
    assert not world.can_pin("a", Tier.DEVICE)
    world.delete_alias("prod")
    assert world.can_pin("a", Tier.DEVICE)


def test_current_version_that_an_alias_keeps_needs_room_beside_the_one_that_replaces_it():
    world = World(device_budget=22)
    version = world.load("a", "v1", size=12)
    world.registry.pin("a", Tier.DEVICE)
    assert world.can_load("a", 12)
    world.load("b", size=10)
    world.set_alias("prod", version)
    assert world.can_load("a", 10) and not world.can_load("a", 12), "one of the two that are not pinned at a time"


def test_stored_version_needs_room_beside_the_pinned_one_of_its_adapter_before_an_alias_leads_to_it():
    world = World(device_budget=22)
    world.load("a", "v2", size=12)
    candidate = world.add_candidate("a", "v1", size=12)
    assert world.can_alias(candidate)
    world.registry.pin("a", Tier.DEVICE)
    assert not world.can_alias(candidate)


def test_content_on_its_way_to_become_current_is_counted_once():
    world = World(device_budget=22)
    world.load("a", "v1", size=20)
    world.registry.pin("a", Tier.DEVICE)
    candidate = world.add_candidate("a", "v2", size=20)
    assert world.has_room(candidate, Tier.DEVICE, world.registry.current["a"])
    world.registry.drop_candidate(candidate, world.drain_until)


def test_old_version_that_an_alias_keeps_may_become_current_and_pinned_again():
    world = World(device_budget=22)
    old = world.load("a", "v1", size=20)
    world.set_alias("prod", old)
    world.load("a", "v2", size=2)
    world.registry.pin("a", Tier.DEVICE)
    assert world.has_room(world.record(old), Tier.DEVICE, world.registry.current["a"])


def test_requests_that_end_soon_anyway_block_no_replacement():
    """What drains is gone at the drain deadline at the latest."""
    world = World(device_budget=22)
    world.load("a", "v1", size=12)
    world.registry.pin("a", Tier.DEVICE)
    world.resolve("a")
    world.load("a", "v2", size=12)
    assert world.can_load("a", 12)


def test_refusal_says_what_is_there_and_what_to_do():
    world = World(host_budget=30)
    world.load("a", size=16)
    world.load("b", size=15)
    message = "needs 16 bytes of host memory.* 16 of 30.*15 beside.*--adapter-host-bytes"
    with pytest.raises(AdapterMemoryError, match=message):
        check_room(world.registry, world.registry.current["a"], Tier.HOST)
