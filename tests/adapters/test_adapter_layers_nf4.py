"""LoRA in the base's own matmul, as on CUDA with few rows: by the operator on a CPU, which does one after the other."""

import pytest
import torch
from lorikeet.adapters import layers
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.layers import LoraLinear
from lorikeet.adapters.lora_batch import LoraBatch
from lorikeet.adapters.sites import Site, SiteTable, Slice
from lorikeet.kernels.overlap import switches
from lorikeet.server.base.linears import NF4Linear

from ..kernels.nf4_cases import make_weight
from .hand_made import HandMade

K, WIDTHS = 64, (64, 32)
TABLE = SiteTable(
    [
        Site(0, "l.0.qk", 0, K, tuple(Slice(f"l.0.{name}", width) for name, width in zip("qk", WIDTHS, strict=True))),
        Site(1, "head", -1, K, (Slice("head", 40),), is_head=True),
    ]
)


@pytest.fixture
def linear() -> LoraLinear:
    """A site whose adapters 0 and 1 have low-rank deltas, 2 an affine, 3 a weight of its own."""
    torch.manual_seed(0)
    store = DeviceStore(TABLE, torch.float32, torch.device("cpu"), 2**16, 8)
    for adapter in (
        HandMade(TABLE, 0).lora(2, "l.0.q").lora(3, "l.0.k"),
        HandMade(TABLE, 1).lora(4, "l.0.q"),
        HandMade(TABLE, 2).lora(4, "l.0.q").affine("l.0.k"),
        HandMade(TABLE, 3).lora(4, "l.0.q").weight("l.0.k", weight=torch.randn(32, K)),
    ):
        assert store.install(adapter.pack(torch.float32)) is not None
    base = NF4Linear(make_weight(sum(WIDTHS), K), torch.randn(sum(WIDTHS)))
    return LoraLinear(base, TABLE.sites[0], LoraBatch(store, max_tokens=80, max_segments=8))


@pytest.mark.parametrize(
    ("segments", "fused"),
    [
        ([(-1, 1), (0, 1), (1, 2)], True),
        ([(1, 1)], True),
        ([(8, 1), (9, 1)], True),  # with weights
        ([(0, 5), (1, 1)], False),  # more rows than it is worth for
        ([(-1, 1), (0, 5)], True),  # but not where they share their adapter
        ([(8, 5)], True),
        ([(0, 65)], False),
        ([(-1, 1), (2, 1)], False),
        ([(3, 1)], False),
        ([(10, 1)], False),  # two passes
    ],
    ids=str,
)
def test_few_rows_of_low_rank_deltas_alone_run_in_the_matmul(linear, segments, fused, monkeypatch):
    calls: list[int] = []
    operator = layers.nf4_lora_linear
    monkeypatch.setattr(layers, "nf4_lora_linear", lambda x, *args: (calls.append(len(x)), operator(x, *args))[1])
    members = {8: ((0, 0.5),), 9: ((1, -2.0),), 10: ((0, 1.0), (1, 1.0))}
    linear.batch.prepare(segments, [], members.__getitem__)
    linear.batch.flat_rows = None  # as on a device for which rows are not grouped by adapter
    x = torch.randn(1, sum(rows for _, rows in segments), K)
    want = linear(x)
    assert not calls
    linear._nf4 = linear.base.nf4
    torch.testing.assert_close(linear(x), want, atol=1e-5, rtol=1e-5)
    assert calls == ([x.shape[1]] if fused else [])
    monkeypatch.setattr(switches, "lora_in_matmul", False)
    assert torch.equal(linear(x), want)
    assert len(calls) == fused
