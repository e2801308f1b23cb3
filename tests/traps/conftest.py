"""A tiny NF4 base, adapters of many kinds made by PEFT, and what PEFT answers with each; servers on copies of them."""

import json
import queue
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.server.app import App
from lorikeet.server.engine.request import Event, Request
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapters.managing import CONFIG, WEIGHTS, Gate
from ..base.family_models import VOCAB, save_family
from ..golden.in_process import Answer, Call, greedy_params, serving
from ..golden.peft_oracle import Oracle, Recipe

# Two tokens closer than this in PEFT's logits may swap.
NEAR_TIE: Final = 1e-3
COMMON: Final[dict[str, Any]] = {"task_type": "CAUSAL_LM", "init_lora_weights": False}

RECIPES: Final = (
    Recipe("plain", LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **COMMON)),
    Recipe("plain-2", LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **COMMON)),
    Recipe("rslora", LoraConfig(r=5, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "v_proj"], **COMMON)),
    Recipe(
        "patterns",
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "up_proj", "down_proj"],
            rank_pattern={"q_proj": 17, r"layers\.1\..*down_proj": 3},
            alpha_pattern={"down_proj": 2, "q_proj": 9},
            **COMMON,
        ),
    ),
    Recipe(
        "some-layers",
        LoraConfig(r=16, lora_alpha=4, target_modules=["o_proj", "up_proj"], layers_to_transform=[0, 2], **COMMON),
    ),
    Recipe(
        "ragged",
        LoraConfig(
            r=6, lora_alpha=9, target_modules=r".*layers\.(0\.self_attn\.q|1\.self_attn\.v|2\.mlp\.down)_proj", **COMMON
        ),
    ),
    Recipe("narrow", LoraConfig(r=2, lora_alpha=4, target_modules=["down_proj"], layers_to_transform=[1], **COMMON)),
    Recipe("wide", LoraConfig(r=70, lora_alpha=35, target_modules=["k_proj"], **COMMON)),
)
NAMES: Final = tuple(recipe.name for recipe in RECIPES)


class World(NamedTuple):
    """The base, the adapters as PEFT saved them, and PEFT itself."""

    model: Path
    adapters: Path
    oracle: Oracle

    def check(self, adapter: str, prompt: list[int], token_ids: list[int]) -> None:
        """Assert that greedy tokens are PEFT's with that adapter ("": none), up to the first near-tie."""
        want, margins = self.oracle.greedy(adapter, prompt, len(token_ids))
        sure = next((i for i, margin in enumerate(margins) if margin < NEAR_TIE), len(want))
        assert token_ids and token_ids[:sure] == want[:sure], f"not what {adapter or 'the base'} answers"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("traps")
    save_family("llama", root / "model")
    oracle = Oracle(root / "model", list(RECIPES), root / "adapters")
    return World(root / "model", root / "adapters", oracle)


@pytest.fixture
def put(world: World, tmp_path: Path) -> Callable[..., Path]:
    """put(name, folder=name): have the adapter's files in that folder of the server's root, and nothing else."""

    def copy(name: str, folder: str = "") -> Path:
        target = tmp_path / "adapters" / (folder or name)
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(world.adapters / name, target))

    return copy


@pytest.fixture
def serve(world: World, tmp_path: Path) -> Iterator[Callable[..., App]]:
    """serve(**settings): a server on the root of `put`; ended at the end of the test."""
    (tmp_path / "adapters").mkdir(exist_ok=True)
    with ExitStack() as stack:

        def start(**settings: Any) -> App:
            settings = {"cache_dir": tmp_path / "cache", "step_tokens": 24, "max_running": 12} | settings
            return stack.enter_context(serving(world.model, tmp_path / "adapters", **settings))

        yield start


@pytest.fixture
def prompt() -> list[int]:
    """Fresh random tokens, some more than two KV blocks."""
    return torch.randint(3, VOCAB, (37,)).tolist()


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of adapter_config.json."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Save what `change` makes of the tensors."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


_numbers = iter(range(10**9))


def call(app: App, adapter: str, prompt: list[int], count: int = 8) -> Call:
    """Submit a greedy request of so many tokens."""
    return Call(app, f"request-{next(_numbers)}", adapter, prompt, greedy_params(count))


def answer(app: App, adapter: str, prompt: list[int], count: int = 8) -> Answer:
    """Submit one and wait for it; it must end well."""
    result = call(app, adapter, prompt, count).result()
    assert result.failed is None, result.failed
    return result


class HeldCall(Call):
    """A greedy request that is in the middle of its answer, with the step thread held up, until its `with` ends.

    Attributes:
        count: tokens that it asks for.
    """

    def __init__(self, app: App, adapter: str, prompt: list[int], count: int = 12) -> None:
        self.count = count
        self._gate = Gate()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        adaptation = Adaptation.single(app.manager.resolve(adapter)) if adapter else None
        name = f"held-{next(_numbers)}"
        self.request = Request(name, list(prompt), greedy_params(count), adaptation, self._emit)
        app.engine.submit(self.request)
        self._gate.wait_reached()

    def __enter__(self) -> "HeldCall":
        return self

    def __exit__(self, *_: object) -> None:
        self._gate.open()

    def _emit(self, event: Event) -> None:
        self._events.put(event)
        if len(self.request.output_token_ids) >= 3:
            self._gate.pass_through()
