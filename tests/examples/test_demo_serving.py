"""The four demo adapters, served in one batch, each lower the perplexity of their own held-out text."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lorikeet.adapters.checkpoint import load_checkpoint
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.layers import LoraLinear
from lorikeet.adapters.lora_batch import LoraBatch
from lorikeet.adapters.packing import pack_adapter
from lorikeet.adapters.tensor_plan import TensorPlanner
from lorikeet.server.base.demo import BASE_NAME, MODEL_DIR_NAME
from lorikeet.server.base.loader import load_base
from lorikeet.server.config import default_cache_dir

from ..base.paged_driver import PagedDriver

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(p.name for p in (EXAMPLES / "adapters").iterdir() if p.is_dir())
CACHE = Path(os.environ.get("LORIKEET_CACHE_DIR") or default_cache_dir())
TOKENS = 160

pytestmark = pytest.mark.skipif(
    not (CACHE / MODEL_DIR_NAME).is_dir(), reason="no demo base in the cache; `make demo` prepares it"
)


def perplexity(logits: torch.Tensor, tokens: list[int]) -> float:
    return math.exp(F.cross_entropy(logits[:-1], torch.tensor(tokens[1:])).item())


def test_all_four_in_one_batch_each_lower_the_perplexity_of_their_own_text(demo_cache: Path) -> None:
    base = load_base(
        str(CACHE / MODEL_DIR_NAME),
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        cache_dir=demo_cache,
        name=BASE_NAME,
        progress=False,
    )
    store = DeviceStore(base.site_table, torch.float32, base.device, 64 * 2**20, max_slots=8)
    planner = TensorPlanner(base.site_table, base.module_table, base.fingerprint)
    slots = []
    for name in NAMES:
        checkpoint = load_checkpoint(EXAMPLES / "adapters" / name, planner)
        packed = pack_adapter(checkpoint, base.weights, dtype=torch.float32, pin_memory=False)
        slots.append(store.install(packed))
    texts = [
        base.tokenizer((EXAMPLES / "heldout" / f"{name}.txt").read_text(), add_special_tokens=False).input_ids[:TOKENS]
        for name in NAMES
    ]
    lora = LoraBatch(store, max_tokens=8 * TOKENS, max_segments=8)
    base.wrap_sites(lambda linear, site: LoraLinear(linear, site, lora))
    # Every text twice in the same forward pass: as a base row, and with its own adapter.
    driver = PagedDriver(base, texts + texts)
    counts = [(i, len(tokens)) for i, tokens in enumerate(driver.sequences)]
    lora.prepare([(-1, sum(len(t) for t in texts)), *((s, len(t)) for s, t in zip(slots, texts, strict=True))])
    logits = driver.step(counts)
    assert len(NAMES) == 4
    for i, name in enumerate(NAMES):
        before, after = perplexity(logits[i], texts[i]), perplexity(logits[i + len(NAMES)], texts[i])
        assert after < 0.9 * before, f"{name}: {before:.2f} -> {after:.2f}"
