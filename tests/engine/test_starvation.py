"""More adapters than slots, arrivals without end: every request gets its turn, within a bound that is written down."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from lorikeet.server.engine.request import Phase
from lorikeet.server.engine.sampling_params import SamplingParams

from .fake_world import NEVER, World, prompt_of, version

BOUND_S = 4.0
MAX_TOKENS = 5
PROMPT = 6
LOAD_STEPS = 2
LONG = SamplingParams(temperature=0.0, max_tokens=100)


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


def resident(world: World, *adapters) -> None:
    """Put versions on the device; nothing else comes in (load_steps is NEVER)."""
    for slot, adapter in enumerate(adapters):
        world.adapters.slots[slot] = adapter


def test_what_younger_requests_may_do_while_one_is_blocked():
    world = World(num_slots=2, max_running=8, load_steps=NEVER, starvation_bound_s=BOUND_S)
    active, idle = version("active"), version("idle")
    resident(world, active, idle)
    running = world.submit([1], LONG, active)
    blocked = world.submit([1], LONG, version("blocked"))
    world.engine.step()
    assert running.request.phase is Phase.RUNNING

    def admitted() -> list[bool]:
        """Of an active version, of one that is on the device but not active, of the base."""
        clients = [world.submit([1], LONG, adapter) for adapter in (active, idle, None)]
        world.engine.step()
        phases = [client.request.phase for client in clients]
        for client in clients:
            world.engine.abort(client.request.request_id)
        world.engine.step()
        return [phase is Phase.RUNNING for phase in phases]

    assert admitted() == [True, True, True]
    world.clock.now += BOUND_S
    assert admitted() == [True, False, True]
    world.clock.now += BOUND_S
    assert admitted() == [False, False, True]
    assert blocked.request.phase is Phase.WAITING


def test_slot_reserved_by_a_younger_request_is_given_back_for_one_that_starves():
    world = World(num_slots=1, num_blocks=10, max_running=4, starvation_bound_s=BOUND_S)
    first = world.submit([1], LONG, version("a"))
    memory = world.submit(prompt_of(1, 12), LONG)
    for _ in range(3):
        world.engine.step()
    assert first.request.phase is memory.request.phase is Phase.RUNNING
    starving = world.submit([1], LONG, version("b"))
    large = world.submit(prompt_of(2, 35), LONG, version("a"))
    world.engine.step()
    assert large.request.slot == 0, "it has its adapter and waits for blocks"
    world.engine.abort(first.request.request_id)
    for _ in range(5):
        world.clock.now += BOUND_S
        world.engine.step()
    assert memory.request.phase is starving.request.phase is Phase.RUNNING
    assert large.request.phase is Phase.WAITING and large.request.slot == -1
