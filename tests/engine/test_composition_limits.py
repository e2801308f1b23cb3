"""Wrapping an adapter into a composition gets nobody around its shares and caps, and combinations take no memory."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorikeet.server.engine.fair_share import SLACK
from lorikeet.server.engine.limits import AdapterLimits
from lorikeet.server.engine.request import Phase
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.errors import AdapterQueueFullError, AdapterRateError

from .fake_adapters import blend, version
from .fake_world import World, prompt_of
from .test_fair_share import DEAREST, Bench

LONG = SamplingParams(temperature=0.0, max_tokens=50)
IDS = ["a", "b", "c", "d"]


def wrap(rng: random.Random, adapter_id: str):
    """The adapter: alone, with a strength, or among others, in any order and with any weights."""
    others = rng.sample([other for other in IDS if other != adapter_id], rng.randrange(4))
    parts = [(name, rng.choice([0.0, -1.0, 0.5, 1.0])) for name in (adapter_id, *others)]
    rng.shuffle(parts)
    return blend(*parts)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    cap=st.integers(1, 3),
    max_waiting=st.integers(1, 5),
    num_blocks=st.sampled_from([8, 60]),
    seed=st.integers(0, 2**16),
)
def test_caps_hold_for_every_member_whatever_is_wrapped_around_it(cap, max_waiting, num_blocks, seed):
    rng = random.Random(seed)
    limits = {"a": AdapterLimits(max_running=cap, max_waiting=max_waiting)}
    world = World(
        num_slots=4, num_blocks=num_blocks, max_running=8, load_steps=1, seed=seed, max_wait_s=5.0, limits=limits
    )
    for _ in range(40):
        for _ in range(rng.randrange(4)):
            params = SamplingParams(temperature=0.0, max_tokens=rng.randint(1, 8))
            client = world.client(prompt_of(rng.randrange(99), rng.randint(1, 12)), params, wrap(rng, "a"))
            waiting = sum("a" in c.request.adapter_ids and c.request.phase is Phase.WAITING for c in world.clients[:-1])
            try:
                world.engine.submit(client.request)
            except AdapterQueueFullError as error:
                assert error.metadata["adapter_id"] == "a" and waiting >= max_waiting
                world.clients.remove(client)
                world.adapters.unpin(client.request.adapter)
            else:
                assert waiting < max_waiting
        world.engine.step()
        world.scheduler.check_integrity()
        world.clock.now += 1.0
        assert sum("a" in request.adapter_ids for request in world.scheduler.running) <= cap
    world.run()
    world.check_nothing_is_held()


def test_tokens_a_minute_count_in_full_for_each_member_and_a_refusal_uses_none_up():
    limits = {"a": AdapterLimits(tokens_per_minute=60), "b": AdapterLimits(tokens_per_minute=1000)}
    world = World(limits=limits, max_context=200)
    world.submit(prompt_of(1, 40), LONG, blend(("b", 0.5), ("a", 0.0)))
    while not world.clients[0].end:
        world.engine.step()  # the clock stands still: 40 + 50 of 60 tokens are used
    for adapter in (version("a"), blend(("a", 0.25)), blend(("c", 1.0), ("a", 1.0), ("b", 1.0))):
        with pytest.raises(AdapterRateError) as caught:
            world.submit([1] * 30, LONG, adapter)
        assert caught.value.metadata["adapter_id"] == "a"
    left = world.engine._inbox._rates._buckets["b"].left
    assert left == 1000 - 90
    world.submit([1], LONG, version("b"))


def test_full_queue_of_one_member_refuses_and_charges_no_other():
    world = World(max_running=1, limits={"a": AdapterLimits(tokens_per_minute=50), "b": AdapterLimits(max_waiting=1)})
    world.submit([1], LONG, version("b"))
    with pytest.raises(AdapterQueueFullError, match="'b' has"):
        world.submit([1] * 40, LONG, blend(("a", 1.0), ("b", 1.0)))
    world.clients.pop()
    assert len(world.engine._inbox._rates) == 0
    world.submit([1] * 49, LONG, version("a"))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(weight=st.sampled_from([0.25, 1.0, 4.0]), strangers=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_wrapped_flood_gets_ahead_of_one_that_waits_by_a_constant(weight, strangers, seed):
    """`a` floods within all sorts of compositions with adapters that nobody else uses; `f` always waits."""
    rng = random.Random(seed)
    bench = Bench(weights={"a": weight})
    others = [f"x{i}" for i in range(strangers)]
    bench.bring_in(version("f"), version("a"), *(version(name) for name in others))
    of_a = 0.0
    for _ in range(600):
        while bench.num_waiting.get("f", 0) < 6:
            bench.add(version("f"), 12, 8)
            bench.num_waiting["f"] = bench.num_waiting.get("f", 0) + 1
        while bench.num_waiting.get("a", 0) < 12:
            members = [("a", 0.5), *((name, 0.5) for name in rng.sample(others, rng.randint(0, len(others))))]
            bench.add(blend(*members), 12, 8)
            bench.num_waiting["a"] = bench.num_waiting.get("a", 0) + 1
        bench.step()
        of_a = sum(tokens for name, tokens in bench.service.items() if "a" in name.split("+"))
        assert of_a / weight - bench.service.get("f", 0.0) <= 2 * 4 * DEAREST / min(weight, 1.0) + SLACK
    assert of_a > 0


def test_composition_gets_turns_beside_floods_of_each_of_its_members():
    """By age, not once in `max_wait_s`: one of two that always wait is always behind."""
    bench = Bench()
    bench.bring_in(version("a"), version("b"))
    both = []
    for i in range(600):
        while bench.num_waiting.get("a", 0) < 6 or bench.num_waiting.get("b", 0) < 6:
            for adapter in (version("a"), version("b")):
                bench.add(adapter, 6, 4)
            bench.num_waiting = bench.scheduler.count_waiting_by_adapter()
        if i % 12 == 0:
            both.append(bench.add(blend(("a", 0.5), ("b", 0.5)), 6, 4))
        bench.step()
    done = [request for request in both if request.phase is Phase.FINISHED]
    assert len(done) > 0.8 * len(both)


def test_in_debt_of_one_member_a_composition_waits_and_the_other_member_does_not():
    bench = Bench(num_blocks=4000, max_running=4, token_budget=64, weights={"debtor": 0.01})
    bench.bring_in(version("debtor"), version("a"), version("f"))
    bench.add(version("debtor"), 60, 8)  # counts a hundredfold
    for _ in range(400):
        bench.add(version("f"), 4, 4)
    for _ in range(15):
        bench.step()
    wrapped = bench.add(blend(("a", 1.0), ("debtor", 1.0)), 4, 4)
    alone = [bench.add(version("a"), 4, 4) for _ in range(10)]
    for _ in range(100):
        bench.step()
    assert wrapped.phase is Phase.WAITING
    assert all(request.phase is Phase.FINISHED for request in alone)


def test_oldest_of_all_goes_first_though_its_adapters_stay_at_their_caps():
    """Its two adapters' places never become free at the same time by themselves."""
    world = World(
        num_slots=3, max_wait_s=6.0, limits={"a": AdapterLimits(max_running=1), "b": AdapterLimits(max_running=1)}
    )
    world.adapters.put(version("a"), version("b"))
    params = SamplingParams(temperature=0.0, max_tokens=6)
    for _ in range(3):
        world.submit([1], params, version("a"))
        world.engine.step()
        world.submit([1], params, version("b"))
        world.engine.step()
    both = world.submit([1], params, blend(("a", 1.0), ("b", 1.0)))
    for i in range(200):
        world.submit([1], params, version("ab"[i % 2]))
        world.engine.step()
        world.scheduler.check_integrity()
        world.clock.now += 0.5
        if both.end:
            break
    assert both.end is not None


def test_nothing_grows_with_invented_combinations():
    """Thousands of combinations, strengths and orders, beside a request that always waits."""
    bench = Bench(num_blocks=16, weights={"": 0.1})
    bench.bring_in(*(version(name) for name in IDS))
    shares, lanes, blocks = bench.scheduler._shares, bench.scheduler._waiting, bench.scheduler.blocks
    subsets = [subset for n in (1, 2, 3, 4) for subset in itertools.permutations(IDS, n)]
    for i in range(500):
        adapter = blend(*((name, (i + 1) / 64) for name in subsets[i % len(subsets)]))
        request = bench.add(adapter, 5, 1)
        while request.phase is not Phase.FINISHED:
            while bench.num_waiting.get("", 0) < 8:
                bench.add(None, 1, 2)
                bench.num_waiting[""] = bench.num_waiting.get("", 0) + 1
            bench.step()
        assert len(shares._shares) + len(shares._unserved) + len(shares._idle) < 20
        assert len(lanes._lanes) + len(lanes._siblings) < 10 and len(lanes._orders) < 100
        assert len(blocks._by_owner) <= len(IDS) + 1
        port = bench.adapters.port
        assert not port._active and not port._expansions and len(port._free) <= 2
