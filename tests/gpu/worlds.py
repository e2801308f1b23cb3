"""A base whose weights are the same bits on every device, adapters of eight kinds for it, and requests for them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lorikeet.server.app import App
from lorikeet.server.engine.runner import Runner
from transformers import AutoTokenizer

from ..base.family_models import VOCAB, save_family
from ..devices import CPU, GPU
from ..engine.graph_world import Rerun
from ..golden.format_oracle import Members, random_prompts
from ..golden.in_process import serving
from ..golden.peft_oracle import Oracle, nf4_model, recipes
from .answers import Wanted

# (dtype fp32, tolerance): the same NF4 codes and constants on every side; sums are grouped differently.
FP32 = 2e-4


@dataclass(frozen=True)
class World:
    """What servers serve.

    Attributes:
        model: a checkpoint that bitsandbytes quantized, which every server takes as it is.
        adapters: a folder for each of names.
    """

    model: Path
    adapters: Path
    names: list[str]


def make_world(family: str, root: Path) -> World:
    """Make and save everything, on the CPU."""
    save_family(family, root / "source")
    chosen = recipes(split=family != "phi3")
    Oracle(root / "source", chosen, root / "adapters")
    model = root / "model"
    nf4_model(root / "source", CPU, torch.bfloat16).save_pretrained(model)
    AutoTokenizer.from_pretrained(root / "source").save_pretrained(model)
    return World(model, root / "adapters", [recipe.name for recipe in chosen])


def requests(names: Sequence[str], count: int, tokens: int, seed: int, *, combined: bool = True) -> list[Wanted]:
    """So many: of the base, each adapter, and `combined` one with a strength and two together; then from the start."""
    members: list[Members] = [(), *(((name, 1.0),) for name in names)]
    if combined:
        members += [((names[-1], -0.5),), ((names[0], 0.5), (names[-1], 0.7))]
    prompts = random_prompts(count, (1, 60), VOCAB, seed)
    return [Wanted(members[i % len(members)], prompt, tokens) for i, prompt in enumerate(prompts)]


@contextmanager
def server(
    world: World,
    device: torch.device = GPU,
    dtype: torch.dtype = torch.float32,
    *,
    graphs: bool = True,
    load: Sequence[str] | None = None,
    **settings: Any,
) -> Iterator[App]:
    """A server with these adapters (None: all). On a CPU its graphs call again what they captured."""
    sizes = {"step_tokens": 64, "max_running": 12, "cuda_graphs": graphs} | settings
    rerun = patch("lorikeet.server.app.capture_backend", lambda config, _: Rerun() if config.cuda_graphs else None)
    with (
        rerun if device == CPU else nullcontext(),
        serving(world.model, world.adapters, device=device, dtype=dtype, **sizes) as app,
    ):
        for name in world.names if load is None else load:
            app.manager.load(name)
        yield app


def num_replays(app: App) -> int:
    """Steps that ran as captured graphs so far."""
    runner = app.engine._loop._runner
    assert isinstance(runner, Runner)
    return runner.graph_stats.num_replays
