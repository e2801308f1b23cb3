"""A server answers alike with graphs and without, with its kernels and with their plain references, on GPU and CPU."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from lorikeet.server.engine.runner import Runner

from ..base.family_models import VOCAB
from ..devices import CPU, GPU, Place, gpu_place
from ..golden.format_oracle import random_prompts
from ..golden.format_requests import Asked
from .answers import Wanted, answer_all, assert_alike
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


def beside_prompts(world: World, dtype: torch.dtype, graphs: bool) -> list[Asked]:
    """Short prompts that soon decode, and long ones beside them in chunks that a step of 96 tokens leaves room for."""
    names = [name for name in world.names if name not in ("patterns", "one-linear-r33")]  # ranks above 16
    wanted = requests(names, 8, tokens=24, seed=3, combined=False)
    prompts = random_prompts(6, (100, 300), VOCAB, seed=4)
    members = [request.members for request in wanted]
    wanted += [Wanted(members[i], prompt, 6) for i, prompt in enumerate(prompts)]
    wanted += [Wanted(members[i], prompt[:150] + wanted[0].prompt, 6) for i, prompt in enumerate(prompts)]  # cached
    with (
        server(world, dtype=dtype, graphs=graphs, step_tokens=96) as app,
        patch.object(Runner, "_run_eagerly", autospec=True, side_effect=Runner._run_eagerly) as run_eagerly,
    ):
        found = answer_all(app, wanted)
        # Where there are graphs every step is one, also those of prompts.
        assert (num_replays(app) > 0) == graphs != run_eagerly.called
        return found


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


def test_long_prompts_beside_decodes_with_graphs_and_without(world: World) -> None:
    dtype = torch.float32
    assert_alike(beside_prompts(world, dtype, True), beside_prompts(world, dtype, False), FP32)


def test_long_prompts_beside_decodes_with_graphs_and_without_in_bf16(world: World) -> None:
    dtype = torch.bfloat16
    graphed, eager = beside_prompts(world, dtype, True), beside_prompts(world, dtype, False)
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
