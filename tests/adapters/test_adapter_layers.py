"""LoraBatch and LoraLinear: right rows, right slices, right order; nothing launched where nothing is adapted."""

import copy
from contextlib import contextmanager

import pytest
import torch
from lorikeet.adapters import layers
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.layers import LoraLinear
from lorikeet.adapters.lora_batch import LoraBatch
from lorikeet.adapters.sites import Site, SiteTable, Slice
from torch import nn

from .hand_made import HandMade

K, WIDTHS, VOCAB = 8, (6, 2, 4), 13
QKV = Site(0, "l.0.qkv", 0, K, tuple(Slice(f"l.0.{n}", w) for n, w in zip("qkv", WIDTHS, strict=True)))
OUT = Site(1, "l.0.o", 0, 6, (Slice("l.0.o", K),))
HEAD = Site(2, "head", -1, K, (Slice("head", VOCAB),), is_head=True)
TABLE = SiteTable([QKV, OUT, HEAD])
# fp32, sums of at most 8 products
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


COMPOSITIONS = {
    8: ((0, 0.7),),
    9: ((0, 0.3), (2, 0.7)),
    10: ((2, 0.0), (1, -1.5)),
    11: ((0, 1.0), (1, 1.0), (2, 1.0)),
    12: ((0, -0.25), (3, 1.0)),  # an affine in the second pass
    13: ((6, 1.0), (2, 0.5)),  # 2 does not change what 6 has of its own
}


def make_adapters():
    """Of different slices and ranks, without and with affines and weights of their own; by slot."""
    own = torch.randn(2, K), torch.randn(2)
    return [
        HandMade(TABLE, 0).lora(2, "l.0.q").lora(3, "l.0.v").lora(1, "l.0.o"),
        HandMade(TABLE, 1).lora(4, "l.0.o", "head"),
        HandMade(TABLE, 2).lora(1, "l.0.q").lora(5, "l.0.k").lora(2, "l.0.v"),
        HandMade(TABLE, 3).affine("l.0.k", "head").lora(3, "l.0.k", "l.0.v", "head"),
        HandMade(TABLE, 4).affine("l.0.o"),
        HandMade(TABLE, 5).weight("l.0.k", weight=own[0], bias=own[1]).lora(2, "l.0.q"),
        HandMade(TABLE, 6).weight("l.0.o", weight=torch.randn(K, 6)).affine("l.0.v"),
    ]


class World:
    """A store with the adapters, a batch, the LoRA linears, and for each mix of adapters the same in plain linears."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        self.store = DeviceStore(TABLE, dtype, torch.device("cpu"), 2**16, 8)
        self.adapters = make_adapters()
        assert [self.store.install(adapter.pack(dtype)) for adapter in self.adapters] == list(range(7))
        self.batch = LoraBatch(self.store, max_tokens=64, max_segments=8)
        bases = [nn.Linear(s.in_features, s.out_features, dtype=dtype).requires_grad_(False) for s in TABLE.sites]
        self.linears = [LoraLinear(base, site, self.batch) for base, site in zip(bases, TABLE.sites, strict=True)]

    def reference(self, site, members):
        """The site's linear, changed by ((slot, weight), ...) in fp32: a function of rows."""
        parts = {}
        base = self.linears[site.index].base
        column = 0
        for piece in site.slices:
            linear = nn.Linear(site.in_features, piece.out_features).requires_grad_(False)
            linear.weight.copy_(base.weight[column : column + piece.out_features])
            linear.bias.copy_(base.bias[column : column + piece.out_features])
            parts[piece.module] = linear
            column += piece.out_features
        unused = nn.Linear(1, 1)
        for slot, weight in members:
            adapter = copy.deepcopy(self.adapters[slot])
            for changes in (adapter.factors, adapter.affines, adapter.weights):
                for module in set(changes) - set(parts):
                    del changes[module]
            adapter.apply(lambda module: parts.get(module, unused), weight)
        return lambda x: torch.cat([linear(x.float()) for linear in parts.values()], dim=-1)

    def check(self, segments, sampled=None, expand=COMPOSITIONS.__getitem__, *, close=CLOSE, by_passes=False):
        """Run every site on random rows and compare each row with the reference of its members.

        `by_passes`: as on a device for which rows are not grouped by adapter.
        """
        self.batch.prepare(segments, sampled, expand)
        if by_passes:
            self.batch.flat_rows = None
        for site, linear in zip(TABLE.sites, self.linears, strict=True):
            rows = [slot for slot, n in (sampled if site.is_head and sampled else segments) for _ in range(n)]
            x = torch.randn(1, len(rows), site.in_features, dtype=linear.base.weight.dtype)
            y, plain = linear(x), linear.base(x)
            assert y.shape == plain.shape and y.dtype == plain.dtype
            for t, slot in enumerate(rows):
                if slot < 0:
                    assert torch.equal(y[0, t], plain[0, t])
                    continue
                members = ((slot, 1.0),) if slot < self.store.max_slots else expand(slot)
                want = self.reference(site, members)(x[0, t])
                torch.testing.assert_close(y[0, t].float(), want, msg=lambda m, s=slot: f"slot {s}: {m}", **close)


def inputs(world, num_rows):
    """The same for each site at every call."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num_rows, linear.site.in_features, generator=generator) for linear in world.linears]


@pytest.fixture
def world():
    with torch.inference_mode():
        yield World()


@pytest.fixture
def launches(monkeypatch):
    """Names of the LoRA operators that were launched."""
    calls = []
    for module, name in (
        (layers.lora, "lora_shrink"),
        (layers.lora, "lora_expand_"),
        (layers.lora, "lora_affine_"),
        (layers.LoraSite, "add_"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, _name=name, _call=original: (calls.append(_name), _call(*args))[1]
        )
    return calls


MIXES = {
    "each_adapter": [(0, 2), (1, 3), (2, 1), (3, 2), (4, 1), (5, 4), (6, 1)],
    "plain_ones": [(0, 2), (1, 3), (2, 1)],
    "with_base": [(-1, 4), (2, 2), (3, 1), (5, 1)],
    "base_between": [(1, 1), (-1, 2), (0, 2), (-1, 1), (6, 2)],
    "slot_in_two_segments": [(2, 1), (5, 1), (2, 3), (5, 2)],
    "one_token": [(5, 1)],
    "empty_segments": [(0, 0), (-1, 1), (2, 0), (3, 2)],
}


@pytest.mark.parametrize("segments", MIXES.values(), ids=MIXES)
def test_mixed_batch_equals_changed_linears_row_by_row(segments, world):
    world.check(segments)
    world.check(segments, by_passes=True)


@pytest.mark.parametrize(
    "sampled", [[(3, 1)], [(-1, 2), (1, 1), (3, 1)], [(-1, 1), (0, 2)]], ids=["one", "some", "not_adapted"]
)
def test_head_knows_only_the_rows_that_it_computes(sampled, world):
    world.check([(-1, 9), (0, 5), (1, 4), (3, 7)], sampled)


def test_bf16_is_within_its_rounding():
    """bf16: values of a few units, 8 bits of mantissa, rounded by the base, the affine and each expand."""
    with torch.inference_mode():
        World(torch.bfloat16).check(MIXES["each_adapter"], close={"rtol": 2e-2, "atol": 4e-2})


@pytest.mark.parametrize(
    "segments",
    [
        [(8, 2)],
        [(-1, 2), (9, 3)],
        [(-1, 1), (0, 2), (2, 1), (8, 1), (9, 2), (10, 3), (11, 1)],
        [(1, 20), (11, 17), (12, 2)],
        [(5, 1), (12, 3), (13, 2)],
    ],
    ids=["strength", "two", "all_with_plain_and_base", "long", "with_affines_and_weights"],
)
def test_composition_is_the_weighted_sum_of_its_members(segments, world):
    for by_passes in (False, True):
        world.check(segments, by_passes=by_passes)
        world.check(segments, [(slot, 1) for slot, _ in segments], by_passes=by_passes)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_composition_of_up_to_eight(count):
    with torch.inference_mode():
        world = World()
        world.store = DeviceStore(TABLE, torch.float32, torch.device("cpu"), 2**16, 9)
        world.adapters = [HandMade(TABLE, 20 + i).lora(i + 1, "l.0.q", "l.0.o", "head") for i in range(9)]
        for adapter in world.adapters:
            world.store.install(adapter.pack())
        world.batch = LoraBatch(world.store, max_tokens=64, max_segments=8)
        world.linears = [LoraLinear(linear.base, linear.site, world.batch) for linear in world.linears]
        members = {9: tuple((i, (-1) ** i * 0.4 * i) for i in range(count))}
        world.check([(-1, 1), (8, 2), (9, 4)], expand=members.__getitem__)


def test_plain_batch_is_one_pass_without_weights(world):
    world.batch.prepare([(-1, 1), (0, 2), (2, 1)], [(0, 1)], COMPOSITIONS.__getitem__)
    (only,) = world.batch.passes
    assert only.flat.weights is None and only.affines is None and not world.batch.own.by_module
    world.batch.prepare([(-1, 1), (11, 2)], None, COMPOSITIONS.__getitem__)
    assert [each.flat.weights for each in world.batch.passes] == [None, None, None]


def test_passes_cover_the_rows_that_have_so_many_members(world):
    expand = {8: ((0, 0.5), (1, 0.25)), 9: ((0, 0.5),)}.__getitem__
    world.batch.prepare([(-1, 3), (0, 2), (8, 4), (9, 1)], None, expand)
    first, second = world.batch.passes
    assert first.flat.starts.tolist() == [0, 3, 5, 10] and first.flat.slots.tolist() == [-1, 0, 0]
    assert first.flat.weights.tolist() == [1.0, 1.0, 0.5]
    assert second.flat.starts.tolist() == [0, 5, 9, 10] and second.flat.slots.tolist() == [-1, 1, -1]
    assert second.flat.weights.tolist() == [1.0, 0.25, 1.0]
    assert second.max_ranks == [0, 4, 4]


def test_base_batch_launches_nothing_and_is_the_base(world, launches):
    world.batch.prepare([(1, 2)])
    world.batch.prepare([(-1, 5)])
    x = torch.randn(5, K)
    assert not world.batch.passes
    assert torch.equal(world.linears[0](x), world.linears[0].base(x))
    assert launches == []


def test_site_that_no_adapter_of_the_batch_adapts_launches_nothing(world, launches):
    world.batch.prepare([(1, 3)])  # not on the stacked site
    world.linears[0](torch.randn(3, K))
    assert launches == []
    world.linears[1](torch.randn(3, 6))
    assert launches == ["add_"]
    launches.clear()
    world.batch.flat_rows = None
    world.linears[0](torch.randn(3, K))
    assert launches == []
    world.linears[1](torch.randn(3, 6))
    assert launches == ["lora_shrink", "lora_expand_"]


def test_affine_is_launched_where_one_is(world, launches):
    world.batch.prepare([(1, 2), (4, 1)])
    world.linears[0](torch.randn(3, K))
    assert launches == []
    world.linears[1](torch.randn(3, 6))
    assert launches == ["lora_affine_", "add_"]


def test_one_pass_is_two_launches_affine_included(world, launches):
    world.batch.prepare([(3, 2), (4, 1), (1, 2), (-1, 1)])
    expected = [linear(x) for linear, x in zip(world.linears, inputs(world, 6), strict=True)]
    world.batch.flat_rows = None
    launches.clear()
    for linear, x, want in zip(world.linears, inputs(world, 6), expected, strict=True):
        torch.testing.assert_close(linear(x), want, **CLOSE)
    assert launches == ["lora_shrink", "lora_expand_"] * 3
    world.batch.prepare([(4, 2)])  # an affine and no rank
    world.batch.flat_rows = None
    launches.clear()
    world.linears[1](torch.randn(2, 6))
    assert launches == ["lora_affine_"]


def test_shrink_runs_beside_the_base_where_a_graph_is_captured(world, launches, monkeypatch):
    class Side:
        @contextmanager
        def beside(self):
            launches.append("fork")
            yield
            launches.append("main")

        def join(self):
            launches.append("join")

    world.batch.prepare([(1, 2), (-1, 1)])
    world.batch.flat_rows = None
    x = inputs(world, 3)[1]
    expected = world.linears[1](x)
    launches.clear()
    world.batch.side_stream = Side()
    monkeypatch.setattr(layers.overlap, "lora_runs_beside", lambda num_rows: num_rows == 3)
    base = world.linears[1].base
    base.register_forward_hook(lambda *_: launches.append("base"))
    torch.testing.assert_close(world.linears[1](x), expected, atol=0, rtol=0)
    assert launches == ["fork", "lora_shrink", "main", "base", "join", "lora_expand_"]
    launches.clear()
    world.linears[0](inputs(world, 3)[0])  # which no adapter of the batch adapts
    assert launches == []


def test_batch_before_any_prepare_is_the_base(world, launches):
    world.linears[0](torch.randn(2, K))
    assert launches == []


def test_max_rank_is_of_this_batch_only(world):
    world.batch.prepare([(0, 1), (2, 1)])
    assert world.batch.passes[0].max_ranks == [8, 1, 0]
    world.batch.prepare([(0, 1)])
    assert world.batch.passes[0].max_ranks == [5, 1, 0]


def test_prepare_fills_preallocated_tensors(world):
    pointers = set()
    for segments in ([(0, 2), (1, 3)], [(-1, 3), (4, 5), (8, 2)]):
        world.batch.prepare(segments, None, COMPOSITIONS.__getitem__)
        flat = world.batch.passes[0].flat
        pointers.add((flat.starts.data_ptr(), flat.slots.data_ptr()))
    assert len(pointers) == 1
    assert flat.starts.tolist() == [0, 3, 8, 10] and flat.slots.tolist() == [-1, 4, 0]
    assert flat.starts.dtype is flat.slots.dtype is torch.int32 and flat.weights.dtype is torch.float32


def test_steps_of_the_same_rows_share_their_groups(world):
    segments = [(-1, 1), (0, 2), (8, 1), (9, 2)]
    world.check(segments)
    flat = world.batch.flat_rows
    world.check(segments)
    assert world.batch.flat_rows is flat
    world.check([(-1, 2), (0, 2), (8, 1), (9, 2)])
    assert world.batch.flat_rows is not flat
    members = {8: ((0, 0.6),), 9: COMPOSITIONS[9]}  # a number that stands for something else in the next step
    world.check([(-1, 2), (0, 2), (8, 1), (9, 2)], expand=members.__getitem__)


def test_neighbouring_segments_of_a_slot_become_one(world):
    world.batch.prepare([(-1, 1), (-1, 2), (2, 1), (0, 0), (2, 4)])
    flat = world.batch.passes[0].flat
    assert flat.starts.tolist() == [0, 3, 8] and flat.slots.tolist() == [-1, 2]


def test_full_batch_of_segments_fits(world):
    world.batch.prepare([(i % 3, 8) for i in range(8)])
    assert world.batch.passes[0].flat.slots.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_compaction_between_steps_is_seen_by_the_layers(world):
    world.check(MIXES["each_adapter"])
    world.store.remove(0)
    world.store.remove(2)
    assert world.store.compact() > 0
    world.check([(-1, 1), (1, 3), (3, 2), (5, 2), (6, 1)])
