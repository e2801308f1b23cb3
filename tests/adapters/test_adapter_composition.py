"""Compositions over the real registry, the loader played step by step: slots, holds, refusals, and that they come."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.adapter_tokenizer import BASE_VOCABULARY
from lorikeet.adapters.composition import REST_S, TURN_S, CompositionPort, Wish
from lorikeet.adapters.composition_rules import check_composition, check_together
from lorikeet.adapters.errors import (
    AdapterCompositionError,
    AdapterDigestError,
    AdapterMemoryError,
    AdapterNotFoundError,
    AdapterUnloadedError,
)
from lorikeet.adapters.info import Tier
from lorikeet.adapters.record import LEASE_S
from lorikeet.adapters.reference import parse_reference
from lorikeet.adapters.rules import check_integrity

from .registry_world import Copy, World, digest_of, make_origin

SLOTS = 4


class Versions:
    """The manager's part, without its threads: `load_next` is what the loader thread does."""

    def __init__(self, **budgets):
        self.world = World(**({"max_slots": SLOTS} | budgets))
        self.registry = self.world.registry
        self.on_ready = lambda: None
        self.port = CompositionPort(self, SLOTS, clock=lambda: self.world.now)

    def load(self, adapter_id, size=10, content=None, **found):
        return self.world.load(adapter_id, digest_of(content or adapter_id), size, origin=make_origin(**found))

    def resolve(self, reference, routing_key):
        name, prefix = parse_reference(reference)
        return self.world.resolve(name, prefix, routing_key)

    def check_composition(self, members):
        check_composition(self.registry, members)

    def vocabulary(self, versions):
        return BASE_VOCABULARY

    def release(self, version):
        self.registry.release(version)

    def try_activate(self, version):
        return self.registry.activate(version)

    def try_activate_all(self, versions, *, keep):
        slots = self.registry.activate_all(versions, self.world.now + LEASE_S if keep else 0.0)
        if slots is None:
            check_together(self.registry, versions)
        return slots

    def deactivate(self, version):
        self.registry.deactivate(version)

    def load_next(self):
        registry, world = self.registry, self.world
        for version, record in registry.wanted.items():
            if record.host is None:
                if not registry.claim_host(version, urgent=True):
                    break
                registry.fill_host(version, Copy(record.host_bytes))
        head = next((version for version, record in registry.wanted.items() if record.host is not None), None)
        if head is not None:  # nobody overtakes it
            world.bring_in(head)

    def ask(self, *members, routing_key=""):
        return self.port.resolve([Wish(reference, weight, "adapter_id") for reference, weight in members], routing_key)

    def bring(self, adaptation, seconds=60.0):
        """Ask until it is there, once a second."""
        until = self.world.now + seconds
        while (slot := self.port.try_activate(adaptation)) is None:
            assert self.world.now < until
            self.load_next()
            self.world.now += 1.0
        return slot

    @property
    def in_flight(self):
        return sum(record.in_flight for record in self.registry.records.values())


@pytest.fixture
def versions():
    versions = Versions()
    for adapter_id in "abc":
        versions.load(adapter_id)
    yield versions
    check_integrity(versions.registry)


def test_one_as_it_was_trained_is_its_device_slot(versions):
    plain = versions.ask(("a", 1.0))
    slot = versions.bring(plain)
    assert slot < SLOTS and versions.port.expand(slot) == ((slot, 1.0),)
    versions.port.deactivate(plain)
    versions.port.release(plain)
    assert versions.in_flight == 0


def test_a_batch_slot_stands_for_device_slots_and_weights_in_the_order_of_members(versions):
    both, strong = versions.ask(("b", 0.5), ("a", -2.0)), versions.ask(("a", 3.0))
    slots = {adaptation: versions.bring(adaptation) for adaptation in (both, strong)}
    assert sorted(slots.values()) == [SLOTS, SLOTS + 1]
    for adaptation, batch_slot in slots.items():
        device = [versions.registry.records[version].slot for version in adaptation.versions]
        weights = [member.weight for member in adaptation.members]
        assert list(versions.port.expand(batch_slot)) == list(zip(device, weights, strict=True))
    assert versions.port.try_activate(both) == slots[both], "users share it"
    assert versions.ask(("a", -2.0), ("b", 0.5)) == both


def test_a_number_is_used_again_when_its_last_user_has_gone(versions):
    first, second = versions.ask(("a", 0.5)), versions.ask(("a", 0.25))
    slot = versions.bring(first)
    versions.bring(first)
    versions.port.deactivate(first)
    assert versions.bring(second) == slot + 1
    versions.port.deactivate(first)
    assert versions.bring(versions.ask(("b", 0.5))) == slot
    with pytest.raises(KeyError):
        versions.port.deactivate(first)


def test_all_members_are_active_or_none(versions):
    versions.bring(versions.ask(("a", 1.0)))
    both = versions.ask(("a", 1.0), ("b", 1.0))
    assert versions.port.try_activate(both) is None
    active = {version.adapter_id: record.active for version, record in versions.registry.records.items()}
    assert active == {"a": 1, "b": 0, "c": 0}
    assert [version.adapter_id for version in versions.registry.wanted] == ["b"]


def test_dropped_member_fails_the_composition_and_leaves_no_activation(versions):
    both = versions.ask(("a", 1.0), ("b", 1.0))
    versions.bring(both)
    versions.world.unload("b")
    versions.world.now += 1000
    assert [version.adapter_id for version in versions.registry.expire(versions.world.now)] == ["b"]
    with pytest.raises(AdapterUnloadedError, match="'b'"):
        versions.port.try_activate(both)
    versions.port.deactivate(both)
    versions.port.release(both)
    assert all(not record.active and not record.in_flight for record in versions.registry.records.values())


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ((("a", 1.0), ("nope", 1.0), ("b", 1.0)), AdapterNotFoundError),
        ((("a", 1.0), ("b", 1.0), ("a@0000", 1.0)), AdapterNotFoundError),
        ((("a", 1.0), ("x" * 3 + "@zz", 1.0)), AdapterDigestError),
        ((("a", 0.5), ("a", 0.5)), AdapterCompositionError),
        ((("a", 0.5), (f"a@{digest_of('a')[:8]}", 0.5)), AdapterCompositionError),
        ((("b", 1.0), ("prod", 1.0)), AdapterCompositionError),
    ],
)
def test_refused_composition_holds_nothing(versions, members, error):
    versions.world.set_alias("prod", versions.registry.current["b"].version)
    with pytest.raises(error):
        versions.ask(*members)
    assert versions.in_flight == 0


def test_two_versions_of_an_adapter_are_two_members(versions):
    old = versions.registry.current["a"].version
    versions.world.set_alias("old", old)
    new = versions.load("a", content="a2")
    both = versions.ask(("a", 0.5), ("old", 0.5))
    assert set(both.versions) == {old, new} and both.adapter_ids == ("a",)
    versions.port.release(both)


def full(*modules, **more):
    return {"full_modules": frozenset(modules), "modules": frozenset({*modules, "layers.0.q_proj"}), **more}


@pytest.mark.parametrize("weight", [0.0, 0.5, -1.0, 1.0])
def test_whole_modules_have_the_weight_1_only(versions, weight):
    versions.load("w", **full("lm_head"))
    if weight == 1.0:
        assert versions.ask(("w", weight)).is_plain
        assert len(versions.ask(("a", weight), ("w", weight)).members) == 2
        return
    for members in ((("w", weight),), (("a", 1.0), ("w", weight))):
        with pytest.raises(AdapterCompositionError, match=r"'w' does more .* \(in lm_head\)") as caught:
            versions.ask(*members)
        assert caught.value.metadata == {"adapter_id": "w", "module": "lm_head"}
    assert versions.in_flight == 0


@pytest.mark.parametrize(
    ("other", "clash"),
    [
        (full("lm_head"), "lm_head"),
        ({"modules": frozenset({"lm_head"})}, "lm_head"),
        (full("layers.0.q_proj"), "layers.0.q_proj"),
        (full("embed_tokens", vocab_size=110), "token ids"),
        (full("embed_tokens"), None),
    ],
)
def test_whole_modules_share_their_module_with_nobody(versions, other, clash):
    versions.load("w", **full("lm_head", vocab_size=101))
    versions.load("o", **other)
    for order in ("wo", "ow"):
        members = [(adapter_id, 1.0) for adapter_id in order]
        if clash is None:
            versions.port.release(versions.ask(*members))
            continue
        with pytest.raises(AdapterCompositionError, match=clash) as caught:
            versions.ask(*members)
        assert {caught.value.metadata["adapter_id"], caught.value.metadata["other_adapter_id"]} == {"w", "o"}
    assert versions.in_flight == 0


def test_own_tokenizers_clash_unless_they_are_the_same(versions):
    one, other = object(), object()
    for adapter_id, tokenizer in (("a", one), ("b", other), ("c", one)):
        versions.registry.current[adapter_id].tokenizer = tokenizer
    with pytest.raises(AdapterCompositionError, match="'a' and 'b' each have a tokenizer"):
        versions.ask(("a", 1.0), ("b", 1.0))
    versions.port.release(versions.ask(("a", 1.0), ("c", 1.0)))


def test_what_never_fits_together_is_refused_when_it_is_asked_for():
    versions = Versions(device_budget=25)
    for adapter_id in "abc":
        versions.load(adapter_id)
    versions.bring(versions.ask(("a", 1.0), ("b", 1.0)))
    with pytest.raises(AdapterMemoryError, match="'a', 'b', 'c' need 30 bytes"):
        versions.ask(("a", 1.0), ("b", 1.0), ("c", 1.0))
    versions.registry.pin("c", Tier.DEVICE)
    with pytest.raises(AdapterMemoryError, match="pinned ones take 10"):
        versions.ask(("a", 1.0), ("b", 1.0))
    versions.port.release(versions.ask(("a", 1.0), ("c", 0.5)))


def test_what_a_later_pin_leaves_no_room_for_fails_instead_of_waiting():
    versions = Versions(device_budget=25)
    for adapter_id in "abc":
        versions.load(adapter_id)
    both = versions.ask(("a", 1.0), ("b", 1.0))
    assert versions.port.try_activate(both) is None
    versions.registry.pin("c", Tier.DEVICE)
    with pytest.raises(AdapterMemoryError):
        versions.port.try_activate(both)
    versions.port.release(both)
    assert versions.in_flight == 0


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    num_slots=st.integers(2, 4),
    budget=st.integers(30, 60),
    host_budget=st.sampled_from([20, 30, 100]),
    seed=st.integers(0, 2**16),
)
def test_what_alone_is_asked_for_comes_whatever_was_asked_for_before(num_slots, budget, host_budget, seed):
    """Promise 2 of the port, with the registry's leases and evictions."""
    rng = random.Random(seed)
    versions = Versions(host_budget=host_budget, device_budget=budget, max_slots=num_slots)
    versions.port = CompositionPort(versions, num_slots, clock=lambda: versions.world.now)
    for adapter_id in "abcdef":
        versions.load(adapter_id, rng.choice([5, 10, 15]))
    asked: list[Adaptation] = []
    for _ in range(6):
        members = rng.sample("abcdef", rng.randint(1, num_slots))
        try:
            asked.append(versions.ask(*((adapter_id, rng.choice([0.5, 1.0])) for adapter_id in members)))
        except AdapterMemoryError:
            continue
    running: list[Adaptation] = []
    for _ in range(30):
        for adaptation in rng.sample(asked, rng.randint(0, len(asked))):
            if versions.port.try_activate(adaptation) is not None:
                running.append(adaptation)
        if running and rng.random() < 0.4:
            versions.port.deactivate(running.pop(rng.randrange(len(running))))
        versions.load_next()
        versions.world.now += rng.choice([0.1, 1.0, 3.0])
        check_integrity(versions.registry)
        # Who runs has all of its members, on the slots that its batch slot stands for.
        for adaptation in running:
            assert all(versions.registry.records[version].active for version in adaptation.versions)
    for adaptation in running:
        versions.port.deactivate(adaptation)
    for adaptation in asked:
        versions.bring(adaptation, seconds=6 * (TURN_S + REST_S + LEASE_S))
        versions.port.deactivate(adaptation)
        versions.port.release(adaptation)
    assert versions.in_flight == 0
    assert all(not record.active for record in versions.registry.records.values())
    assert not versions.port._active and not versions.port._expansions


def test_two_compositions_that_do_not_fit_together_take_turns():
    versions = Versions(device_budget=20)
    for adapter_id in "abcd":
        versions.load(adapter_id)
    pair = [versions.ask(("a", 1.0), ("b", 1.0)), versions.ask(("c", 1.0), ("d", 1.0))]
    served = [0, 0]
    for _ in range(200):  # both are asked for all the time
        for i, adaptation in enumerate(pair):
            if versions.port.try_activate(adaptation) is not None:
                served[i] += 1
                versions.port.deactivate(adaptation)
        versions.load_next()
        versions.world.now += 0.5
    assert min(served) > 3
