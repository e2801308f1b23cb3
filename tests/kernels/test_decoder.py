"""The native call of all layers refuses what it would read or write beyond; what it computes: tests/base."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lorikeet.kernels.decoder import DecoderStack
from lorikeet.kernels.decoder_parts import CacheTables, StackAdapters, StackLayer, StackLinear, StackPaging
from lorikeet.kernels.lora_rows import AdaptedRows, Piece
from lorikeet.kernels.lora_site import LoraSite
from lorikeet.kernels.native.functions import library_name
from lorikeet.kernels.nf4_tiles import Layout, to_tiles
from lorikeet.kernels.nf4_weight import NF4Weight
from lorikeet.kernels.rope import rotation_table
from torch import Tensor

pytestmark = pytest.mark.skipif(library_name() is None, reason="no compiled kernels")

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
WIDTH, MLP, SLOTS, ROWS = 64, 192, 3, 5


def weight(out_features: int, in_features: int, layout: Layout = Layout.TILES) -> NF4Weight:
    count = out_features * in_features
    codes, absmax = torch.randint(256, (count // 2,), dtype=torch.uint8), torch.rand(count // 64)
    tiles = to_tiles(codes, absmax, out_features, in_features, layout)
    return NF4Weight(*tiles, out_features, in_features, layout)


def linear(out_features: int, in_features: int, site: int) -> StackLinear:
    ranks = torch.full((SLOTS, 1), 2, dtype=torch.int32)
    arena = torch.randn(SLOTS * 2 * (in_features + out_features)) / 8
    offsets = torch.arange(SLOTS) * 2 * (in_features + out_features)
    lora = LoraSite(arena, offsets, ranks, [out_features], in_features)
    return StackLinear(weight(out_features, in_features), None, site, lora, torch.full((SLOTS,), -1))


def layer(number: int = 0) -> StackLayer:
    shapes = ((128, WIDTH), (WIDTH, 64), (2 * MLP, WIDTH), (WIDTH, MLP))
    linears = [linear(*shape, 4 * number + site) for site, shape in enumerate(shapes)]
    return StackLayer(torch.ones(WIDTH), torch.ones(WIDTH), None, *linears, scale=0.25, window=0)


def stack(*layers: StackLayer) -> DecoderStack:
    return DecoderStack(layers, **HEADS, eps=1e-5, dtype=torch.float32)


def cache(count: int = 2, **change: Any) -> list[Tensor]:
    return [torch.zeros((2, 3, 8, 16), **change) for _ in range(count)]


def inputs(**change: Any) -> tuple[Tensor, Tensor, StackPaging, StackAdapters | None]:
    """Arguments of `run` for a prompt of 3 and a sequence of 9 tokens that brings 2, some of them changed."""
    rows = torch.tensor([0, 1, 2, 15, 16])
    given = {
        "hidden": torch.randn(ROWS, WIDTH),
        "rotations": rotation_table(torch.rand(8), 1.0, ROWS, torch.float32),
        "caches": CacheTables(cache(), cache()),
        "kv_slots": rows,
        "query_starts": torch.tensor([0, 3, 5], dtype=torch.int32),
        "context_lens": torch.tensor([3, 9], dtype=torch.int32),
        "block_tables": torch.tensor([[0, 0], [1, 2]], dtype=torch.int32),
        "adapters": StackAdapters(AdaptedRows([Piece(1, 3, ROWS, 0.5)]), bytes([1] * 8), ()),
    } | change
    hidden, rotations, *paging, adapters = given.values()
    return hidden, rotations, StackPaging(*paging), adapters


def test_runs_what_fits() -> None:
    given = inputs()
    out = stack(layer(), layer(1)).run(*given)
    assert out.shape == (ROWS, WIDTH) and out.isfinite().all() and (out != 0).all()
    assert all((keys != 0).any() for keys in given[2].caches.keys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden": torch.randn(ROWS, WIDTH + 1)}, "hidden must be"),
        ({"hidden": torch.randn(ROWS, 2 * WIDTH)[:, ::2]}, "hidden must be"),
        ({"hidden": torch.randn(ROWS, WIDTH).half()}, "hidden must be"),
        ({"rotations": torch.randn(ROWS - 1, 3, 8)}, "rotations must be"),
        ({"caches": CacheTables(cache(1), cache(1))}, "caches must be of 2 layers"),
        ({"caches": CacheTables(cache(dtype=torch.half), cache(dtype=torch.half))}, "k_cache must be"),
        ({"kv_slots": torch.zeros(ROWS - 1, dtype=torch.int64)}, "kv_slots must be"),
        ({"query_starts": torch.zeros(2, dtype=torch.int32)}, "query_starts"),
        ({"block_tables": torch.zeros((2, 2), dtype=torch.int64)}, "block_tables is int32"),
        ({"adapters": StackAdapters(AdaptedRows([Piece(1, 3, ROWS + 1, 1.0)]), bytes(8), ())}, "6 rows"),
        ({"adapters": StackAdapters(AdaptedRows([Piece(SLOTS, 0, 1, 1.0)]), bytes(8), ())}, "4 slots"),
        ({"adapters": StackAdapters(AdaptedRows([]), bytes(7), ())}, "must have 8 bytes"),
    ],
)
def test_refuses_steps_that_do_not_fit(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        stack(layer(), layer(1)).run(*inputs(**change))


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"attention_norm": torch.ones(WIDTH - 1)},
        lambda: {"mlp_norm": torch.ones(WIDTH).half()},
        lambda: {"head_norm": torch.ones(6, 16)},  # the first layer has none
        lambda: {"qkv": linear(112, WIDTH, 0)},
        lambda: {"down": linear(WIDTH, WIDTH, 3)},
        lambda: {"o": linear(WIDTH, 64, 1)._replace(bias=torch.ones(WIDTH + 1))},
        lambda: {"o": linear(WIDTH, 64, 1)._replace(affines=torch.zeros(SLOTS - 1, dtype=torch.int64))},
        lambda: {"o": linear(WIDTH, 64, 1)._replace(weight=with_other_codes(layout=Layout.CANONICAL))},
        lambda: {"o": linear(WIDTH, 64, 1)._replace(weight=weight(WIDTH, 64, Layout.PAIRS))},
        lambda: {"o": linear(WIDTH, 64, 1)._replace(weight=with_other_codes(codes=torch.zeros(9, dtype=torch.uint8)))},
    ],
    ids=["norm", "norm-dtype", "head-norm", "qkv", "down", "bias", "affines", "not-tiled", "in-pairs", "codes"],
)
def test_refuses_layers_that_do_not_fit(change: Callable[[], dict[str, Any]]) -> None:
    with pytest.raises(RuntimeError):
        stack(layer(), layer(1)._replace(**change()))


def with_other_codes(**change: Any) -> NF4Weight:
    return dataclasses.replace(weight(WIDTH, 64), **change)


def test_refuses_pairs_in_another_type() -> None:
    linears = [each._replace(weight=weight(each.weight.out_features, each.weight.in_features, Layout.PAIRS))
               for each in layer().linears]  # fmt: skip
    with pytest.raises(RuntimeError, match="with bfloat16 in pairs, got pairs"):
        stack(StackLayer(torch.ones(WIDTH), torch.ones(WIDTH), None, *linears, scale=0.25, window=0))


def test_refuses_heads_that_its_attention_would_read_beyond() -> None:
    with pytest.raises(RuntimeError, match="head_dim must be a multiple of 8"):
        DecoderStack([layer()], num_heads=4, num_kv_heads=2, head_dim=12, eps=1e-5, dtype=torch.float32)


def test_caches_of_all_layers_are_alike() -> None:
    with pytest.raises(RuntimeError, match="alike"):
        CacheTables(cache(), [*cache(1), torch.zeros(2, 4, 8, 16)])
    with pytest.raises(RuntimeError, match="alike"):
        CacheTables(cache(), [torch.zeros(2, 3, 16, 8).transpose(2, 3)] * 2)
