"""A server answers alike with graphs and without, with its kernels and with their plain references, on GPU and CPU."""

from contextlib import nullcontext

import pytest
import torch

from ..devices import CPU, GPU, Place, gpu_place
from ..golden.format_requests import Asked
from .answers import answer_all, assert_alike
from .plain_kernels import plain_kernels
from .worlds import FP32, World, make_world, num_replays, requests, server

# (dtype bf16, tolerance): the same device and rounding points; the rows of a step decide which kernel computes it.
BF16 = 0.15
# By so much bf16 moves log probabilities apart with the adapter that amplifies most (test_bf16.py).
BF16_NEAR_TIE = 0.4


@pytest.fixture(scope="module", params=[gpu_place(family, "switches") for family in ("llama", "qwen2", "gemma2")])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    place: Place = request.param
    return make_world(place.family, tmp_path_factory.mktemp(place.family))


def answers(
    world: World,
    device: torch.device = GPU,
    dtype: torch.dtype = torch.float32,
    *,
    plain: bool = False,
    graphs: bool = True,
) -> list[Asked]:
    kernels = plain_kernels(device) if plain else nullcontext({})
    with server(world, device, dtype, graphs=graphs) as app, kernels as calls:
        found = answer_all(app, requests(world.names, 16, tokens=12, seed=1))
        # Steps with a request of two adapters are never replayed.
        found += answer_all(app, requests(world.names, 12, tokens=12, seed=2, combined=False))
        assert (num_replays(app) > 0) == graphs
        assert not plain or {"nf4_linear", "paged_attention"} <= calls.keys()
        return found


def test_graphs_on_and_off(world: World) -> None:
    assert_alike(answers(world), answers(world, graphs=False), FP32)


def test_graphs_on_and_off_in_bf16(world: World) -> None:
    graphed, eager = answers(world, dtype=torch.bfloat16), answers(world, dtype=torch.bfloat16, graphs=False)
    assert_alike(graphed, eager, BF16, BF16_NEAR_TIE, least=0.1)


def test_kernels_on_and_off(world: World) -> None:
    assert_alike(answers(world), answers(world, plain=True, graphs=False), FP32)


def test_kernels_on_and_off_in_bf16(world: World) -> None:
    """The type in which NF4 weights are multiplied without being dequantized."""
    dtype = torch.bfloat16
    fast, plain = answers(world, dtype=dtype), answers(world, dtype=dtype, plain=True, graphs=False)
    assert_alike(fast, plain, BF16, BF16_NEAR_TIE, least=0.1)


def test_gpu_and_cpu(world: World) -> None:
    assert_alike(answers(world, CPU), answers(world), FP32)
