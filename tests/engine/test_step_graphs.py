"""Captured steps, padded and replayed with other adapters than at capture, answer as eager ones do: mostly decodes."""

import random

import pytest
import torch
from lorikeet.adapters.lora_shape import NO_LORA, LoraShape
from lorikeet.server.engine import step_graphs
from lorikeet.server.engine.step_graphs import start_shapes
from torch import Tensor

from ..base.family_models import VOCAB
from ..devices import Place, places
from .adapted_runner import Stream
from .graph_world import MAX_ROWS, MAX_SLOTS, GraphWorld, Rerun


@pytest.fixture(params=places(["llama", "gemma2"], "graphs"))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GraphWorld:
    place: Place = request.param
    return GraphWorld(place.family, tmp_path_factory.mktemp(place.family), place.device)


@pytest.fixture(params=places(["llama"], "graphs"))
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GraphWorld:
    place: Place = request.param
    return GraphWorld(place.family, tmp_path_factory.mktemp(place.family), place.device)


def capture(world: GraphWorld) -> None:
    world.graphed.capture_graphs()
    assert world.graphs.stats.num_graphs == world.num_at_start
    assert not world.graphs.stats.failure


def test_random_mixes_with_compaction_and_replacement_between_steps(world: GraphWorld) -> None:
    capture(world)  # before any adapter is there
    rng = random.Random(7)
    slots = [world.install(rng.choice([1, 3, 8, 16])) for _ in range(6)]
    slots.append(world.install(5, "qkv_proj", "down_proj"))
    streams: list[Stream] = []
    replays = 0
    for number in range(10):
        if number % 3 == 0:
            free = [p for p in range(MAX_ROWS) if p not in {stream.block_table[0] // 6 for stream in streams}]
            for place in rng.sample(free, rng.randint(0, len(free))):
                streams.append(world.stream(place, rng.choice([-1, *slots]), rng.randint(1, 20)))
                world.check(streams[-1:], len(streams[-1].tokens))
        streams = rng.sample(streams, rng.randint(1, len(streams))) if streams else [world.stream(0, -1, 1)]
        replays += world.check(streams)
        if number == 3:  # everything moves
            unused = next(slot for slot in slots if slot not in {stream.slot for stream in streams})
            world.store.remove(unused)
            slots.remove(unused)
            assert world.store.compact()
        if number == 6:  # a slot gets another adapter, of another size
            victim = slots.pop(0)
            streams = [stream for stream in streams if stream.slot != victim]
            world.store.remove(victim)
            slots.append(world.install(12))
    assert replays >= 9
    # All plain adapters of ranks up to 16 run on what was captured before there was one.
    assert world.graphs.stats.num_graphs == world.num_at_start


def test_captured_with_one_adapter_replayed_with_as_many_as_rows(llama: GraphWorld) -> None:
    slots = [llama.install(4)]
    one = [llama.stream(place, slots[0], 3) for place in range(8)]
    capture(llama)
    llama.check(one, 3)
    assert llama.check(one)
    slots += [llama.install(1 + 2 * n) for n in range(7)]
    many = [llama.stream(place, slot, 5) for place, slot in enumerate(slots)]
    llama.check(many, 5)
    assert llama.check(many) and llama.check(many[::2]) and llama.check(many[:1])
    assert llama.graphs.stats.num_graphs == llama.num_at_start


def test_rows_that_share_an_adapter_have_graphs_of_their_own(llama: GraphWorld) -> None:
    capture(llama)
    one, other = llama.install(9), llama.install(16)
    streams = [llama.stream(place, one if place < 4 else -1, 1) for place in range(7)]
    half = llama.compose((one, 1.0))
    assert llama.check(streams) and llama.check([*streams, llama.stream(7, half, 1)])
    used = [key for key in llama.graphs._replays if key.shape.one_slot][-1]
    assert used.size == (8, 8) and list(llama.graphs._replays)[-1] == used
    assert llama.check([*streams[1:], llama.stream(8, other, 1)])
    assert not list(llama.graphs._replays)[-1].shape.one_slot
    assert llama.check(streams[:4])  # so few that it makes no difference
    assert not list(llama.graphs._replays)[-1].shape.one_slot
    del llama.graphs._replays[used]
    assert llama.check(streams)  # another one covers it


def test_rows_of_the_base_are_the_same_bit_for_bit_whatever_adapters_are_beside_them(llama: GraphWorld) -> None:
    capture(llama)
    slot = llama.install(16)
    base, other = llama.stream(0, -1, 1), llama.stream(1, slot, 1)
    _, both = llama.step([base, other])
    base.done = other.done = 0
    base.slot = other.slot = -1
    _, plain = llama.step([base, other])
    assert torch.equal(both[0], plain[0]) and not torch.equal(both[1], plain[1])


def test_steps_that_are_not_captured_run_eagerly_and_right(llama: GraphWorld) -> None:
    capture(llama)
    plain, other = llama.install(3), llama.install(4)
    head = llama.base.module_table.head
    own = llama.install(2, change=lambda a: a.weight(head, weight=a.randn(VOCAB, 128, std=0.1)))
    huge = llama.install(300, "o_proj")
    assert not llama.check([llama.stream(0, llama.compose((plain, 0.5), (other, 0.5)), 1)])
    assert not llama.check([llama.stream(0, own, 1), llama.stream(1, -1, 1)])
    assert not llama.check([llama.stream(0, huge, 1)])
    assert llama.check([llama.stream(0, plain, 1), llama.stream(1, -1, 1)])
    assert llama.graphs.stats.num_graphs == llama.num_at_start


@pytest.mark.parametrize("what", ["rank", "affine", "weighted", "head"])
def test_other_shapes_get_a_graph_once_they_came_often_and_no_more_than_one_a_second(
    what: str, llama: GraphWorld
) -> None:
    capture(llama)
    slots = {
        "rank": lambda: llama.install(40),
        "affine": lambda: llama.install(3, affine=True),
        "weighted": lambda: llama.compose((llama.install(3), -0.5)),
        "head": lambda: llama.install(2, "lm_head", "o_proj"),
    }
    slot = slots[what]()
    streams = [llama.stream(0, slot, 1), llama.stream(1, -1, 1)]
    assert [llama.check(streams) for _ in range(4)] == [False] * 4  # the start's captures were less than a second ago
    llama.now += 2
    cache = [tensor.clone() for tensor in llama.graphed._cache.keys]
    assert llama.check(streams)
    assert llama.graphs.stats.num_graphs == llama.num_at_start + 1
    for before, after in zip(cache, llama.graphed._cache.keys, strict=True):  # the step's own two tokens, no more
        assert int((before != after).any(dim=-1).any(dim=0).sum()) == 2
    plain = llama.install(7)
    mixed = [*streams, llama.stream(2, plain, 1), llama.stream(3, llama.compose((plain, 1.0)), 1)]
    assert [llama.check(mixed) for _ in range(4)] == [False] * 4
    llama.now += 1
    assert llama.check(mixed) and llama.check(mixed)  # 4 rows have a graph of their own


def test_shape_that_a_larger_one_covers_runs_on_it_until_it_came_many_times(
    llama: GraphWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_graphs, "_SIGHTINGS_COVERED", 10)
    capture(llama)
    llama.now += 10
    slot = llama.install(2, "o_proj")
    stream = llama.stream(0, slot, 1)
    for _ in range(9):
        stream.done = 0
        assert llama.check([stream]) and llama.graphs.stats.num_graphs == llama.num_at_start
    stream.done = 0
    assert llama.check([stream]) and llama.graphs.stats.num_graphs == llama.num_at_start + 1
    stream.done = 0
    assert llama.check([stream])
    assert [key.shape.kinds for key in llama.graphs._replays][-1] == {"o_proj"}


def test_least_recently_used_graph_makes_place(llama: GraphWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    capture(llama)
    monkeypatch.setattr(step_graphs, "MAX_GRAPHS", llama.num_at_start)
    monkeypatch.setattr(step_graphs, "_SIGHTINGS_COVERED", 5)
    first = next(iter(llama.graphs._replays))
    stream = llama.stream(0, llama.install(50), 1)
    for _ in range(4):
        llama.now += 1
        llama.check([stream])
    assert llama.graphs.stats.num_graphs == llama.num_at_start and first not in llama.graphs._replays
    # What was captured for it is captured again when it comes.
    rows = [llama.stream(place, -1, 1) for place in range(first.size.requests)]
    for _ in range(5):
        llama.now += 1
        for row in rows:
            row.done = 0
        llama.check(rows)
    assert first in llama.graphs._replays and llama.graphs.stats.num_graphs == llama.num_at_start


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("capture invalidated")])
def test_failed_capture_is_said_and_steps_run_without(error: Exception, tmp_path) -> None:
    world = GraphWorld("llama", tmp_path)
    assert isinstance(world.backend, Rerun)
    world.backend.error = error
    world.graphed.capture_graphs()
    assert world.graphs.stats.num_graphs == 0
    assert world.graphed.graph_stats.failure == (
        "out of device memory" if isinstance(error, torch.OutOfMemoryError) else "capture failed"
    )
    slot = world.install(3)
    streams = [world.stream(0, slot, 4), world.stream(1, -1, 4)]
    world.check(streams, 4)
    world.backend.error = None
    for _ in range(5):
        world.now += 10
        assert not world.check(streams)
    assert world.backend.captures == 0  # nothing is tried again while requests run


def test_failure_while_serving_keeps_the_graphs_that_there_are(tmp_path) -> None:
    world = GraphWorld("llama", tmp_path)
    capture(world)
    assert isinstance(world.backend, Rerun)
    world.backend.error = torch.OutOfMemoryError("no memory")
    big, plain = world.stream(0, world.install(60), 1), world.stream(1, world.install(6), 1)
    for _ in range(5):
        world.now += 10
        assert not world.check([big])
    assert world.graphs.stats.failure and world.graphs.stats.num_graphs == world.num_at_start
    assert world.check([plain])


def test_everything_that_a_graph_reads_stays_where_it_is(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses and sizes that the model sees when a graph is captured are those of every step that it replays."""
    world = GraphWorld("llama", tmp_path)
    seen: dict[tuple[int, int], set[tuple[object, ...]]] = {}
    logits = world.base.logits

    def spy(ids: Tensor, positions: Tensor, **kwargs) -> Tensor:
        paged = kwargs["paged"]
        if paged.cache is world.graphed._cache and "overrides" not in kwargs:
            tensors = [ids, positions, paged.kv_slots, paged.query_starts, paged.context_lens, paged.block_tables]
            tensors += [] if kwargs["rows"] is None else [kwargs["rows"]]
            sizes = [paged.max_query_len, paged.max_context_len]
            for each in world.lora.passes:
                assert (each.flat is each.sampled) == (paged.max_query_len == 1)
                tensors += [each.flat.starts, each.flat.slots, each.sampled.starts, each.sampled.slots]
                sizes += [*each.max_ranks, each.affines, each.has_one_slot, each.flat.weights, each.sampled.weights]
            view = tuple((t.data_ptr(), tuple(t.shape), t.stride()) for t in tensors)
            seen.setdefault((ids.shape[1], len(paged.context_lens)), set()).add((view, tuple(sizes)))
        return logits(ids, positions, **kwargs)

    monkeypatch.setattr(type(world.base), "logits", lambda self, *args, **kwargs: spy(*args, **kwargs))
    capture(world)
    at_capture = {size: set(views) for size, views in seen.items()}
    shapes = {size: start_shapes(world.graphs._lora.full_shape, size) for size in world.graphs._sizes.all()}
    assert {size: len(views) for size, views in at_capture.items()} == {size: len(of) for size, of in shapes.items()}
    slots = [world.install(rank) for rank in (1, 2, 16, 9)]
    for number in (1, 2, 3, 6, 7, 9, MAX_ROWS):
        streams = [world.stream(place, slots[place % 4] if place % 5 else -1, 1) for place in range(number)]
        assert world.check(streams)
        if number == 6:
            world.store.remove(slots[0])
            slots[0] = world.install(11)
            world.store.compact()
        # Whole prompts of a few of them, the beginnings of others, and the rest decode.
        prompts = [world.stream(place, stream.slot, 1 + place) for place, stream in enumerate(streams[:8])]
        counts = [place // 2 + 1 for place in range(len(prompts))] + [1] * (number - len(prompts))
        assert world.check([*prompts, *streams[8:]], *counts)
    assert seen == at_capture


def test_shapes_cover_what_they_can_compute() -> None:
    kinds = frozenset(("a", "b"))
    full = LoraShape(16, kinds, True, True)
    parts = (NO_LORA, LoraShape(3, kinds), LoraShape(16, frozenset("a"), True), LoraShape(1, kinds, weighted=True))
    for part in (*parts, LoraShape(16, kinds, True, True, one_slot=True)):
        assert full.covers(part) and not part.covers(full) and full.cost > part.cost
    assert LoraShape(17, kinds).rounded_up() == LoraShape(64, kinds)
    assert LoraShape(0, kinds, affine=True).rounded_up() == LoraShape(0, kinds, affine=True)
    assert LoraShape(257, kinds).rounded_up() is None


def test_slots_say_what_they_need(tmp_path) -> None:
    world = GraphWorld("llama", tmp_path)
    slot = world.install(3, "o_proj", affine=True)
    assert world.store.shapes == {slot: LoraShape(3, frozenset(["o_proj"]), affine=True)}
    world.store.remove(slot)
    assert not world.store.shapes
    for _ in range(MAX_SLOTS):
        world.install(1, "down_proj")
    assert set(world.store.shapes.values()) == {LoraShape(1, frozenset(["down_proj"]))}
