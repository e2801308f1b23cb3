"""More adapters than slots, arrivals without end: every request gets its turn, within a bound that is written down.

Whatever the adapters' weights and caps, and whoever comes: ids that were not there before, new versions of old ones.
"""

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from lorikeet.server.engine.limits import AdapterLimits
from lorikeet.server.engine.request import Phase
from lorikeet.server.engine.sampling_params import SamplingParams

from .fake_adapters import LEASE_ROUNDS, NEVER, blend, version
from .fake_world import World, prompt_of

BOUND_S = 4.0
MAX_WAIT_S = 7.0
NUM_STRANGERS = 20
MAX_TOKENS = 5
PROMPT = 6
LOAD_STEPS = 2
LONG = SamplingParams(temperature=0.0, max_tokens=100)


def endless(
    world: World, num_adapters: int, rng: random.Random, rate: int, strangers: bool = False, composed: bool = False
) -> None:
    """Arrivals of one round: the first adapters are the most popular, and one is always asked for.

    With strangers, there is one more for an adapter that hardly anybody else asks for, and adapters have two versions.
    With composed, half of them are for two adapters at once, as far as there are slots for two.
    """
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    for i in range(rate + strangers):
        index = 0 if i == 0 else min(rng.randrange(num_adapters), rng.randrange(num_adapters))
        content = str(rng.randint(1, 2)) if strangers else "1"
        adapter = None if rng.random() < 0.1 else version(f"v{index}", content)
        if composed and adapter is not None and len(world.adapters.slots) > 1 and rng.random() < 0.5:
            adapter = blend((f"v{index}", 0.5), (f"w{rng.randrange(num_adapters)}", rng.choice([0.5, 1.0])))
        if i == rate:
            adapter = version(f"stranger{len(world.clients) % NUM_STRANGERS}")
        world.submit([rng.randrange(26) for _ in range(rng.randint(1, PROMPT))], params, adapter)


def rounds_until_all_end(
    world: World,
    requests,
    num_adapters: int,
    rng: random.Random,
    rate: int,
    limit: int,
    strangers: bool = False,
    composed: bool = False,
) -> int:
    for i in range(limit):
        if all(request.phase is Phase.FINISHED for request in requests):
            return i
        endless(world, num_adapters, rng, rate, strangers, composed)
        world.engine.step()
        world.clock.now += 1.0
    return limit


LIMITS = st.builds(
    AdapterLimits, weight=st.sampled_from([1e-6, 1.0, 1.0, 1e6]), max_running=st.sampled_from([None, None, 1, 2])
)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    num_slots=st.integers(1, 3),
    surplus=st.integers(1, 6),
    num_blocks=st.sampled_from([5, 12, 100]),
    rate=st.integers(1, 3),
    strangers=st.booleans(),
    composed=st.booleans(),
    limits=st.dictionaries(st.sampled_from(["", "rare", "v0", "v1", "v2", "w0", "stranger0"]), LIMITS),
    seed=st.integers(0, 2**16),
)
def test_no_request_starves(num_slots, surplus, num_blocks, rate, strangers, composed, limits, seed):
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
        max_wait_s=MAX_WAIT_S,
        limits=limits,
    )
    num_adapters = num_slots + surplus
    for _ in range(10):
        endless(world, num_adapters, rng, rate, strangers, composed)
        world.engine.step()
        world.clock.now += 1.0
    # The one that nobody else asks for, behind everything that has gathered, alone or with the most popular ones.
    rare = version("rare")
    if composed and num_slots > 1:
        rare = blend(("rare", 1.0), *((f"v{i}", 1.0) for i in range(num_slots - 1)))
    victim = world.submit([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS), rare)
    older = [client.request for client in world.clients if client.request.phase is not Phase.FINISHED]
    # Each of them is the oldest at some time. Then it needs at most: the end of what runs of its own adapter, and
    # `max_wait_s` to be first; twice the bound to clear the slots, one request's length for those that still run, and a
    # load (after the loads that were asked for before it), all of it again if it lost its slot; and its own length.
    length = PROMPT + MAX_TOKENS
    num_versions = (2 * num_adapters + NUM_STRANGERS if strangers else num_adapters) + composed * num_adapters
    # The members of another composition may be kept for a turn and a lease, and then comes a rest.
    load = composed * 5 * LEASE_ROUNDS + 2 * BOUND_S + length + (LOAD_STEPS + 1) * (num_versions + 2)
    turn = length + MAX_WAIT_S + 2 * load + length
    limit = int(len(older) * turn)
    taken = rounds_until_all_end(world, older, num_adapters, rng, rate, limit, strangers, composed)
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
    world.adapters.put(*adapters)


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


def test_reserved_slot_is_given_back_though_requests_of_the_base_leave_no_place_free():
    world = World(num_slots=1, num_blocks=10, max_running=2, starvation_bound_s=BOUND_S)
    first = world.submit([1], LONG, version("a"))
    memory = world.submit(prompt_of(1, 24), LONG)
    for _ in range(3):
        world.engine.step()
    starving = world.submit([1], LONG, version("b"))
    large = world.submit(prompt_of(2, 35), LONG, version("a"))
    world.engine.abort(first.request.request_id)
    world.engine.step()
    assert large.request.slot == 0, "it has its adapter and waits for blocks"
    world.engine.abort(memory.request.request_id)
    for _ in range(60):
        for _ in range(2):  # more than can be served
            world.submit([1], SamplingParams(temperature=0.0, max_tokens=3))
        world.engine.step()
        world.clock.now += 1.0
        if starving.request.phase is Phase.RUNNING:
            break
    assert starving.request.phase is Phase.RUNNING


def test_untried_lane_is_asked_for_though_newcomers_use_up_the_tries():
    """Another version of its adapter is served all the time, so that nothing else would put it in front."""
    world = World(num_slots=2, max_running=4, load_steps=0, starvation_bound_s=1e9, max_wait_s=1e9)
    served, rare = version("a", "1"), version("a", "2")
    resident(world, served)
    world.adapters._load_steps = NEVER
    params = SamplingParams(temperature=0.0, max_tokens=4)
    world.submit([1], params, served)
    world.engine.step()
    asked: list[object] = []
    try_activate = world.adapters.try_activate
    world.adapters.try_activate = lambda adapter: asked.append(adapter) or try_activate(adapter)
    world.submit([1], params, served)
    victim = world.submit([1], params, rare)
    for i in range(40):
        newcomers = [world.submit([1], params, version(f"new{i}-{j}")) for j in range(6)]
        world.submit([1], params, served)
        world.engine.step()
        for newcomer in newcomers:
            world.engine.abort(newcomer.request.request_id)
    assert victim.request.adapter.versions[0] in asked
