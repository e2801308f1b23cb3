"""The adapters of every format, made once for all tests that compare with PEFT."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from ..devices import CPU, Place, places

if TYPE_CHECKING:
    from lorikeet.server.app import App

    from .format_oracle import FormatOracle
    from .formats import Format

FAMILIES = ("llama", "qwen2", "gemma2", "gemma3", "phi3")
# Of these the device, too, is an argument.
PLACES = places(FAMILIES, "formats")


@dataclass(frozen=True)
class World:
    """One family's base, its adapters by name, and PEFT."""

    model: Path
    device: torch.device
    made: "dict[str, Format]"
    oracle: "FormatOracle"


@pytest.fixture(scope="session", params=PLACES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Everything made; what PEFT saved answers as what it had in memory."""
    from ..base.family_models import save_family
    from .format_oracle import FormatOracle
    from .formats import formats

    place: Place = request.param
    model = tmp_path_factory.mktemp(place.family) / "model"
    save_family(place.family, model)
    oracle = FormatOracle(model, model.parent / "adapters", model.parent / "pristine", device=place.device)
    made = {each.name: each for each in formats(place.family)}
    ids = torch.randint(3, oracle.vocab_size, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    for number, each in enumerate(made.values()):
        maker = oracle.make(each, seed=number)
        if each.dtype is torch.float32 and place.device == CPU:
            with torch.inference_mode():
                in_memory = maker(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            saved = oracle.logits(((each.name, 1.0),), ids)
            torch.testing.assert_close(saved, in_memory, atol=1e-4, rtol=1e-4)
    yield World(model, place.device, made, oracle)


@pytest.fixture(scope="session")
def served(world: World) -> "Iterator[App]":
    """All of them on the device.

    Steps compute 24 tokens, so that most prompts take several; the KV cache has 20 blocks of 16, so that twelve short
    requests fit, but not twelve long ones.
    """
    from lorikeet.adapters.info import Tier
    from transformers import AutoConfig

    from .in_process import serving

    config = AutoConfig.from_pretrained(world.model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4
    sizes = {"step_tokens": 24, "max_running": 12, "kv_cache_bytes": f"{20 * 16 * token_bytes // 1024}KiB"}
    with serving(world.model, world.oracle.out, device=world.device, **sizes) as app:
        for name in world.made:
            app.manager.load(name, None)
            app.manager.prefetch(name, Tier.DEVICE)  # so that no request waits while others end
        assert sorted(app.manager.snapshot().names_by_tier()[Tier.DEVICE]) == sorted(world.made)
        yield app
