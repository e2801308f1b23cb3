"""What ListAdapters and GetAdapter say of each version, and in which order."""

import pytest
from lorikeet.adapters.errors import AdapterInvalidError, AdapterNotFoundError, AdapterUnloadedError
from lorikeet.adapters.info import AdapterState, AdapterStats, Tier
from lorikeet.adapters.listing import describe, find_all, find_info, list_infos, record_info, unloaded_info
from lorikeet.adapters.rules import check_integrity
from lorikeet.adapters.scaling import Scaling

from .registry_world import World, make_origin


@pytest.fixture
def world():
    world = World()
    yield world
    check_integrity(world.registry)


def listed(world):
    return list_infos(find_all(world.registry))


def lines(infos):
    return [(info.adapter_id, info.digest, str(info.state)) for info in infos]


def test_everything_that_is_known_of_a_version_is_shown(world):
    slices = {"q_proj": Scaling(8, 2.0)}
    origin = make_origin("folder", method="rsLoRA", trained_for="base", max_rank=8, num_modules=3, slices=slices)
    version = world.load("a", "v1", origin=origin)
    world.set_alias("staging", version)
    world.set_alias("prod", version)
    world.registry.pin("a", Tier.DEVICE)
    world.record(version).proof = "3 prompts"
    info = find_info(world.registry, "a")
    assert (info.adapter_id, info.digest, info.state, info.current) == ("a", "v1", AdapterState.READY, True)
    assert (info.tier, info.bytes, info.pinned, info.aliases) == (Tier.HOST, 10, Tier.DEVICE, ("prod", "staging"))
    assert (info.method, info.max_rank, info.num_modules, info.slices) == ("rsLoRA", 8, 3, slices)
    assert (info.source, info.trained_for, info.proof, info.error) == ("folder", "base", "3 prompts", None)


def test_tier_is_the_fastest_that_holds_a_copy():
    world = World(host_budget=10)
    version = world.load("a")
    tiers = [find_info(world.registry, "a").tier]
    world.end(world.run("a"))
    tiers.append(find_info(world.registry, "a").tier)
    world.load("b")  # takes the host copy
    tiers.append(find_info(world.registry, "a").tier)
    world.registry.memory.drop_device(world.record(version))
    tiers.append(find_info(world.registry, "a").tier)
    assert tiers == [Tier.HOST, Tier.DEVICE, Tier.DEVICE, Tier.DISK]


def test_life_of_a_version(world):
    ticket = world.registry.loading.begin("a")
    assert lines(listed(world)) == [("a", "", "loading")]
    record = world.add_candidate("a", "v1")
    states = [record_info(record).state]
    world.finish("a", "v1", ticket)
    world.registry.drop_candidate(record, world.drain_until)
    states.append(record_info(record).state)
    world.resolve("a")
    world.set_alias("prod", record.version)
    world.unload("a")
    states.append(record_info(record).state)
    world.delete_alias("prod")
    states.append(record_info(record).state)
    world.registry.expire(1000.0)
    states.append(record_info(record).state)
    assert [str(state) for state in states] == ["loading", "ready", "ready", "draining", "failed"]
    assert "drain deadline" in record_info(record).error
    world.registry.release(record.version)
    assert listed(world) == []


def test_requests_are_counted_and_calls_are_not(world):
    record = world.record(world.load("a"))
    world.resolve("a"), world.run("a")
    world.registry.hold_for_call(record)
    world.add_candidate("a")
    assert find_info(world.registry, "a").in_flight == 2


def test_adapters_are_listed_by_id_and_the_current_version_first(world):
    for name in "cab":
        world.load(name, "v1")
    world.set_alias("prod", world.registry.current["a"].version)
    world.load("a", "v2")
    world.resolve("a")
    world.load("a", "v3")
    world.registry.fail_load("d", world.registry.loading.begin("d"), AdapterInvalidError("broken"))
    world.registry.loading.begin("aa")
    assert lines(listed(world)) == [
        ("a", "v3", "ready"),
        ("a", "v1", "ready"),
        ("a", "v2", "draining"),
        ("aa", "", "loading"),
        ("b", "v1", "ready"),
        ("c", "v1", "ready"),
        ("d", "", "failed"),
    ]
    assert [info.current for info in listed(world)][:3] == [True, False, False]


def test_each_id_is_listed_once_whatever_happens_to_it_at_once(world):
    world.load("replaced")
    world.registry.loading.begin("replaced")
    world.registry.fail_load("again", world.registry.loading.begin("again"), AdapterInvalidError("broken"))
    world.registry.loading.begin("again")
    world.registry.fail_load("better", world.registry.loading.begin("better"), AdapterInvalidError("broken"))
    world.load("better")
    assert lines(listed(world)) == [("again", "", "loading"), ("better", "d1", "ready"), ("replaced", "d1", "ready")]


def test_failures_carry_their_reason(world):
    world.registry.fail_load("a", world.registry.loading.begin("a"), AdapterInvalidError("broken"))
    world.load("b")
    world.registry.fail_load("b", world.registry.loading.begin("b"), AdapterInvalidError("half a file"))
    version = world.load("c")
    world.resolve("c")
    world.registry.fail_version(version, AdapterUnloadedError("folder changed"))
    assert [(i.adapter_id, str(i.state), i.error) for i in listed(world)] == [
        ("a", "failed", "broken"),
        ("b", "ready", "half a file"),
        ("c", "failed", "folder changed"),  # of which requests hold the version
        ("c", "failed", "folder changed"),  # which is what the id gives now
    ]
    assert {find_info(world.registry, name).error for name in "ac"} == {"broken", "folder changed"}


def test_unknown_id_is_not_found(world):
    world.set_alias("prod", world.load("a"))
    for name in ("nope", "prod"):
        with pytest.raises(AdapterNotFoundError):
            find_info(world.registry, name)


def test_id_whose_versions_are_not_current_any_more_is_not_found_and_its_versions_are_listed(world):
    world.load("a")
    world.resolve("a")
    world.unload("a")
    with pytest.raises(AdapterNotFoundError):
        find_info(world.registry, "a")
    assert lines(listed(world)) == [("a", "d1", "draining")]


def test_details_show_all_versions_and_the_one_a_rollback_brings_back(world):
    world.set_alias("prod", world.load("a", "v1"))
    world.load("a", "v2")
    records = list(world.registry.by_id["a"].values())
    info = find_info(world.registry, "a")
    details = describe(info, records, "v0")
    assert details.adapter == info
    assert lines(details.versions) == [("a", "v2", "ready"), ("a", "v1", "ready"), ("a", "v0", "stored")]
    assert details.versions[2].tier is Tier.DISK and not details.versions[2].current


def test_version_that_a_rollback_brings_back_is_shown_once(world):
    world.set_alias("prod", world.load("a", "v1"))
    world.load("a", "v2")
    records = list(world.registry.by_id["a"].values())
    info = find_info(world.registry, "a")
    assert lines(describe(info, records, "v1").versions) == [("a", "v2", "ready"), ("a", "v1", "ready")]
    assert lines(describe(info, records, "").versions) == [("a", "v2", "ready"), ("a", "v1", "ready")]


def test_details_of_an_id_without_version(world):
    info = unloaded_info("a", AdapterState.FAILED, AdapterInvalidError("broken"))
    details = describe(info, [], "v1")
    assert details.adapter.error == "broken" and lines(details.versions) == [("a", "v1", "stored")]


def test_names_by_tier_are_of_ready_adapters_only():
    world = World(host_budget=20)
    for name in "abc":
        world.load(name)
    world.run("c")
    world.resolve("a")
    world.registry.loading.begin("d")
    world.unload("a")
    memory = world.registry.memory
    stats = AdapterStats(tuple(listed(world)), {Tier.HOST: memory.host_used}, {}, 0)
    assert stats.names_by_tier() == {Tier.DISK: [], Tier.HOST: ["b"], Tier.DEVICE: ["c"]}
    check_integrity(world.registry)
