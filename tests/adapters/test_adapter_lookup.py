"""Which version a request gets by id, alias or `id@digest-prefix`, and what it is told when it gets none."""

import pytest
from lorikeet.adapters.errors import (
    AdapterDigestError,
    AdapterIdError,
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterUnloadedError,
    Code,
)
from lorikeet.adapters.lookup import find_version, matching, not_found
from lorikeet.adapters.rules import check_integrity

from .registry_world import World

# Two that begin alike, and one that does not.
ALIKE_1, ALIKE_2, OTHER = "abcd1" + "0" * 59, "abcd2" + "0" * 59, "ef01" + "0" * 60


@pytest.fixture
def world():
    world = World()
    yield world
    check_integrity(world.registry)


def test_id_leads_to_the_current_version(world):
    world.load("a", ALIKE_1)
    new = world.load("a", ALIKE_2)
    assert world.resolve("a") == new and world.resolve("a", routing_key="key") == new


def test_every_resolve_holds_the_version(world):
    version = world.load("a", ALIKE_1)
    world.set_alias("prod", version)
    for reference in (("a", ""), ("prod", ""), ("a", "abcd")):
        assert world.resolve(*reference) == version
    assert world.record(version).in_flight == 3


def test_finding_holds_nothing(world):
    record = world.record(world.load("a", ALIKE_1))
    assert find_version(world.registry, "a", "", "") is record and record.in_flight == 0


@pytest.mark.parametrize("prefix", ["abcd", "abcd1", ALIKE_1])
def test_prefix_leads_to_the_current_version(world, prefix):
    version = world.load("a", ALIKE_1)
    assert world.resolve("a", prefix) == version


def test_prefix_leads_to_an_old_version_that_an_alias_keeps(world):
    old = world.load("a", ALIKE_1)
    world.set_alias("prod", old)
    new = world.load("a", OTHER)
    assert world.resolve("a", "abcd") == old and world.resolve("a", "ef01") == new


def test_prefix_that_fits_several_versions_is_refused_and_they_are_shown(world):
    old = world.load("a", ALIKE_1)
    world.set_alias("prod", old)
    new = world.load("a", ALIKE_2)
    with pytest.raises(AdapterDigestError, match=f"{ALIKE_1[:12]}, {ALIKE_2[:12]}") as error:
        world.resolve("a", "abcd")
    assert error.value.code is Code.INVALID_ARGUMENT
    assert world.resolve("a", "abcd1") == old and world.resolve("a", "abcd2") == new


def test_version_that_only_drains_is_not_named_and_makes_no_prefix_ambiguous(world):
    old = world.load("a", ALIKE_1)
    world.resolve("a")
    new = world.load("a", ALIKE_2)
    assert world.resolve("a", "abcd") == new
    with pytest.raises(AdapterNotFoundError, match=f"no version abcd1 .*it has {ALIKE_2[:12]}"):
        world.resolve("a", "abcd1")
    assert world.record(old).in_flight == 1


def test_other_adapters_versions_do_not_fit(world):
    world.load("a", ALIKE_1)
    b = world.load("b", ALIKE_2)
    assert world.resolve("b", "abcd") == b
    with pytest.raises(AdapterNotFoundError):
        world.resolve("b", "abcd1")


def test_prefix_of_an_id_without_version_is_not_found(world):
    for name in ("unknown", "loading", "failed"):
        world.registry.loading.begin("loading")
        world.registry.fail_load("failed", world.registry.loading.begin("failed"), AdapterInvalidError("broken"))
        with pytest.raises(AdapterNotFoundError, match=repr(name)):
            world.resolve(name, "abcd")


def test_id_whose_versions_all_drain_has_none_to_name(world):
    world.load("a", ALIKE_1)
    world.resolve("a")
    world.unload("a")
    with pytest.raises(AdapterNotFoundError, match="it has none"):
        world.resolve("a", "abcd")
    with pytest.raises(AdapterNotFoundError, match="not known"):
        world.resolve("a")


def test_version_that_was_dropped_by_force_is_not_named(world):
    version = world.load("a", ALIKE_1)
    world.resolve("a")
    world.registry.fail_version(version, AdapterUnloadedError("folder changed"))
    with pytest.raises(AdapterNotFoundError, match="failed to load: folder changed"):
        world.resolve("a")
    with pytest.raises(AdapterNotFoundError):
        world.resolve("a", ALIKE_1)


def test_alias_with_a_prefix_is_refused_and_says_how_a_version_is_named(world):
    world.set_alias("prod", world.load("a", ALIKE_1))
    with pytest.raises(AdapterIdError, match=r"'prod' is an alias.*`id@abcd`"):
        world.resolve("prod", "abcd")


def test_unknown_and_failing_names_are_told_apart(world):
    world.registry.loading.begin("loading")
    world.registry.fail_load("failed", world.registry.loading.begin("failed"), AdapterInvalidError("r is 0"))
    for name, message in (("loading", "still being loaded"), ("failed", "r is 0"), ("unknown", "ListAdapters")):
        with pytest.raises(AdapterNotFoundError, match=message) as error:
            world.resolve(name)
        assert error.value.code is Code.NOT_FOUND


def test_failed_id_that_is_loaded_again_says_so(world):
    world.registry.fail_load("a", world.registry.loading.begin("a"), AdapterInvalidError("broken"))
    world.registry.loading.begin("a")
    with pytest.raises(AdapterNotFoundError, match="still being loaded"):
        world.resolve("a")


def test_id_that_is_replaced_is_served_meanwhile(world):
    version = world.load("a", ALIKE_1)
    world.registry.loading.begin("a")
    assert world.resolve("a") == version


def test_messages_stay_short_whatever_the_name():
    assert len(not_found("x" * 10**6).message) < 1000


def test_matching_finds_the_one_or_none():
    world = World()
    records = [world.record(world.load(name, digest)) for name, digest in (("a", ALIKE_1), ("b", OTHER))]
    assert matching(records, "a", "abcd") is records[0] and matching(records, "a", "ef") is records[1]
    assert matching(records, "a", "0000") is None and matching([], "a", "abcd") is None
