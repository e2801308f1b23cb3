"""The four properties of the engine, whatever happens in whatever order.

1. No KV block and no slot is leaked or owned twice.
2. Every accepted request ends exactly once, and its version is released exactly once.
3. Greedy tokens do not depend on what else is in the batch, on chunking, on preemption or on a prefix hit.
4. No request of one adapter reads another's KV (the fake runner's output would show it, see `fake_world.py`).
"""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.server.engine.limits import AdapterLimits
from lorikeet.server.engine.request import Finished, FinishReason
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.errors import AdapterQueueFullError, QueueFullError

from .fake_adapters import blend, version
from .fake_world import VOCAB, Clock, World, expected_tokens, prompt_of

SINGLE = [None, version("a"), version("a", "newer"), version("b"), version("c")]
NUM_SINGLE = len(SINGLE)
# Of overlapping members, of two versions of one adapter, with a strength alone, with opposite weights.
COMPOSED = [
    blend(("a", 0.5)),
    blend(("a", 0.5), ("b", 0.5)),
    blend(("b", 1.0), ("a", -0.5)),
    blend(("b", 1.0), ("c", 1.0)),
    Adaptation.of([(version("a").versions[0], 1.0), (version("a", "newer").versions[0], 0.0)]),
    blend(("a", 1.0), ("b", 2.0), ("c", 3.0)),
]
VERSIONS = [*SINGLE, *COMPOSED]
# Prompts share prefixes of every length, and begin alike for all adapters.
PROMPTS = [
    prompt_of(1, 13),
    prompt_of(1, 9),
    [*prompt_of(1, 8), 3, 3, 3],
    [*prompt_of(1, 4), 5, 5, 5, 5, 6],
    prompt_of(2, 1),
    prompt_of(2, 22),
]
LIMITS = st.builds(
    AdapterLimits,
    weight=st.sampled_from([0.001, 1.0, 1.0, 50.0]),
    max_running=st.sampled_from([None, None, 1, 2]),
    max_waiting=st.sampled_from([None, None, 2]),
)


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world: World
        self.dropped: set[object] = set()
        self.num_accepted_pins = 0

    @initialize(
        num_blocks=st.integers(7, 20),
        num_slots=st.integers(1, 3),
        max_running=st.integers(1, 6),
        spare_budget=st.integers(0, 10),
        prefix_cache=st.sampled_from([True, True, False]),
        watermark=st.sampled_from([0.0, 0.2]),
        limits=st.dictionaries(st.sampled_from(["", "a", "b", "c"]), LIMITS),
        seed=st.integers(0, 1000),
    )
    def build(self, num_blocks, num_slots, max_running, spare_budget, prefix_cache, watermark, limits, seed):
        self.world = World(
            num_blocks=num_blocks,
            num_slots=num_slots,
            max_running=max_running,
            token_budget=max_running + spare_budget,
            prefix_cache=prefix_cache,
            watermark=watermark,
            max_context=34,
            max_waiting=8,
            load_steps=seed % 3,
            seed=seed,
            starvation_bound_s=3.0,
            max_wait_s=5.0,
            limits=limits,
        )

    @rule(
        which=st.integers(0, len(VERSIONS) - 1),
        prompt=st.sampled_from(PROMPTS),
        max_tokens=st.integers(1, 14),
        timeout=st.sampled_from([None, None, None, 2.0, 8.0]),
    )
    def submit(self, which, prompt, max_tokens, timeout):
        world, adapter = self.world, VERSIONS[which]
        versions = adapter.versions if adapter is not None else ()
        if self.dropped.intersection(versions) or len(versions) > len(world.adapters.slots):
            return  # the service refuses it
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        client = world.client(list(prompt), params, adapter, None if timeout is None else world.clock() + timeout)
        try:
            world.engine.submit(client.request)
        except (QueueFullError, AdapterQueueFullError):
            world.clients.remove(client)
            world.adapters.unpin(adapter)
            assert not client.events
        else:
            self.num_accepted_pins += len(adapter.versions) if adapter is not None else 0

    @rule(rounds=st.integers(1, 6))
    def run(self, rounds):
        for _ in range(rounds):
            self.world.engine.step()
            self.world.clock.now += 0.5

    @rule(adapter_id=st.sampled_from(["", "a", "b"]), limits=LIMITS)
    def change_limits(self, adapter_id, limits):
        self.world.limits[adapter_id] = limits
        self.world.engine.limits_changed()

    @rule(index=st.integers(0, 40))
    def abort(self, index):
        if self.world.clients:
            self.world.engine.abort(self.world.clients[index % len(self.world.clients)].request.request_id)

    @rule(index=st.integers(0, 40))
    def break_client(self, index):
        """From now on its `emit` raises, after taking the event: the engine has to end it all the same."""
        if self.world.clients:
            client = self.world.clients[index % len(self.world.clients)]

            def emit(event, events=client.events):
                events.append(event)
                raise ConnectionError("gone")

            client.request.emit = emit

    @rule(tokens=st.integers(1, 12))
    def memory_is_short(self, tokens):
        self.world.runner.oom_above = tokens
        self.world.engine.step()
        self.world.runner.oom_above = None

    @precondition(lambda self: len(self.dropped) < 2)
    @rule(which=st.integers(1, NUM_SINGLE - 1))
    def drop_version(self, which):
        [dropped] = VERSIONS[which].versions
        self.dropped.add(dropped)
        self.world.adapters.failed.add(dropped)
        self.world.engine.on_version_dropped(dropped)

    @invariant()
    def nothing_is_leaked_or_owned_twice(self):
        if not hasattr(self, "world"):
            return
        world = self.world
        world.scheduler.check_integrity()
        holding = [client.request for client in world.clients if client.request.slot != -1]
        assert sum(world.adapters.active.values()) == sum(len(request.adapter.versions) for request in holding)
        for request in holding:
            expansion = world.adapters.port.expand(request.slot)
            assert [(world.adapters.slots[slot], weight) for slot, weight in expansion] == list(request.adapter.members)
            assert (request.slot < len(world.adapters.slots)) == request.adapter.is_plain
        # No two adaptations have one batch slot, and no more numbers are in use than needed.
        batch_slots = {request.slot: request.adapter for request in holding}
        assert all(batch_slots[request.slot] == request.adapter for request in holding)
        assert max(batch_slots, default=0) <= len(world.adapters.slots) + world.scheduler._max_running
        for client in world.clients:
            assert client.end is None or client.request.block_table == []

    def teardown(self):
        if not hasattr(self, "world"):
            return
        self.world.run()
        self.world.engine.step()
        self.world.check_nothing_is_held()
        assert self.world.adapters.num_releases == self.num_accepted_pins
        for client in self.world.clients:
            request = client.request
            assert client.tokens == expected_tokens(request.adapter, request.prompt_token_ids, len(client.tokens))
            if isinstance(client.end, Finished):
                assert client.end.reason is FinishReason.LENGTH
                assert len(client.tokens) == client.end.output_tokens
                room = min(34, self.world.scheduler.max_tokens) - len(request.prompt_token_ids)
                assert len(client.tokens) == min(request.params.max_tokens, room)


EngineMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
TestEngine = EngineMachine.TestCase


REQUESTS = st.lists(
    st.tuples(st.integers(0, len(VERSIONS) - 1), st.sampled_from(PROMPTS), st.integers(1, 12)), min_size=1, max_size=10
)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    requests=REQUESTS,
    num_blocks=st.integers(9, 40),
    budget=st.integers(4, 40),
    prefix_cache=st.booleans(),
    seed=st.integers(0, 100),
)
def test_seeded_tokens_do_not_depend_on_company(requests, num_blocks, budget, prefix_cache, seed):
    def params(i: int, max_tokens: int) -> SamplingParams:
        varied = [
            {},
            {"top_k": 5, "temperature": 2.0},
            {"top_p": 0.7},
            {"min_p": 0.1, "repetition_penalty": 1.3},
            {"presence_penalty": 0.5, "frequency_penalty": 0.3, "temperature": 0.0},
        ]
        return dataclasses.replace(SamplingParams(seed=i, max_tokens=max_tokens), **varied[i % 5])

    together = World(
        num_blocks=num_blocks, max_running=4, token_budget=budget, prefix_cache=prefix_cache, num_slots=3, seed=seed
    )
    clients = [
        together.submit(prompt, params(i, max_tokens), VERSIONS[which])
        for i, (which, prompt, max_tokens) in enumerate(requests)
    ]
    together.run()
    together.check_nothing_is_held()
    for i, (which, prompt, max_tokens) in enumerate(requests):
        alone = World()
        client = alone.submit(prompt, params(i, max_tokens), VERSIONS[which])
        alone.run()
        assert client.tokens == clients[i].tokens


def test_the_runs_above_do_preempt_and_do_hit_prefixes():
    """The properties would hold for an engine that never shares or preempts, too."""
    world = World(num_blocks=12, max_running=6, token_budget=12, clock=Clock())
    clients = [
        world.submit(PROMPTS[i % 3], SamplingParams(temperature=0.0, max_tokens=12), VERSIONS[i % 2]) for i in range(8)
    ]
    world.run()
    assert world.observer.of("preempted")
    assert world.blocks.stats().hit_tokens > 0
    assert len({tuple(client.tokens) for client in clients}) == 6
    for client in clients:
        assert client.tokens == expected_tokens(client.request.adapter, client.request.prompt_token_ids, 12)
        assert all(0 <= token < VOCAB for token in client.tokens)
