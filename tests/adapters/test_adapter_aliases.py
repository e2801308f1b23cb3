"""Aliases: which target answers, shares, stickiness, and who is named by what."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorikeet.adapters.aliases import MAX_TARGETS, AliasTable, choose_target
from lorikeet.adapters.errors import AdapterNotFoundError, AdapterUnloadedError
from lorikeet.adapters.info import AdapterState, AliasInfo, AliasTarget
from lorikeet.adapters.listing import find_all, list_infos
from lorikeet.adapters.rules import check_integrity

from .registry_world import World, digest_of, make_alias

KEYS = [f"user-{i}" for i in range(10_000)]


def alias_of(*weights, name="prod", first=0):
    targets = (AliasTarget(f"a{i}", digest_of(i), weight) for i, weight in enumerate(weights, first))
    return AliasInfo(name, tuple(targets))


def choices(alias, keys=KEYS):
    """Which adapter answers each key."""
    return {key: choose_target(alias, key).adapter_id for key in keys}


def moves(before, after):
    """From where to where keys went."""
    return {(before[key], after[key]) for key in before if before[key] != after[key]}


# The choice.


@pytest.mark.parametrize(
    "weights", [(1, 1), (9, 1), (99, 1), (1, 2, 5), (0.001, 0.003), (1e-300, 3e-300), (1e300, 1e300, 2e300), (1,) * 8]
)
def test_shares_follow_the_weights(weights):
    """Within five standard deviations of a fair draw; keys and names are fixed, so this never changes by chance."""
    chosen = list(choices(alias_of(*weights)).values())
    for i, weight in enumerate(weights):
        share = weight / sum(weights)
        deviation = (share * (1 - share) / len(KEYS)) ** 0.5
        assert abs(chosen.count(f"a{i}") / len(KEYS) - share) < 5 * deviation


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=MAX_TARGETS), key=st.text())
def test_the_same_key_gets_the_same_target_whatever_the_order_and_scale(weights, key):
    alias = alias_of(*weights)
    chosen = choose_target(alias, key)
    assert chosen in alias.targets and choose_target(alias, key) == chosen
    assert choose_target(AliasInfo(alias.name, alias.targets[::-1]), key) == chosen
    assert choose_target(alias_of(*(weight * 8 for weight in weights)), key).adapter_id == chosen.adapter_id


@given(weight=st.floats(min_value=0, exclude_min=True, allow_infinity=False), key=st.text())
def test_single_target_gets_every_key(weight, key):
    alias = alias_of(weight)
    assert choose_target(alias, key) is alias.targets[0]


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_more_weight_only_takes_keys_and_less_only_gives_them(changed):
    weights = [3.0, 2.0, 1.0]
    less = choices(alias_of(*weights))
    weights[changed] *= 2
    more = choices(alias_of(*weights))
    assert {to for _, to in moves(less, more)} == {f"a{changed}"}
    assert {start for start, _ in moves(more, less)} == {f"a{changed}"}


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=MAX_TARGETS),
    factor=st.floats(1.01, 50),
    keys=st.sets(st.text(max_size=8), min_size=20, max_size=60),
    data=st.data(),
)
@settings(max_examples=50)
def test_changing_one_weight_moves_no_key_between_other_targets(weights, factor, keys, data):
    changed = data.draw(st.integers(0, len(weights) - 1))
    before = choices(alias_of(*weights), keys)
    weights[changed] *= factor
    after = choices(alias_of(*weights), keys)
    assert all(to == f"a{changed}" for _, to in moves(before, after))
    weights[changed] /= factor**2
    assert all(start == f"a{changed}" for start, _ in moves(after, choices(alias_of(*weights), keys)))


def test_target_that_comes_only_takes_keys_and_one_that_goes_only_gives_them():
    two, three = choices(alias_of(1, 1)), choices(alias_of(1, 1, 1))
    assert moves(two, three) == {("a0", "a2"), ("a1", "a2")}
    assert moves(three, choices(alias_of(1, 1, first=1))) == {("a0", "a1"), ("a0", "a2")}


def test_replaced_version_of_a_target_does_not_move_the_keys_of_the_other():
    alias = alias_of(1, 1)
    moved = AliasInfo(alias.name, (alias.targets[0], AliasTarget("a1", digest_of("new"), 1)))
    before, after = choices(alias), choices(moved)
    assert len(set(after.values())) == 2
    assert all(choose_target(moved, key).digest == digest_of("new") for key in KEYS if after[key] == "a1")
    kept = sum(before[key] == after[key] == "a0" for key in KEYS)
    assert abs(kept / len(KEYS) - 1 / 3) < 0.02, "of three draws, the first is the smallest"


def test_two_aliases_split_their_users_independently():
    """Or the canary of every team would be tried on the same users."""
    one, other = choices(alias_of(1, 1)), choices(alias_of(1, 1, name="staging"))
    same = sum(one[key] == other[key] for key in KEYS) / len(KEYS)
    assert abs(same - 0.5) < 0.02


def test_versions_of_one_adapter_are_targets_of_their_own():
    versions = tuple(AliasTarget("a", digest_of(i), 1.0) for i in range(2))
    chosen = [choose_target(AliasInfo("prod", versions), key) for key in KEYS]
    assert abs(chosen.count(versions[0]) / len(KEYS) - 0.5) < 0.02


# The table.

NAMES = st.sampled_from(["prod", "staging", "canary"])
TARGETS = st.lists(
    st.builds(AliasTarget, st.sampled_from("ab"), st.sampled_from(["d1", "d2", "d3"]), st.just(1.0)),
    min_size=1,
    max_size=3,
)
CHANGES = st.lists(st.tuples(NAMES, st.none() | TARGETS), max_size=30)


@given(changes=CHANGES)
def test_names_of_versions_and_adapters_are_what_the_aliases_say(changes):
    table = AliasTable()
    model = {}
    for name, targets in changes:
        if targets is None:
            assert table.delete(name) == model.pop(name, None)
        else:
            alias = model[name] = AliasInfo(name, tuple(targets))
            table.set(alias)
        assert table.all() == [model[n] for n in sorted(model)]
        for adapter_id in "abc":
            leading = {d: set() for d in ("d1", "d2", "d3", "d4")}
            for alias in model.values():
                for target in alias.targets:
                    if target.adapter_id == adapter_id:
                        leading[target.digest].add(alias.name)
            assert {digest: table.names_of(adapter_id, digest) for digest in leading} == leading
            assert table.names_of_adapter(adapter_id) == sorted(set().union(*leading.values()))
    for name in ("prod", "staging", "canary", "other"):
        assert (name in table) == (name in model) and table.get(name) == model.get(name)
        table.delete(name)
    assert table.all() == [] and not any(vars(table).values()), "nothing is kept of names that are gone"


def test_names_are_a_copy():
    table = AliasTable()
    table.set(alias_of(1))
    table.names_of("a0", digest_of(0)).clear()
    assert table.names_of("a0", digest_of(0)) == {"prod"}


# Aliases in the registry.


@pytest.fixture
def world():
    world = World()
    yield world
    check_integrity(world.registry)


def test_alias_leads_to_its_version_also_when_the_adapter_has_a_newer_one(world):
    old = world.load("a", "v1")
    world.set_alias("prod", old)
    new = world.load("a", "v2")
    assert world.resolve("prod") == old and world.resolve("a") == new
    assert [(i.digest, i.state) for i in list_infos(find_all(world.registry))] == [
        ("v2", AdapterState.READY),
        ("v1", AdapterState.READY),
    ]


def test_moving_an_alias_lets_go_of_what_it_led_to(world):
    old = world.load("a", "v1")
    world.set_alias("prod", old)
    new = world.load("a", "v2")
    running = world.run("prod")
    world.set_alias("prod", new)
    assert world.resolve("prod") == new
    assert world.record(old).deadline == world.drain_until and world.record(running).slot is not None
    world.end(running)
    assert old not in world.registry.records


def test_version_goes_with_the_last_alias_that_leads_to_it(world):
    old = world.load("a", "v1")
    world.set_alias("prod", old)
    world.set_alias("staging", old)
    world.unload("a")
    world.delete_alias("prod")
    assert world.record(old).aliases == {"staging"} and world.resolve("staging") == old
    world.registry.release(old)
    world.delete_alias("staging")
    assert world.is_empty()


def test_deleting_an_alias_of_a_current_version_leaves_it(world):
    version = world.load("a")
    world.set_alias("prod", version)
    world.delete_alias("prod")
    world.delete_alias("prod")
    assert world.resolve("a") == version and world.record(version).aliases == set()


def test_alias_revives_a_draining_version(world):
    old = world.load("a", "v1")
    world.resolve("a")
    world.load("a", "v2")
    world.set_alias("prod", old)
    assert world.registry.expire(1000.0) == [] and world.resolve("prod") == old


def test_requests_of_a_moved_alias_are_dropped_at_the_deadline_of_the_move(world):
    old = world.load("a", "v1")
    world.set_alias("prod", old)
    world.load("a", "v2")
    held = world.resolve("prod")
    world.now = 100.0
    world.delete_alias("prod")
    assert world.registry.expire(129.0) == [] and world.registry.expire(130.0) == [old]
    with pytest.raises(AdapterUnloadedError):
        world.registry.activate(held)
    world.registry.release(held)


def test_alias_of_what_is_not_loaded_yet_leads_to_it_when_it_comes(world):
    """As after a restart: names first, then versions."""
    other = World().load("a", "v1")
    world.set_alias("prod", other)
    with pytest.raises(AdapterNotFoundError, match="could not be loaded"):
        world.resolve("prod")
    world.load("a", "v2")
    version = world.load("a", "v1")
    assert world.resolve("prod") == version and world.record(version).aliases == {"prod"}


def test_alias_of_a_version_that_failed_leads_to_the_next_incarnation(world):
    first = world.load("a")
    world.set_alias("prod", first)
    world.resolve("prod")
    world.registry.fail_version(first, AdapterUnloadedError("gone"))
    assert world.record(first).aliases == set()
    with pytest.raises(AdapterNotFoundError, match="'prod'"):
        world.resolve("prod")
    second = world.load("a")
    assert world.resolve("prod") == second != first


def test_split_is_sticky_by_key_and_drawn_without_one(world):
    old = world.load("a", "v1")
    world.set_alias("prod", old)
    new = world.load("a", "v2")
    alias = make_alias("prod", (old, 1.0), (new, 3.0))
    world.registry.set_alias(alias, world.drain_until)
    for key in KEYS[:50]:
        expected = choose_target(alias, key).digest
        assert {world.resolve("prod", "", key).digest for _ in range(3)} == {expected}
    assert {world.resolve("prod").digest for _ in range(200)} == {"v1", "v2"}, "missed with probability 1e-25"


def test_target_of_a_split_that_failed_fails_its_keys_only(world):
    """No request is answered by another version than the one its key belongs to."""
    a, b = world.load("a"), world.load("b")
    world.set_alias("prod", a, b)
    world.registry.fail_version(a, AdapterUnloadedError("gone"))
    answers = {}
    for key in KEYS[:100]:
        try:
            answers[key] = world.resolve("prod", "", key)
        except AdapterNotFoundError:
            answers[key] = a
    expected = {key: choose_target(world.registry.aliases.get("prod"), key).adapter_id for key in KEYS[:100]}
    assert {key: version.adapter_id for key, version in answers.items()} == expected
