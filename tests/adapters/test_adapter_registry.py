"""The registry's examples: loads, versions, unloads, draining, failures, and who holds what."""

import subprocess
import sys

import pytest
from lorikeet.adapters.errors import (
    AdapterInvalidError,
    AdapterMemoryError,
    AdapterNotFoundError,
    AdapterUnloadedError,
)
from lorikeet.adapters.info import AdapterState, Tier
from lorikeet.adapters.listing import find_all, find_info, list_infos
from lorikeet.adapters.registry import MAX_FAILED
from lorikeet.adapters.rules import check_integrity
from lorikeet.adapters.version import AdapterVersion

from .registry_world import Copy, World, make_origin


@pytest.fixture
def world():
    world = World()
    yield world
    check_integrity(world.registry)


def states(world):
    return [info.state for info in list_infos(find_all(world.registry))]


def test_registry_imports_no_torch():
    """The state machine is plain Python; anyone may reason about it without a device."""
    modules = ", ".join(f"lorikeet.adapters.{name}" for name in ("registry", "rules", "listing", "lookup", "reference"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


# Invented and failed ids.


def test_ten_thousand_invented_ids_store_nothing(world):
    world.set_alias("prod", world.load("a"))
    for i in range(10_000):
        for prefix in ("", "abcd"):
            with pytest.raises(AdapterNotFoundError):
                world.resolve(f"invented-{i}", prefix, f"key-{i}")
        with pytest.raises(AdapterNotFoundError):
            world.resolve("a", f"{i:08x}")
        with pytest.raises(AdapterNotFoundError):
            world.unload(f"invented-{i}")
        world.delete_alias(f"invented-{i}")
    registry = world.registry
    assert len(registry.records) == len(registry.by_id) == len(registry.current) == len(registry.aliases.all()) == 1
    assert not (registry.failed or registry.loading or registry.wanted or registry.host_wanted or registry.draining)


def test_ten_thousand_failed_ids_are_bounded(world):
    for i in range(10_000):
        ticket = world.registry.loading.begin(f"bad-{i}")
        world.registry.fail_load(f"bad-{i}", ticket, AdapterInvalidError("broken"))
    assert len(world.registry.failed) == MAX_FAILED and not world.registry.loading
    assert find_info(world.registry, "bad-9999").error == "broken"


# Versions of one id.


def test_replacing_makes_a_new_version_and_the_old_one_drains(world):
    old = world.load("a", "v1")
    held = world.resolve("a")
    new = world.load("a", "v2")
    assert held == old and world.resolve("a") == new
    assert states(world) == [AdapterState.READY, AdapterState.DRAINING]
    world.registry.release(held)
    assert old not in world.registry.records and world.registry.memory.host_used == 10


def test_version_without_requests_goes_at_once_when_replaced(world):
    old = world.load("a", "v1")
    new = world.load("a", "v2")
    assert list(world.registry.records) == [new] and (old.digest, new.digest) == ("v1", "v2")


def test_same_content_again_changes_nothing(world):
    version = world.load("a")
    world.resolve("a")
    assert world.load("a") == version
    assert world.record(version).in_flight == 1 and len(world.registry.records) == 1


def test_same_content_from_elsewhere_is_read_from_there_in_future(world):
    version = world.load("a", origin=make_origin("old"))
    moved = make_origin("new")
    assert world.load("a", origin=moved) == version
    assert world.record(version).origin is moved


def test_going_back_to_draining_content_revives_it(world):
    first = world.load("a", "v1")
    world.resolve("a")
    world.load("a", "v2")
    world.load("a", "v1")
    record = world.record(first)
    assert record.is_current and record.in_flight == 1 and record.deadline is None
    assert world.registry.expire(1000.0) == [] and world.registry.next_deadline() is None


def test_same_digest_under_two_ids_is_two_versions(world):
    a, b = world.load("a", "v"), world.load("b", "v")
    assert a != b and world.registry.digests == {"v": 2}
    world.unload("a")
    assert world.resolve("b") == b and world.registry.digests == {"v": 1}


def test_load_that_was_overtaken_by_a_later_one_is_discarded(world):
    slow, fast = world.registry.loading.begin("a"), world.registry.loading.begin("a")
    assert not world.registry.loading.is_outdated("a", slow) and not world.registry.loading.is_outdated("a", fast)
    assert world.finish("a", "new", fast) is not None
    assert world.registry.loading.is_outdated("a", slow)
    assert world.finish("a", "old", slow) is None
    assert world.resolve("a").digest == "new" and not world.registry.loading


def test_load_that_was_overtaken_by_a_later_failure_is_discarded(world):
    slow, fast = world.registry.loading.begin("a"), world.registry.loading.begin("a")
    world.registry.fail_load("a", fast, AdapterInvalidError("broken"))
    assert world.finish("a", "old", slow) is None
    assert find_info(world.registry, "a").error == "broken"


def test_late_failure_of_an_overtaken_load_is_not_shown(world):
    slow, fast = world.registry.loading.begin("a"), world.registry.loading.begin("a")
    world.finish("a", "new", fast)
    world.registry.fail_load("a", slow, AdapterInvalidError("old trouble"))
    assert find_info(world.registry, "a").error is None


def test_load_that_publishes_nothing_tells_whether_it_could_have(world):
    first, second = world.registry.loading.begin("a"), world.registry.loading.begin("a")
    assert world.registry.loading.end("a", second)
    assert not world.registry.loading.end("a", first)
    assert world.is_empty()


# Unloading.


def test_unload_makes_later_resolves_fail_and_lets_running_requests_finish(world):
    world.load("a")
    version = world.run("a")
    world.unload("a")
    with pytest.raises(AdapterNotFoundError):
        world.resolve("a")
    assert world.tier(version) is Tier.DEVICE
    world.end(version)
    assert world.is_empty()


def test_second_unload_is_not_found(world):
    world.load("a")
    world.resolve("a")
    world.unload("a")
    with pytest.raises(AdapterNotFoundError):
        world.unload("a")


def test_unload_during_the_first_load_discards_it(world):
    ticket = world.registry.loading.begin("a")
    assert find_info(world.registry, "a").state is AdapterState.LOADING
    with pytest.raises(AdapterNotFoundError, match="still being loaded"):
        world.resolve("a")
    world.unload("a")
    assert world.registry.loading.is_outdated("a", ticket)
    assert world.finish("a", "v", ticket) is None
    assert world.is_empty()


def test_load_that_begins_after_an_unload_counts_although_an_older_one_is_under_way(world):
    before = world.registry.loading.begin("a")
    world.unload("a")
    after = world.registry.loading.begin("a")
    assert world.finish("a", "v1", before) is None
    assert world.finish("a", "v2", after) is not None
    assert world.resolve("a").digest == "v2"


def test_drain_deadline_drops_what_requests_still_hold(world):
    version = world.load("a")
    waiting, running = world.resolve("a"), world.run("a")
    world.unload("a")
    assert world.registry.next_deadline() == 30.0
    assert world.registry.expire(29.0) == []
    assert world.registry.expire(30.0) == [version]
    assert world.registry.expire(31.0) == [] and world.registry.next_deadline() is None
    with pytest.raises(AdapterUnloadedError, match="drain deadline"):
        world.registry.activate(waiting)
    assert world.tier(version) is Tier.DEVICE, "rows still run on it"
    world.registry.deactivate(running)
    assert world.tier(version) is Tier.DISK
    for _ in range(2):
        world.registry.release(version)
    assert not world.registry.records


def test_next_deadline_is_the_earliest(world):
    for seconds, name in ((5, "a"), (0, "b"), (9, "c")):
        world.load(name)
        world.resolve(name)
        world.now = seconds
        world.unload(name)
    assert world.registry.next_deadline() == 30.0
    assert [v.adapter_id for v in world.registry.expire(35.0)] == ["a", "b"]
    assert world.registry.next_deadline() == 39.0


def test_copy_that_finishes_after_its_version_was_dropped_is_freed(world):
    version = world.load("a")
    world.resolve("a")
    world.registry.activate(version)
    assert world.registry.claim_device(version, 0.0)
    world.unload("a")
    world.registry.expire(30.0)
    world.registry.release(version)
    assert version in world.registry.records, "its memory is being written"
    world.registry.fill_device(version, world.free_slots.pop(), 0.0)
    assert world.is_empty()


def test_host_copy_that_finishes_after_its_version_was_dropped_is_freed(world):
    version = world.load("a", size=200)  # larger than the budget allows now: no host copy
    world.registry.memory.host_budget = 200
    assert world.registry.claim_host(version, urgent=False)
    world.unload("a")
    assert version in world.registry.records, "its memory is being written"
    world.registry.fill_host(version, Copy(200))
    assert world.is_empty()


# Failures.


def test_failed_replacement_keeps_the_current_version_and_says_so(world):
    version = world.load("a")
    world.registry.fail_load("a", world.registry.loading.begin("a"), AdapterInvalidError("half a file"))
    info = find_info(world.registry, "a")
    assert (info.state, info.digest, info.error) == (AdapterState.READY, version.digest, "half a file")


@pytest.mark.parametrize("digest", ["v1", "v2"])
def test_note_of_a_failed_replacement_goes_with_the_next_load(world, digest):
    world.load("a", "v1")
    world.registry.fail_load("a", world.registry.loading.begin("a"), AdapterInvalidError("half a file"))
    world.load("a", digest)
    assert find_info(world.registry, "a").error is None


def test_failed_first_load_is_listed_with_its_reason_and_forgotten_by_unload(world):
    world.registry.fail_load("a", world.registry.loading.begin("a"), AdapterInvalidError("no config"))
    assert find_info(world.registry, "a").state is AdapterState.FAILED
    with pytest.raises(AdapterNotFoundError, match="no config"):
        world.resolve("a")
    world.unload("a")
    assert states(world) == []


def test_version_that_cannot_be_read_again_fails_its_requests_only(world):
    version, other = world.load("a"), world.load("b")
    world.resolve("a"), world.resolve("b")
    world.registry.fail_version(version, AdapterUnloadedError("folder changed"))
    with pytest.raises(AdapterUnloadedError, match="folder changed"):
        world.registry.activate(version)
    assert world.registry.activate(other) is None
    assert find_info(world.registry, "a").state is AdapterState.FAILED
    world.load("a", "v2")
    assert find_info(world.registry, "a").state is AdapterState.READY
    world.registry.release(version)
    assert version not in world.registry.records


def test_version_fails_once_and_an_unknown_one_not_at_all(world):
    version = world.load("a")
    world.resolve("a")
    for message in ("first", "second"):
        world.registry.fail_version(version, AdapterUnloadedError(message))
        world.registry.fail_waiting(version, AdapterUnloadedError(message))
    assert world.record(version).error.message == "first"
    world.registry.release(version)
    world.registry.fail_version(version, AdapterUnloadedError("third"))
    world.registry.fail_waiting(version, AdapterUnloadedError("third"))
    assert find_info(world.registry, "a").error == "first" and not world.registry.records


def test_content_that_was_dropped_by_force_is_another_incarnation_when_it_is_loaded_again(world):
    first = world.load("a")
    world.resolve("a")
    world.registry.fail_version(first, AdapterUnloadedError("copy failed"))
    second = world.load("a")
    assert first != second and (first.adapter_id, first.digest) == (second.adapter_id, second.digest)
    assert world.resolve("a") == second and world.registry.activate(second) is None
    with pytest.raises(AdapterUnloadedError):
        world.registry.activate(first)
    world.registry.release(first)
    assert list(world.registry.records) == [second]


def test_content_that_left_in_peace_is_another_incarnation_too(world):
    """Whoever still has the old version in a table (a prefix cache, say) does not mistake one for the other."""
    first = world.load("a")
    world.unload("a")
    assert world.load("a") != first


def test_error_is_raised_as_a_new_instance_each_time(world):
    version = world.load("a")
    world.resolve("a")
    world.registry.fail_version(version, AdapterUnloadedError("gone", {"k": "v"}))
    errors = []
    for _ in range(2):
        with pytest.raises(AdapterUnloadedError) as error:
            world.registry.activate(version)
        errors.append(error.value)
    assert errors[0] is not errors[1] and errors[1].metadata == {"k": "v"}


def test_unmatched_release_and_deactivate_are_our_bugs(world):
    version = world.load("a")
    with pytest.raises(AssertionError):
        world.registry.release(version)
    with pytest.raises(AssertionError):
        world.registry.deactivate(version)
    with pytest.raises(AssertionError):
        world.registry.activate(version)


def test_version_that_nobody_knows_cannot_be_held(world):
    with pytest.raises(KeyError):
        world.registry.hold(AdapterVersion("a", "d1", 1))


# What passes: the device had no memory left.


def test_trouble_that_may_pass_fails_the_waiting_requests_and_not_later_ones(world):
    version = world.load("a")
    waiting = world.resolve("a")
    world.registry.activate(waiting)
    world.registry.fail_waiting(version, AdapterMemoryError("no memory"))
    with pytest.raises(AdapterMemoryError, match="no memory"):
        world.registry.activate(waiting)
    later = world.resolve("a")
    assert later != version and later.digest == version.digest
    assert world.tier(later) is Tier.HOST, "the host copy is still good"
    assert world.bring_in(later) and world.registry.activate(later) is not None
    world.registry.release(waiting)
    assert version not in world.registry.records


def test_trouble_that_may_pass_keeps_what_is_known_of_the_version(world):
    version = world.load("a", origin=make_origin("home"))
    world.set_alias("prod", version)
    world.registry.pin("a", Tier.HOST)
    record = world.record(version)
    record.is_stored, record.proof = True, "golden file: 3 prompts, largest error 0.001"
    world.registry.fail_load("a", world.registry.loading.begin("a"), AdapterInvalidError("half a file"))
    before = find_info(world.registry, "a")
    world.registry.fail_waiting(version, AdapterMemoryError("no memory"))
    assert world.registry.current["a"].is_stored
    assert find_info(world.registry, "a") == before


def test_trouble_that_may_pass_does_not_end_a_pin_to_the_device(world):
    version = world.load("a")
    world.registry.pin("a", Tier.DEVICE)
    world.registry.fail_waiting(version, AdapterMemoryError("no memory"))
    world.serve_wishes()
    heir = world.registry.current["a"]
    assert heir.version != version and heir.tier is Tier.DEVICE


def test_trouble_that_may_pass_is_the_end_of_a_draining_version(world):
    version = world.load("a", "v1")
    waiting = world.resolve("a")
    new = world.load("a", "v2")
    world.registry.fail_waiting(version, AdapterMemoryError("no memory"))
    with pytest.raises(AdapterMemoryError):
        world.registry.activate(waiting)
    assert world.resolve("a") == new and list(world.registry.by_id["a"]) == ["v2"]
    world.registry.release(waiting)


def test_trouble_that_may_pass_spares_a_version_that_only_an_alias_keeps(world):
    version = world.load("a", "v1")
    world.set_alias("prod", version)
    world.load("a", "v2")
    world.registry.fail_waiting(version, AdapterMemoryError("no memory"))
    heir = world.resolve("prod")
    assert heir.digest == "v1" and heir != version and world.tier(heir) is Tier.HOST
