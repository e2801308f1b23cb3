"""Aliases through the manager: one name for a version, moved at once, split by weight, and what it keeps alive."""

import collections
import random
import threading

import pytest
import torch
from lorikeet.adapters.aliases import MAX_TARGETS
from lorikeet.adapters.errors import (
    AdapterDigestError,
    AdapterExistsError,
    AdapterIdError,
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterNoVersionError,
)
from lorikeet.adapters.info import AdapterState, AliasTarget, Tier

from .managing import PLAIN_BYTES, activate, checked, digest_of, end, serve, slot_deltas, stall_reads, start, wait_until


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def manager(make_manager, lora_dir):
    return make_manager()


@pytest.fixture
def load_version(manager, lora_dir, edit_config):
    """load_version(alpha): make that the current version of `plain`; returns its digest."""

    def load(alpha):
        edit_config(lora_dir, lora_alpha=alpha)
        return manager.load("plain").digest

    return load


def test_alias_leads_to_a_version(manager, load_version):
    digest = load_version(1)
    alias = manager.set_alias("prod", [("plain", 1.0)])
    assert alias.targets == (AliasTarget("plain", digest, 1.0),) and manager.list_aliases() == [alias]
    version = serve(manager, "prod")
    assert (version.adapter_id, version.digest) == ("plain", digest)
    info = manager.get("prod")
    assert (info.adapter_id, info.digest, info.aliases, info.current) == ("plain", digest, ("prod",), True)
    assert [v.digest for v in manager.describe("prod").versions] == [digest]
    assert manager.snapshot().num_aliases == 1


def test_alias_stays_with_its_version_when_the_adapter_is_replaced(manager, load_version, unpack):
    old = load_version(1)
    manager.set_alias("prod", [("plain", 1.0)])
    new = load_version(3)
    deltas = {}
    for reference, digest in (("prod", old), ("plain", new), (f"plain@{old[:8]}", old)):
        version = manager.resolve(reference)
        assert version.digest == digest
        deltas[reference] = slot_deltas(manager, activate(manager, version), unpack)
        end(manager, version)
    for module, delta in deltas["prod"].items():
        torch.testing.assert_close(deltas["plain"][module], 3 * delta, rtol=1e-5, atol=1e-6)
    assert [(v.digest, v.state, v.current, v.aliases) for v in manager.describe("plain").versions] == [
        (new, AdapterState.READY, True, ()),
        (old, AdapterState.READY, False, ("prod",)),
    ]


def test_move_is_atomic_for_requests_in_flight_and_to_come(manager, load_version):
    """Requests resolve all the time: each gets one of the two versions, and after a move only the new one."""
    digests = [load_version(1), load_version(2)]
    manager.set_alias("prod", [(f"plain@{digests[0]}", 1.0)])
    stop = threading.Event()
    moves = [0]
    counts = [collections.Counter() for _ in range(3)]

    def traffic(seed):
        rng, count = random.Random(seed), counts[seed]
        while not stop.is_set():
            before = moves[0]
            version = manager.resolve("prod", str(rng.random()))
            after = moves[0]
            if before == after and before % 2 == 0:  # no move was under way
                assert version.digest == digests[before // 2 % 2]
            count[version.digest] += 1
            manager.release(version)

    def asked():
        return sum(count.total() for count in counts)

    clients = [start(traffic, seed) for seed in range(3)]
    running = manager.resolve("prod")
    activate(manager, running)
    try:
        for number in range(1, 41):
            moves[0] += 1
            manager.set_alias("prod", [(f"plain@{digests[number % 2]}", 1.0)])
            moves[0] += 1
            # Also when the clients' threads are slow, some request comes before the next move.
            before = asked()
            wait_until(lambda before=before: asked() > before or any(c.done() for c in clients), "a request")
    finally:
        stop.set()
    assert [client.exception(20) for client in clients] == [None] * 3
    assert set().union(*counts) == set(digests)
    assert manager.try_activate(running) is not None and running.digest == digests[0]
    manager.deactivate(running), end(manager, running)


def test_canary_splits_by_weight_and_each_key_stays(manager, load_version):
    digests = [load_version(1), load_version(2)]
    keys = [f"user-{i}" for i in range(2000)]

    def split(*weights):
        targets = [(f"plain@{d}", w) for d, w in zip(digests, weights, strict=True) if w]
        manager.set_alias("prod", targets)
        got = {}
        for key in keys:
            for _ in range(2):
                version = manager.resolve("prod", key)
                assert got.setdefault(key, version.digest) == version.digest, "sticky"
                manager.release(version)
        return got

    few, more, alone = split(9, 1), split(7, 3), split(0, 1)
    share = [sum(d == digests[1] for d in got.values()) / len(keys) for got in (few, more)]
    assert 0.07 < share[0] < 0.13 and 0.26 < share[1] < 0.34  # 4 standard deviations
    assert all(more[key] == digests[1] for key in keys if few[key] == digests[1]), "only keys that it won have moved"
    assert set(alone.values()) == {digests[1]}


def test_request_without_a_key_is_split_too(manager, load_version):
    digests = [load_version(1), load_version(2)]
    manager.set_alias("prod", [(f"plain@{d}", 1.0) for d in digests])
    found = set()
    for _ in range(200):
        version = manager.resolve("prod")
        manager.release(version)
        found.add(version.digest)
    assert found == set(digests)
    for call in (manager.get, manager.describe, lambda name: manager.prefetch(name, Tier.HOST)):
        with pytest.raises(AdapterIdError, match="several versions"):
            call("prod")


def test_eight_targets_and_no_more(manager, lora_dir, clone_adapter):
    names = [clone_adapter(f"a{i}", 1.0 + i).name for i in range(MAX_TARGETS + 1)]
    for name in names:
        manager.load(name)
    targets = [(name, 1.0) for name in names]
    assert len(manager.set_alias("prod", targets[:MAX_TARGETS]).targets) == 8
    for wrong in (targets, []):
        with pytest.raises(AdapterIdError, match=f"has {len(wrong)} targets; allowed: 1 to 8"):
            manager.set_alias("prod", wrong)
    assert {serve(manager, "prod", f"key {i}").adapter_id for i in range(200)} == set(names[:MAX_TARGETS])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weight_that_is_none(weight, manager, load_version):
    load_version(1)
    with pytest.raises(AdapterDigestError, match="weight"):
        manager.set_alias("prod", [("plain", weight)])
    assert manager.list_aliases() == []


def test_bad_target_changes_nothing(manager, load_version):
    old, new = load_version(1), load_version(2)
    kept = manager.set_alias("prod", [(f"plain@{old}", 1.0)])
    bad = [
        (AdapterNotFoundError, [("nope", 1.0)]),
        (AdapterNotFoundError, [("nope@abcd", 1.0)]),
        (AdapterNoVersionError, [("plain", 1.0), ("plain@" + "0" * 12, 1.0)]),
        (AdapterDigestError, [("plain@xyz", 1.0)]),
        (AdapterDigestError, [("plain", 1.0), (f"plain@{new[:8]}", 2.0)]),  # the same version twice
        (AdapterIdError, [("prod", 1.0)]),
        (AdapterIdError, [("../plain", 1.0)]),
    ]
    for error, targets in bad:
        with pytest.raises(error):
            manager.set_alias("prod", targets)
        with pytest.raises(error):
            manager.set_alias("other", targets)
    assert manager.list_aliases() == [kept] and serve(manager, "prod").digest == old


def test_alias_cannot_take_the_name_of_an_adapter(manager, load_version, clone_adapter, monkeypatch):
    load_version(1)
    clone_adapter("other", 2.0)
    with pytest.raises(AdapterExistsError):
        manager.set_alias("plain", [("plain", 1.0)])
    with stall_reads(monkeypatch, "/other/") as gate:
        loading = start(manager.load, "other")
        gate.wait_reached()
        with pytest.raises(AdapterExistsError):
            manager.set_alias("other", [("plain", 1.0)])
    assert loading.result(20).state is AdapterState.READY
    draining = manager.resolve("other")
    manager.unload("other")
    with pytest.raises(AdapterExistsError):
        manager.set_alias("other", [("plain", 1.0)])
    manager.release(draining)
    with pytest.raises(AdapterIdError):
        manager.set_alias("not a name", [("plain", 1.0)])


def test_adapter_cannot_take_the_name_of_an_alias(manager, load_version, clone_adapter):
    load_version(1)
    folder = clone_adapter("prod", 2.0)
    manager.set_alias("prod", [("plain", 1.0)])
    calls = [manager.load, manager.plan_load, lambda name: manager.load_folder(name, folder)]
    for call in calls:
        with pytest.raises(AdapterExistsError, match="is an alias"):
            call("prod")
    for call in (manager.rollback, manager.unpin, lambda name: manager.pin(name, Tier.HOST)):
        with pytest.raises(AdapterIdError, match="is an alias"):
            call("prod")
    with pytest.raises(AdapterNotFoundError):
        manager.unload("prod")
    with pytest.raises(AdapterIdError, match="is an alias"):
        manager.resolve("prod@abcd")
    assert serve(manager, "prod").adapter_id == "plain"
    manager.delete_alias("prod")
    assert manager.load("prod").digest == digest_of(folder)


def test_alias_of_a_name_that_is_just_being_loaded_wins_or_loses_but_never_both(manager, load_version, clone_adapter):
    load_version(1)
    clone_adapter("prod", 2.0)
    for _ in range(20):
        alias, load = (
            start(manager.set_alias, "prod", [("plain", 1.0)]),
            start(manager.load, "prod"),
        )
        errors = [alias.exception(20), load.exception(20)]
        assert sum(isinstance(e, AdapterExistsError) for e in errors) == 1, errors
        assert serve(manager, "prod").adapter_id == ("prod" if errors[0] else "plain")
        manager.unload("prod") if errors[0] else manager.delete_alias("prod")


def test_deleted_alias_lets_its_version_drain(manager, load_version):
    load_version(1)
    manager.set_alias("prod", [("plain", 1.0)])
    version = manager.resolve("prod")
    activate(manager, version)
    load_version(2)
    manager.delete_alias("prod")
    with pytest.raises(AdapterNotFoundError):
        manager.resolve("prod")
    assert [info.state for info in manager.list()] == [AdapterState.READY, AdapterState.DRAINING]
    end(manager, version)
    assert len(manager.list()) == 1 and manager.snapshot().bytes_used == {Tier.HOST: PLAIN_BYTES, Tier.DEVICE: 0}


def test_version_of_two_aliases_stays_for_the_second(manager, load_version):
    old = load_version(1)
    for name in ("prod", "stage"):
        manager.set_alias(name, [("plain", 1.0)])
    load_version(2)
    manager.delete_alias("prod")
    manager.set_alias("stage", [("plain", 1.0), (f"plain@{old}", 1.0)])
    assert {serve(manager, "stage", str(i)).digest for i in range(50)} == {old, manager.get("plain").digest}
    manager.set_alias("stage", [("plain", 1.0)])
    assert [info.aliases for info in manager.list()] == [("stage",)]


def test_alias_brings_back_the_version_before(manager, load_version, peft_deltas, unpack, lora_dir):
    old = load_version(1)
    expected = peft_deltas(lora_dir)
    load_version(2)
    assert [v.state for v in manager.describe("plain").versions] == [AdapterState.READY, AdapterState.STORED]
    with pytest.raises(AdapterNotFoundError, match="RollbackAdapter or SetAlias bring back"):
        manager.resolve(f"plain@{old}")
    manager.set_alias("before", [(f"plain@{old[:6]}", 1.0)])
    version = manager.resolve("before")
    slot = activate(manager, version)
    torch.testing.assert_close(slot_deltas(manager, slot, unpack), expected, rtol=1e-5, atol=1e-6)
    end(manager, version)
    manager.delete_alias("before")
    assert [v.state for v in manager.describe("plain").versions] == [AdapterState.READY, AdapterState.STORED]


def test_aliased_adapter_is_unloaded_only_without_its_alias(manager, load_version):
    load_version(1)
    manager.set_alias("prod", [("plain", 1.0)])
    load_version(2)  # also when the alias leads to another of its versions
    with pytest.raises(AdapterInUseError, match="alias 'prod'"):
        manager.unload("plain")
    manager.delete_alias("prod")
    manager.unload("plain")
    assert manager.list() == []


def test_unknown_alias(manager, load_version):
    load_version(1)
    for name in ("nope", "plain"):
        with pytest.raises(AdapterNotFoundError, match="no alias"):
            manager.delete_alias(name)
    with pytest.raises(AdapterIdError):
        manager.delete_alias("no name")
