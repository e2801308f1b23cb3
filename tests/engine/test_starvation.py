"""More adapters than slots, arrivals without end: every request gets its turn, within a bound that is written down."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from lorikeet.server.engine.request import Phase
from lorikeet.server.engine.sampling_params import SamplingParams

from .fake_world import World, version

BOUND_S = 4.0
MAX_TOKENS = 5
PROMPT = 6
LOAD_STEPS = 2


def endless(world: World, num_adapters: int, rng: random.Random, rate: int) -> None:
    """Arrivals of one round: the first adapters are the most popular, and one is always asked for."""
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    for i in range(rate):
        index = 0 if i == 0 else min(rng.randrange(num_adapters), rng.randrange(num_adapters))
        adapter = None if rng.random() < 0.1 else version(f"v{index}")
        world.submit([rng.randrange(26) for _ in range(rng.randint(1, PROMPT))], params, adapter)


def rounds_until_all_end(world: World, requests, num_adapters: int, rng: random.Random, rate: int, limit: int) -> int:
    for i in range(limit):
        if all(request.phase is Phase.FINISHED for request in requests):
            return i
        endless(world, num_adapters, rng, rate)
        world.engine.step()
        world.clock.now += 1.0
    return limit


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    num_slots=st.integers(1, 3),
    surplus=st.integers(1, 6),
    num_blocks=st.sampled_from([5, 12, 100]),
    rate=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_no_request_starves(num_slots, surplus, num_blocks, rate, seed):
    rng = random.Random(seed)
    world = World(
        num_slots=num_slots,
        num_blocks=num_blocks,
        max_running=4,
        token_budget=8,
        max_waiting=10**6,
        load_steps=LOAD_STEPS,
        seed=seed,
        starvation_bound_s=BOUND_S,
    )
    num_adapters = num_slots + surplus
    for _ in range(10):
        endless(world, num_adapters, rng, rate)
        world.engine.step()
        world.clock.now += 1.0
    # The one that nobody else asks for, behind everything that has gathered.
    victim = world.submit([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS), version("rare"))
    older = [client.request for client in world.clients if client.request.phase is not Phase.FINISHED]
    # Each of them is the oldest at some time. Then it needs at most: twice the bound to clear the slots, one request's
    # length for those that still run, a load (after the loads that were asked for before it), and its own length.
    length = PROMPT + MAX_TOKENS
    turn = 2 * BOUND_S + length + (LOAD_STEPS + 1) * (num_adapters + 2) + length
    limit = int(len(older) * turn)
    taken = rounds_until_all_end(world, older, num_adapters, rng, rate, limit)
    assert taken < limit
    assert victim.end is not None
    world.scheduler.check_integrity()


def test_without_the_bound_a_popular_adapter_starves_another():
    """Shows that the arrivals of these tests do starve who is not protected."""
    rng = random.Random(0)
    world = World(num_slots=1, max_running=4, token_budget=8, max_waiting=10**6, starvation_bound_s=1e9)
    endless(world, 1, rng, 1)
    victim = world.submit([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS), version("rare"))
    assert rounds_until_all_end(world, [victim.request], 1, rng, 1, 600) == 600


def test_with_the_bound_the_same_request_gets_in():
    rng = random.Random(0)
    world = World(num_slots=1, max_running=4, token_budget=8, max_waiting=10**6, starvation_bound_s=BOUND_S)
    endless(world, 1, rng, 1)
    victim = world.submit([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS), version("rare"))
    assert rounds_until_all_end(world, [victim.request], 1, rng, 1, 600) < 2 * BOUND_S + 30


def test_before_twice_the_bound_active_adapters_are_still_served():
    world = World(num_slots=2, max_running=4, starvation_bound_s=BOUND_S)
    long = SamplingParams(temperature=0.0, max_tokens=100)
    for name in ("a", "b"):
        world.submit([1], long, version(name))
    world.engine.step()
    world.engine.step()
    world.engine.step()
    blocked = world.submit([1], long, version("c"))
    world.engine.step()
    world.clock.now += BOUND_S + 1
    again, new, base = (world.submit([1], long, adapter) for adapter in (version("a"), version("d"), None))
    world.engine.step()
    assert again.request.phase is base.request.phase is Phase.RUNNING
    assert blocked.request.phase is new.request.phase is Phase.WAITING
    world.engine.abort(base.request.request_id)
    world.clock.now += BOUND_S
    again = world.submit([1], long, version("a"))
    base = world.submit([1], long, None)
    world.engine.step()
    assert again.request.phase is Phase.WAITING
    assert base.request.phase is Phase.RUNNING
