"""LoraBatch and LoraLinear: right rows, right slices, nothing launched where nothing is adapted."""

import pytest
import torch
from lorikeet.adapters import layers
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.layers import LoraBatch, LoraLinear
from lorikeet.adapters.packing import PackedAdapter
from lorikeet.adapters.report import AdapterReport
from lorikeet.adapters.sites import Site, SiteTable, Slice
from torch import nn

K, WIDTHS = 8, (6, 2, 4)
QKV = Site(0, "l.0.qkv", 0, K, tuple(Slice(f"l.0.{n}", w) for n, w in zip("qkv", WIDTHS, strict=True)))
OUT = Site(1, "l.0.o", 0, 6, (Slice("l.0.o", K),))
TABLE = SiteTable([QKV, OUT])


def make_packed(ranks, seed):
    """An adapter of these ranks per site and slice ((q, k, v), (o,)), with its dense deltas."""
    generator = torch.Generator().manual_seed(seed)
    blocks, offsets, deltas, end = [], [], [], 0
    for site, site_ranks in zip(TABLE.sites, ranks, strict=True):
        factors = [
            (torch.randn(r, site.in_features, generator=generator), torch.randn(r, p.out_features, generator=generator))
            for r, p in zip(site_ranks, site.slices, strict=True)
        ]
        deltas.append(torch.cat([b.t() @ a for a, b in factors]))
        offsets.append(end if sum(site_ranks) else -1)
        blocks += [a.flatten() for a, _ in factors] + [b.flatten() for _, b in factors]
        end = sum(b.numel() for b in blocks)
    padded = torch.tensor([[*r, *[0] * (3 - len(r))] for r in ranks], dtype=torch.int32)
    packed = PackedAdapter(torch.cat(blocks), torch.tensor(offsets), padded, AdapterReport("LoRA", "", 1, 1, {}))
    return packed, deltas


@pytest.fixture
def world():
    """A store with three adapters, a batch, and the two LoRA linears."""
    torch.manual_seed(0)
    store = DeviceStore(TABLE, torch.float32, torch.device("cpu"), 2**16, 8)
    deltas = {}
    for seed, ranks in enumerate([((2, 0, 3), (1,)), ((0, 0, 0), (4,)), ((1, 5, 2), (0,))]):
        packed, delta = make_packed(ranks, seed)
        deltas[store.install(packed)] = delta
    batch = LoraBatch(store, max_tokens=64, max_segments=8)
    linears = [LoraLinear(nn.Linear(s.in_features, s.out_features), s, batch) for s in TABLE.sites]
    return store, batch, linears, deltas


@pytest.fixture
def launches(monkeypatch):
    """Names of the LoRA operators that were launched."""
    calls = []
    for name in ("lora_shrink", "lora_expand_"):
        original = getattr(layers.lora, name)
        monkeypatch.setattr(
            layers.lora, name, lambda *args, _name=name, _call=original: (calls.append(_name), _call(*args))[1]
        )
    return calls


MIXES = {
    "each_adapter": [(0, 2), (1, 3), (2, 1)],
    "with_base": [(-1, 4), (2, 2), (0, 1)],
    "base_between": [(1, 1), (-1, 2), (0, 2)],
    "slot_in_two_segments": [(2, 1), (0, 1), (2, 3)],
    "one_token": [(2, 1)],
    "empty_segments": [(0, 0), (-1, 1), (2, 0), (1, 2)],
}


@pytest.mark.parametrize("segments", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("site", [0, 1], ids=["stacked", "single"])
@torch.inference_mode()
def test_mixed_batch_equals_dense_deltas_row_by_row(segments, site, world):
    _, batch, linears, deltas = world
    rows = [slot for slot, n in segments for _ in range(n)]
    x = torch.randn(1, len(rows), TABLE.sites[site].in_features)
    batch.prepare(segments)
    y = linears[site](x)
    plain = linears[site].base(x)
    for t, slot in enumerate(rows):
        if slot < 0:
            assert torch.equal(y[0, t], plain[0, t])
        else:
            torch.testing.assert_close(y[0, t], plain[0, t] + x[0, t] @ deltas[slot][site].t(), rtol=1e-5, atol=1e-5)
    assert y.shape == plain.shape


def test_base_batch_launches_nothing_and_is_the_base(world, launches):
    _, batch, linears, _ = world
    batch.prepare([(1, 2)])
    batch.prepare([(-1, 5)])
    x = torch.randn(5, K)
    assert not batch.active
    assert torch.equal(linears[0](x), linears[0].base(x))
    assert launches == []


def test_site_that_no_adapter_of_the_batch_adapts_launches_nothing(world, launches):
    _, batch, linears, _ = world
    batch.prepare([(1, 3)])  # rank 0 on the stacked site
    linears[0](torch.randn(3, K))
    assert launches == []
    linears[1](torch.randn(3, 6))
    assert launches == ["lora_shrink", "lora_expand_"]


def test_batch_before_any_prepare_is_the_base(world, launches):
    _, _, linears, _ = world
    linears[0](torch.randn(2, K))
    assert launches == []


def test_max_rank_is_of_this_batch_only(world):
    _, batch, _, _ = world
    batch.prepare([(0, 1), (2, 1)])
    assert batch.max_ranks == [8, 1]
    batch.prepare([(0, 1)])
    assert batch.max_ranks == [5, 1]


def test_prepare_fills_preallocated_tensors(world):
    _, batch, _, _ = world
    pointers = set()
    for segments in ([(0, 2), (1, 3)], [(-1, 3), (4, 5), (0, 2)]):
        batch.prepare(segments)
        pointers.add((batch.seg_starts.data_ptr(), batch.seg_slots.data_ptr()))
    assert len(pointers) == 1
    assert batch.seg_starts.tolist() == [0, 3, 8, 10] and batch.seg_slots.tolist() == [-1, 4, 0]
    assert batch.seg_starts.dtype is batch.seg_slots.dtype is torch.int32


def test_neighbouring_segments_of_a_slot_become_one(world):
    _, batch, _, _ = world
    batch.prepare([(-1, 1), (-1, 2), (2, 1), (0, 0), (2, 4)])
    assert batch.seg_starts.tolist() == [0, 3, 8] and batch.seg_slots.tolist() == [-1, 2]


def test_full_batch_of_segments_fits(world):
    _, batch, _, _ = world
    batch.prepare([(i % 3, 8) for i in range(8)])
    assert batch.seg_slots.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_compaction_is_seen_by_the_layers(world):
    store, batch, linears, deltas = world
    store.remove(0)
    assert store.compact() > 0
    batch.prepare([(2, 3)])
    x = torch.randn(3, K)
    torch.testing.assert_close(linears[0](x), linears[0].base(x) + x @ deltas[2][0].t(), rtol=1e-5, atol=1e-5)
