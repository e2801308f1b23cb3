"""Caps of one adapter: how many of its requests run, how many wait, how many tokens it gets in a minute."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorikeet.server.engine.inbox import Inbox
from lorikeet.server.engine.limits import AdapterLimits, TokenRates
from lorikeet.server.engine.request import Phase, Request
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.errors import AdapterQueueFullError, AdapterRateError

from .fake_adapters import NEVER, version
from .fake_world import Clock, World, prompt_of

LONG = SamplingParams(temperature=0.0, max_tokens=50)
A, A2, B = version("a"), version("a", "newer"), version("b")


def steps(world: World, count: int) -> None:
    for _ in range(count):
        world.engine.step()
        world.scheduler.check_integrity()
        world.clock.now += 1.0


def running(clients) -> list[bool]:
    return [client.request.phase is Phase.RUNNING for client in clients]


@pytest.mark.parametrize("limits", [{"weight": 0.0}, {"weight": float("inf")}, {"max_running": 0}, {"max_waiting": 0}])
def test_limits_out_of_range_are_refused(limits):
    with pytest.raises(ValueError, match="must be"):
        AdapterLimits(**limits)


def test_no_more_run_than_may_over_all_versions_and_others_pass_by():
    world = World(limits={"a": AdapterLimits(max_running=2)})
    world.adapters.put(A, A2)
    of_a = [world.submit([1], LONG, version) for version in (A, A2, A, A2)]
    others = [world.submit([1], LONG, B), world.submit([1], LONG)]
    steps(world, 6)
    assert running(of_a) == [True, True, False, False]
    assert running(others) == [True, True]
    world.engine.abort(of_a[1].request.request_id)
    steps(world, 3)
    assert running(of_a) == [True, False, True, False]


def test_cap_of_the_base():
    world = World(limits={"": AdapterLimits(max_running=1)})
    clients = [world.submit([1], LONG), world.submit([1], LONG), world.submit([1], LONG, A)]
    steps(world, 4)
    assert running(clients) == [True, False, True]


def test_raised_cap_lets_those_in_that_wait_and_a_lowered_one_preempts_nobody():
    world = World(limits={"a": AdapterLimits(max_running=1)})
    clients = [world.submit([1], LONG, A) for _ in range(3)]
    steps(world, 3)
    assert running(clients) == [True, False, False]
    world.limits["a"] = AdapterLimits(max_running=3)
    world.engine.limits_changed()
    steps(world, 1)
    assert running(clients) == [True, True, True]
    world.limits["a"] = AdapterLimits(max_running=1)
    world.engine.limits_changed()
    late = world.submit([1], LONG, A)
    steps(world, 1)
    assert running([*clients, late]) == [True, True, True, False]
    world.run()
    world.check_nothing_is_held()


def test_preempted_request_gives_its_place_under_the_cap_to_an_older_one():
    world = World(num_blocks=6, max_running=8, prefix_cache=False, limits={"a": AdapterLimits(max_running=1)})
    base = world.submit(prompt_of(1, 8), LONG)
    capped = [world.submit(prompt_of(2, 6), LONG, A), world.submit([1], LONG, A)]
    steps(world, 3)
    assert running([base, *capped]) == [True, True, False]
    while capped[0].request.phase is Phase.RUNNING:
        steps(world, 1)
    assert capped[0].request.num_preemptions == 1
    world.run()
    world.check_nothing_is_held()


def test_request_at_its_cap_that_has_a_slot_gives_it_back():
    """It waits for blocks with its adapter reserved when another request of the adapter takes the last place."""
    world = World(num_blocks=8, num_slots=1, limits={"a": AdapterLimits(max_running=2)})
    first, memory = world.submit([1], LONG, A), world.submit(prompt_of(1, 20), LONG)
    steps(world, 3)
    large = world.submit(prompt_of(2, 24), LONG, A)
    steps(world, 1)
    assert large.request.slot == 0 and large.request.phase is Phase.WAITING
    world.limits["a"] = AdapterLimits(max_running=1)
    world.engine.limits_changed()
    steps(world, 1)
    assert large.request.slot == -1
    assert running([first, memory, large]) == [True, True, False]
    world.run()
    world.check_nothing_is_held()


def test_parked_request_at_its_cap_holds_nobody_back():
    """Its adapter is on its way, but it could not run if it came."""
    world = World(num_slots=3, load_steps=NEVER, starvation_bound_s=4.0, limits={"a": AdapterLimits(max_running=1)})
    world.adapters.put(A, B)
    world.submit([1], LONG, A)
    parked = world.submit([1], LONG, A2)
    steps(world, 20)
    other = world.submit([1], LONG, B)
    steps(world, 1)
    assert running([parked, other]) == [False, True]
    world.adapters.put(A, B, A2)
    world.limits["a"] = AdapterLimits()
    world.engine.limits_changed()
    steps(world, 2)
    assert running([parked]) == [True]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    caps=st.lists(st.sampled_from([None, 1, 2, 3]), min_size=3, max_size=3),
    num_slots=st.integers(1, 3),
    num_blocks=st.sampled_from([6, 10, 60]),
    seed=st.integers(0, 2**16),
)
def test_caps_hold_and_everything_ends(caps, num_slots, num_blocks, seed):
    """With holds, reserved slots, preemption and changes of the caps."""
    rng = random.Random(seed)
    ids = ["", "a", "b"]
    world = World(
        num_slots=num_slots,
        num_blocks=num_blocks,
        max_running=5,
        load_steps=2,
        seed=seed,
        starvation_bound_s=3.0,
        max_wait_s=5.0,
        limits={adapter_id: AdapterLimits(max_running=cap) for adapter_id, cap in zip(ids, caps, strict=True)},
    )
    highest = {adapter_id: cap or 99 for adapter_id, cap in zip(ids, caps, strict=True)}
    for i in range(40):
        if i == 20:
            world.limits["a"] = AdapterLimits(max_running=1)
            world.engine.limits_changed()
        for _ in range(rng.randrange(3)):
            params = SamplingParams(temperature=0.0, max_tokens=rng.randint(1, 8))
            world.submit(prompt_of(rng.randrange(99), rng.randint(1, 12)), params, rng.choice([None, A, A2, B]))
        steps(world, 1)
        counts = [sum(request.adapter_id == adapter_id for request in world.scheduler.running) for adapter_id in ids]
        assert all(count <= highest[adapter_id] for count, adapter_id in zip(counts, ids, strict=True))
    world.run()
    world.check_nothing_is_held()


def test_no_more_wait_than_may_and_others_are_accepted():
    world = World(max_running=1, limits={"a": AdapterLimits(max_waiting=2)})
    world.adapters.put(A, A2)
    for adapter in (A, A2):
        world.submit([1], LONG, adapter)
    with pytest.raises(AdapterQueueFullError, match=r"'a' has .* may wait \(2\)") as caught:
        world.submit([1], LONG, A)
    assert caught.value.metadata == {"adapter_id": "a", "max_waiting": "2"}
    world.clients.pop()
    world.submit([1], LONG, B)
    world.submit([1], LONG)
    steps(world, 1)
    assert running(world.clients) == [True, False, False, False]
    world.submit([1], LONG, A2)
    with pytest.raises(AdapterQueueFullError):
        world.submit([1], LONG, A2)
    world.clients.pop()
    world.engine.abort(world.clients[1].request.request_id)
    steps(world, 1)
    world.submit([1], LONG, A)


def test_requests_of_the_server_itself_pass_the_caps():
    limits = AdapterLimits(max_waiting=1, tokens_per_minute=1)
    world = World(limits={"a": limits})
    world.submit([1, 2, 3], LONG, A)
    own = world.client([1], LONG, A)
    own.request.capture = lambda _: None
    world.engine.submit(own.request)
    with pytest.raises(AdapterQueueFullError):
        world.submit([1], LONG, A)


def test_prompt_and_generated_tokens_count_and_the_refusal_says_when_to_come_back():
    world = World(limits={"a": AdapterLimits(tokens_per_minute=60)}, max_context=100)
    now = world.clock.now
    params = SamplingParams(temperature=0.0, max_tokens=50)
    world.submit(prompt_of(1, 40), params, A)
    while not world.clients[0].end:
        world.engine.step()  # the clock stands still: 40 + 50 of 60 tokens are used
    with pytest.raises(AdapterRateError, match="60 tokens a minute") as caught:
        world.submit([1], params, A)
    assert caught.value.metadata == {"adapter_id": "a", "tokens_per_minute": "60", "retry_after_s": "31.000"}
    world.submit([1], params, B)
    world.clock.now = now + 30.99
    with pytest.raises(AdapterRateError):
        world.submit([1], params, A)
    world.clock.now = now + 31.0
    world.submit([1], params, A)


def test_refused_request_uses_up_nothing():
    world = World(max_running=1, limits={"a": AdapterLimits(max_waiting=1, tokens_per_minute=100)})
    world.adapters.put(A)
    world.submit(prompt_of(1, 60), LONG, A)
    for _ in range(5):
        with pytest.raises(AdapterQueueFullError):
            world.submit(prompt_of(2, 60), LONG, A)
    world.engine.step()
    world.submit(prompt_of(3, 60), LONG, A)
    world.engine.abort(world.clients[-1].request.request_id)
    world.engine.step()
    with pytest.raises(AdapterRateError, match="100 tokens"):
        world.submit([1], LONG, A)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(per_minute=st.integers(1, 1000), seed=st.integers(0, 2**16))
def test_tokens_of_any_time_are_bounded_and_who_comes_back_as_told_is_accepted(per_minute, seed):
    rng = random.Random(seed)
    rates, now, start, used, largest = TokenRates(), 100.0, 100.0, 0, 0
    for _ in range(200):
        now += rng.choice([0.0, 0.001, 1.0, 20.0])
        try:
            rates.check("a", per_minute, now)
        except AdapterRateError as error:
            now += float(error.metadata["retry_after_s"])
            rates.check("a", per_minute, now)
        prompt, generated = rng.randint(1, 300), rng.randint(0, 100)
        rates.accept("a", per_minute, prompt, now)
        rates.spend({"a": generated, "unlimited": 5}, now)
        used, largest = used + prompt + generated, max(largest, prompt + generated)
        assert used <= per_minute * (1 + (now - start) / 60) + largest
    assert len(rates) == 1


def test_buckets_that_are_full_again_are_forgotten():
    rates = TokenRates()
    for i in range(10_000):
        rates.accept(f"v{i}", 60, 1, float(i))
    assert len(rates) < 200


def test_inbox_keeps_nothing_of_adapters_that_came_and_went():
    clock = Clock()
    inbox = Inbox(10, lambda _: AdapterLimits(max_waiting=3, tokens_per_minute=60), clock)
    for i in range(10_000):
        clock.now += 1.0
        request = Request(f"r{i}", [1], LONG, version(f"v{i}"), lambda _: None)
        inbox.submit(request)
        inbox.take()
        inbox.set_num_waiting(0, {request.adapter_id: 0})
        inbox.close(request)
    assert len(inbox._waiting) + len(inbox._submitted) + len(inbox._live) == 0
    assert len(inbox._rates) < 200
