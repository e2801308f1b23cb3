"""LoRA on embeddings and AdaLoRA with other weights than 1, alone and in sums: h = Wx + sum of w * delta(x).

PEFT's `cat` has no answer for these. Each delta is PEFT's own, of the module that it loaded, and is added up here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lorikeet.server.app import App
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .conftest import World
from .format_oracle import FormatOracle, Members, random_prompts
from .format_requests import ask, check

SUMS: tuple[Members, ...] = (
    (("lora-embedding", 0.6),),
    (("lora-embedding-alone", -1.5),),
    (("lora-embedding-tied", 0.4),),
    (("adalora", 1.75),),
    (("adalora", -0.5), ("plain", 0.7)),
    (("plain", 0.3), ("lora-embedding", 0.8)),
    (("lora-embedding", -0.4), ("lora-embedding-alone", 1.25), ("adalora", 0.9)),
    (("lora-embedding-tied", 1.5), ("lora-embedding", 0.5), ("rslora", -0.6)),
    (("lora-head", 0.5), ("lora-embedding", 1.3)),
)

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's hints for training


class SummedDeltas(FormatOracle):
    """Another oracle's base and adapters, with every member's deltas weighted and added module by module."""

    def __init__(self, oracle: FormatOracle) -> None:
        self.__dict__.update(oracle.__dict__)

    @torch.inference_mode()
    def logits(self, members: Members, ids: Sequence[int]) -> Tensor:
        """As `FormatOracle.logits`."""
        with self._added(members) as model:
            return self._answer(model, ids)

    @contextmanager
    def _added(self, members: Members) -> Iterator[nn.Module]:
        hooks = []
        for name, weight in members:
            for path, layer in self._load(name).base_model.model.named_modules():
                if isinstance(layer, LoraLayer):
                    hooks.append(self._base.get_submodule(path).register_forward_hook(_adding(layer, weight)))
        assert hooks
        try:
            yield self._base
        finally:
            for hook in hooks:
                hook.remove()


def _adding(layer: Any, weight: float) -> Any:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + weight * (layer(*inputs) - layer.base_layer(*inputs))

    return add


def test_deltas_added_by_hand_are_what_peft_adds(world: World) -> None:
    """Where PEFT has an answer."""
    summed = SummedDeltas(world.oracle)
    (ids,) = random_prompts(1, (20, 21), world.oracle.vocab_size, seed=4)
    for members in ((("plain", 0.7), ("rslora", -0.4)), (("plain", 1.6),), (("lora-embedding", 1.0),)):
        torch.testing.assert_close(summed.logits(members, ids), world.oracle.logits(members, ids), atol=1e-4, rtol=1e-4)


def test_weighted_embeddings_and_adalora_beside_others(served: App, world: World) -> None:
    summed = SummedDeltas(world.oracle)
    wanted = [members for members in SUMS if all(name in world.made for name, _ in members)]
    assert wanted
    calls = []
    for number, members in enumerate(wanted):
        (prompt,) = random_prompts(1, (1, 50), world.oracle.known_ids(members), seed=900 + number)
        calls.append(ask(served, f"weighted {number}", members, prompt, tokens=4))
    for call in calls:
        check(call, summed)
