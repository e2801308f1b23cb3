"""One family's base, eight adapters made by PEFT, and batches that mix them with base rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lorikeet.adapters.checkpoint import load_checkpoint
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.layers import LoraLinear
from lorikeet.adapters.lora_batch import LoraBatch
from lorikeet.adapters.packing import pack_adapter
from lorikeet.adapters.tensor_plan import TensorPlanner
from lorikeet.server.base.loader import load_base
from lorikeet.server.base.model import BaseModel
from torch import Tensor

from ..base.family_models import VOCAB, save_family
from ..base.paged_driver import PagedDriver
from ..devices import Place
from .peft_oracle import Oracle, recipes

# (dtype fp32, tolerance): the same fp32 weights on both sides; matmuls are grouped differently.
TOLERANCE = 2e-4
# Two tokens closer than this in PEFT's logits may swap.
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class Golden:
    """A base, its adapters on disk, and PEFT, all for one device."""

    device: torch.device
    model: Path
    adapters: Path
    names: list[str]
    oracle: Oracle


def make_golden(place: Place, root: Path) -> Golden:
    """Make and save everything."""
    save_family(place.family, root / "model")
    chosen = recipes(split=place.family != "phi3")
    oracle = Oracle(root / "model", chosen, root / "adapters", place.device)
    return Golden(place.device, root / "model", root / "adapters", [r.name for r in chosen], oracle)


def random_prompts(count: int, seed: int) -> list[list[int]]:
    """Of 1 to 39 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def plain_base(golden: Golden, dtype: torch.dtype = torch.float32) -> BaseModel:
    """Without LoRA layers."""
    return load_base(str(golden.model), device=golden.device, compute_dtype=dtype, progress=False)


class AdaptedBase:
    """The base with LoRA layers and every adapter on the device.

    Attributes:
        slots: of each adapter; "" is the base.
    """

    def __init__(self, golden: Golden, dtype: torch.dtype = torch.float32) -> None:
        self.base = base = plain_base(golden, dtype)
        store = DeviceStore(base.site_table, dtype, base.device, 16 * 2**20, max_slots=16)
        self.slots = {"": -1}
        planner = TensorPlanner(base.site_table, base.module_table, base.fingerprint)
        for name in golden.names:
            checkpoint = load_checkpoint(golden.adapters / name, planner)
            packed = pack_adapter(checkpoint, base.weights, dtype=dtype, pin_memory=False)
            slot = store.install(packed)
            assert slot is not None
            self.slots[name] = slot
        self._batch = LoraBatch(store, max_tokens=512, max_segments=32)
        base.wrap_sites(lambda linear, site: LoraLinear(linear, site, self._batch))

    def prefill(self, names: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Every prompt in one step: the logits of all its tokens, float32 [n, vocab] on the CPU; in the given order."""
        order = sorted(range(len(names)), key=lambda i: self.slots[names[i]])
        rows = [(i, len(prompts[i])) for i in order]
        self._batch.prepare([(self.slots[names[i]], n) for i, n in rows])
        found = PagedDriver(self.base, prompts).step(rows)
        return [found[i].cpu() for i in range(len(names))]
