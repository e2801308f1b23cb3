"""A batch that mixes eight adapters of different rank, targets and method with base rows equals PEFT on that NF4 base.

PEFT runs every request alone, without a cache, on transformers' own bitsandbytes model (peft_oracle.py).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lorikeet.adapters.checkpoint import load_checkpoint
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.layers import LoraLinear
from lorikeet.adapters.lora_batch import LoraBatch
from lorikeet.adapters.packing import pack_adapter
from lorikeet.server.app import App
from lorikeet.server.base.loader import load_base
from lorikeet.server.base.model import BaseModel

from ..base.family_models import VOCAB, save_family
from ..base.paged_driver import PagedDriver
from .in_process import Call, greedy_params, serving
from .peft_oracle import Oracle, recipes

# (dtype fp32, tolerance): the same fp32 weights on both sides; matmuls are grouped differently.
TOLERANCE = 2e-4
# Two tokens closer than this in PEFT's logits may swap.
NEAR_TIE = 1e-3


class Golden(NamedTuple):
    """One family's base, its adapters on disk, and the oracle."""

    model: Path
    adapters: Path
    names: list[str]
    oracle: Oracle


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2", "phi3"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Families whose projections differ: plain, with biases, with norms around, already fused."""
    root = tmp_path_factory.mktemp(request.param)
    save_family(request.param, root / "model")
    chosen = recipes(split=request.param != "phi3")
    oracle = Oracle(root / "model", chosen, root / "adapters")
    return Golden(root / "model", root / "adapters", [r.name for r in chosen], oracle)


@pytest.fixture(scope="module")
def app(golden: Golden) -> Iterator[App]:
    """The server's parts with every adapter loaded; 16-token blocks, prompts in chunks of at most 24 tokens."""
    with serving(golden.model, golden.adapters, step_tokens=24, max_running=12) as app:
        for name in golden.names:
            app.manager.load(name, None)
        yield app


def prompts(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def with_adapters(golden: Golden) -> tuple[BaseModel, LoraBatch, dict[str, int]]:
    """The base with LoRA layers, and each adapter's slot ("": -1)."""
    base = load_base(str(golden.model), device=torch.device("cpu"), compute_dtype=torch.float32, progress=False)
    store = DeviceStore(base.site_table, torch.float32, base.device, 16 * 2**20, max_slots=16)
    slots = {"": -1}
    for name in golden.names:
        checkpoint = load_checkpoint(golden.adapters / name, base.site_table, base.module_table, base.fingerprint)
        packed = pack_adapter(
            checkpoint, base.site_table, base.module_table, base.weights, dtype=torch.float32, pin_memory=False
        )
        slot = store.install(packed)
        assert slot is not None
        slots[name] = slot
    batch = LoraBatch(store, max_tokens=512, max_segments=32)
    base.wrap_sites(lambda linear, site: LoraLinear(linear, site, batch))
    return base, batch, slots


def test_logits_of_a_mixed_batch_equal_peft(golden: Golden) -> None:
    base, batch, slots = with_adapters(golden)
    order = sorted([*golden.names, "", "", golden.names[0]], key=slots.__getitem__)
    driver = PagedDriver(base, prompts(len(order), seed=1))
    counts = [(i, len(tokens)) for i, tokens in enumerate(driver.sequences)]
    batch.prepare([(slots[name], n) for name, (_, n) in zip(order, counts, strict=True)])
    got = driver.step(counts)
    for i, name in enumerate(order):
        want = golden.oracle.logits(name, driver.sequences[i])
        torch.testing.assert_close(got[i], want, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        assert (want - golden.oracle.logits("", driver.sequences[i])).abs().max() > 0.1 or not name


def test_base_rows_of_a_mixed_batch_equal_the_base_without_adapters(golden: Golden) -> None:
    base, batch, slots = with_adapters(golden)
    plain = load_base(str(golden.model), device=torch.device("cpu"), compute_dtype=torch.float32, progress=False)
    tokens = prompts(4, seed=2)
    rows = [(i, len(t)) for i, t in enumerate(tokens)]
    batch.prepare([(-1, rows[0][1] + rows[1][1]), (slots["rslora"], rows[2][1]), (slots["adalora"], rows[3][1])])
    mixed = PagedDriver(base, tokens).step(rows)
    alone = PagedDriver(plain, tokens).step(rows)
    for i in (0, 1):
        assert torch.equal(mixed[i], alone[i])
    for i in (2, 3):
        assert not torch.allclose(mixed[i], alone[i], atol=0.1)


def test_greedy_tokens_of_every_mixed_request_equal_peft_alone(golden: Golden, app: App) -> None:
    order = ["", *golden.names, "", *reversed(golden.names)]
    tokens = prompts(len(order), seed=3)
    calls = [
        Call(app, f"{i}", name, prompt, greedy_params(10))
        for i, (name, prompt) in enumerate(zip(order, tokens, strict=True))
    ]
    for name, prompt, call in zip(order, tokens, calls, strict=True):
        answer = call.result()
        assert answer.finished is not None, answer.failed
        want, margins = golden.oracle.greedy(name, prompt, 10)
        # Beyond a near-tie the two may go different ways, so only what comes before one is compared.
        sure = next((i for i, margin in enumerate(margins) if margin < NEAR_TIE), len(want))
        assert answer.token_ids[:sure] == want[:sure], name
        assert len(answer.token_ids) == 10
