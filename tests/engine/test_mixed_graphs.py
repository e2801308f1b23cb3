"""Captured steps with tokens of prompts beside decodes answer, and write to the cache, as eager ones do."""

import random

import pytest
import torch
from lorikeet.server.engine.graph_sizes import GraphSizes
from lorikeet.server.engine.scheduler import ScheduledRequest, ScheduledStep

from ..base.family_models import VOCAB
from ..devices import Place, places
from .adapted_runner import Stream
from .graph_world import BLOCK, MAX_BLOCKS, MAX_ROWS, MAX_TOKENS, GraphWorld


@pytest.fixture(params=places(["llama", "gemma2"], "graphs"))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GraphWorld:
    place: Place = request.param
    made = GraphWorld(place.family, tmp_path_factory.mktemp(place.family), place.device)
    made.graphed.capture_graphs()  # before any adapter is there
    return made


@pytest.fixture(params=places(["llama"], "graphs"))
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GraphWorld:
    place: Place = request.param
    made = GraphWorld(place.family, tmp_path_factory.mktemp(place.family), place.device)
    made.graphed.capture_graphs()
    return made


def chunks(rng: random.Random, streams: list[Stream], most: int = MAX_TOKENS) -> tuple[list[Stream], list[int]]:
    """Of each a token of its own, or as many of its prompt as there is room for or fewer: (streams, tokens)."""
    chosen, counts = [], []
    room = most
    for number, stream in enumerate(streams):
        missing = max(1, len(stream.tokens) - stream.done)
        count = min(missing, room - (len(streams) - number - 1), rng.choice([1, 9, missing, missing]))
        if count > 0 and stream.done + count <= BLOCK * MAX_BLOCKS:
            chosen.append(stream)
            counts.append(count)
            room -= count
    return chosen, counts


def test_random_prompts_beside_random_decodes(world: GraphWorld) -> None:
    """Prompts whole, in chunks, behind cached prefixes and again after preemptions; adapters change between steps."""
    rng = random.Random(11)
    slots = [world.install(rng.choice([1, 3, 8, 16])) for _ in range(5)]
    slots.append(world.install(5, "qkv_proj", "down_proj"))
    streams: dict[int, Stream] = {}
    shared: set[int] = set()  # places with a block that another stream reads, and theirs: written once
    replays = mixed = hits = 0
    for number in range(25):
        for place in rng.sample(range(MAX_ROWS), 4):
            if place in streams or place in shared:
                continue
            stream = world.stream(place, rng.choice([-1, *slots]), rng.choice([1, 2, 13, 30, 40]))
            for other, known in streams.items():
                if len(shared) < 6 and known.slot == stream.slot and min(known.done, len(stream.tokens)) > BLOCK:
                    # The first block is in the cache.
                    stream.tokens[:BLOCK] = known.tokens[:BLOCK]
                    stream.block_table[0] = known.block_table[0]
                    stream.done = BLOCK
                    shared |= {place, other}
                    hits += 1
                    break
            streams[place] = stream
        order = list(streams.values())
        rng.shuffle(order)
        chosen, counts = chunks(rng, order)
        replays += world.check(chosen, *counts)
        mixed += max(counts) > 1
        for place, stream in list(streams.items()):
            if stream.done >= BLOCK * MAX_BLOCKS - 2 or rng.random() < 0.1:
                del streams[place]
            elif place not in shared and rng.random() < 0.1:
                stream.block_table, stream.done = rng.sample(stream.block_table, MAX_BLOCKS), 0  # preempted
        if number == 12:  # a slot gets another adapter, of another size, and everything moves
            victim = slots.pop(0)
            streams = {place: stream for place, stream in streams.items() if stream.slot != victim}
            world.store.remove(victim)
            slots.append(world.install(12))
            world.store.compact()
    assert replays == 25 and mixed >= 15 and hits
    assert world.graphs.stats.num_graphs == world.num_at_start


def test_rows_of_the_base_are_those_of_the_eager_step(llama: GraphWorld) -> None:
    """Bit for bit on a CPU, where the same kernels compute every row by itself."""
    streams = [llama.stream(0, -1, 30), llama.stream(1, -1, 1), llama.stream(2, -1, 9)]
    want, got = llama.step(streams, 30, 1, 8)
    assert len(want) == 2 and llama.graphs.stats.num_replays == 1
    if llama.base.device.type == "cpu":
        assert torch.equal(want, got)
    torch.testing.assert_close(got, want, atol=llama.tolerance, rtol=llama.tolerance)


def test_captured_without_adapters_replayed_with_one_for_each_request(llama: GraphWorld) -> None:
    slots = [llama.install(1 + 2 * n) for n in range(8)]
    prompts = [llama.stream(place, slot, 3 + place) for place, slot in enumerate(slots)]
    assert llama.check(prompts, *(len(stream.tokens) for stream in prompts))
    assert llama.check([*prompts[:5], llama.stream(9, slots[5], 33)], 1, 1, 1, 1, 1, 32)
    # The rows of a prompt and of decodes of the same adapter are one run.
    assert llama.check([llama.stream(8, slots[0], 20), llama.stream(10, slots[0], 1), prompts[0]], 20, 1, 1)


def test_step_in_which_nobody_samples(llama: GraphWorld) -> None:
    streams = [llama.stream(0, llama.install(4), 30), llama.stream(1, -1, 20)]
    want, got = llama.step(streams, 9, 1)
    assert want.shape == got.shape == (0, VOCAB) and llama.graphs.stats.num_replays == 1
    assert llama.check(streams, 1, 1)  # one row each, and still no one samples
    assert llama.check(streams, 20, 18)
    assert llama.check(streams) and llama.graphs.stats.num_replays == 4


def test_capture_writes_to_nobodys_cache(llama: GraphWorld) -> None:
    stream = llama.stream(0, -1, 40)
    llama.check([stream], 40)
    before = [tensor.clone() for tensor in (*llama.graphed._cache.keys, *llama.graphed._cache.values)]
    llama.graphed.capture_graphs()
    for want, got in zip(before, (*llama.graphed._cache.keys, *llama.graphed._cache.values), strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("what", ["rank", "affine", "weighted", "head", "head and weighted"])
def test_other_shapes_get_a_graph_once_they_came_often(what: str, llama: GraphWorld) -> None:
    slots = {
        "rank": lambda: llama.install(40),
        "affine": lambda: llama.install(3, affine=True),
        "weighted": lambda: llama.compose((llama.install(3), -0.5)),
        "head": lambda: llama.install(2, "lm_head", "o_proj"),
        "head and weighted": lambda: llama.compose((llama.install(2, "lm_head"), 2.0)),
    }
    adapted, plain = slots[what](), llama.install(6)
    prompts = [llama.stream(0, adapted, 33), llama.stream(1, -1, 9), llama.stream(2, plain, 12)]
    for prompt in prompts[1:]:
        llama.check([prompt], len(prompt.tokens))
    llama.now += 2
    # Of the rows that the head computes only some are the prompt's, and in the last step none is in its middle.
    found = [llama.check(prompts, count, 1, 1) for count in (3, 4, 5, 6, 7, 8)]
    assert found == [False] * 3 + [True] * 3 and len(prompts[0].tokens) == prompts[0].done
    assert llama.graphs.stats.num_graphs == llama.num_at_start + 1
    other = llama.stream(3, plain, 20)
    assert llama.check([other, prompts[0]], 19, 1)
    assert llama.check([llama.stream(4, -1, 11), llama.stream(5, adapted, 14), *prompts], 11, 14, 1, 1, 1)


def test_steps_that_are_not_captured(llama: GraphWorld) -> None:
    plain, other = llama.install(3), llama.install(4)
    own = llama.install(2, change=lambda a: a.weight(llama.base.module_table.head, weight=a.randn(VOCAB, 128, std=0.1)))
    for slot in (llama.compose((plain, 0.5), (other, 0.5)), own, llama.install(300, "o_proj")):
        assert not llama.check([llama.stream(0, slot, 7), llama.stream(1, -1, 1)], 7, 1)
    assert llama.check([llama.stream(0, plain, 7), llama.stream(1, -1, 1)], 7, 1)
    prompts = [llama.stream(place, plain, 6) for place in range(9)]
    scored = ScheduledStep([ScheduledRequest(prompts[0], 0, 6, False, num_scored=2)])  # type: ignore[arg-type]
    assert llama.graphs.run(scored) is None
    llama.graphs._sizes = GraphSizes(64, 8)
    assert not llama.check(prompts, 6)  # too many requests
    long = [llama.stream(10, plain, 40), llama.stream(11, -1, 25)]
    assert not llama.check(long, 40, 25)  # too many tokens
    assert llama.graphs.stats.num_graphs == llama.num_at_start


def test_failure_to_capture_prompts_leaves_the_decodes(tmp_path) -> None:
    world = GraphWorld("llama", tmp_path)
    capture = world.backend.capture
    mixed = 2 * sum(not size.is_decode for size in GraphSizes(MAX_TOKENS, MAX_ROWS).all())
    decodes = world.num_at_start - mixed

    def fail(run):
        if world.graphs.stats.num_graphs == decodes:
            raise torch.OutOfMemoryError("no memory")
        return capture(run)

    world.backend.capture = fail
    world.graphed.capture_graphs()
    assert world.graphs.stats.num_graphs == decodes and world.graphs.stats.failure == "out of device memory"
    streams = [world.stream(0, -1, 20), world.stream(1, world.install(3), 1)]
    assert not world.check(streams, 20, 1) and world.check(streams)
