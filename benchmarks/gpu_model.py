"""The served code on random weights, made in memory: the base, adapters in device memory, and the runner over both.

Nothing is read from disk. Weights are drawn on the device and quantized there as a checkpoint's would be, by the
loader's own code; adapters are laid out as the adapter manager lays them out. So what runs is what a server runs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.arena import aligned
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.fingerprint import BaseFingerprint
from lorikeet.adapters.layers import LoraLinear
from lorikeet.adapters.lora_batch import LoraBatch
from lorikeet.adapters.packing import PackedAdapter
from lorikeet.adapters.report import AdapterReport
from lorikeet.adapters.sites import SiteTable
from lorikeet.adapters.version import AdapterVersion
from lorikeet.server.base.attention import KVCache
from lorikeet.server.base.fill import fill_model
from lorikeet.server.base.loader import build_base
from lorikeet.server.base.model import BaseModel
from lorikeet.server.base.site_plan import SitePlan
from lorikeet.server.engine.graph_capture import CudaCapture
from lorikeet.server.engine.runner import Runner
from synthetic_model import random_parameters, word_tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig

ADAPTER_STD = 0.01
"""Of lora_A and lora_B: large enough that adapters change every row, small enough that activations stay finite."""


def llama_3_8b() -> LlamaConfig:
    """The shapes of Llama-3-8B."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )


@dataclass(frozen=True, slots=True)
class Room:
    """How much is reserved.

    Attributes:
        adapters: on the device.
        rank: of each.
        step_tokens: rows of a step at most.
        requests: of a step at most.
        blocks: of the KV cache.
        block_size: tokens of a block.
        context: tokens of a request at most.
    """

    adapters: int
    rank: int
    step_tokens: int
    requests: int
    blocks: int
    block_size: int
    context: int


@dataclass(frozen=True, slots=True)
class Served:
    """A base with its adapters, ready to run steps.

    Attributes:
        base: the loaded model, LoRA layers attached.
        slots: device slot of each adapter.
        adaptations: what requests of each adapter carry, in the order of `slots`.
        lora: the metadata that the LoRA layers read.
        cache: paged KV, filled with random values.
        runner: over all of them.
        room: what was asked for.
    """

    base: BaseModel
    slots: tuple[int, ...]
    adaptations: tuple[Adaptation, ...]
    lora: LoraBatch
    cache: KVCache
    runner: Runner
    room: Room

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.base.device


def serve_random(config: PretrainedConfig, room: Room, device: torch.device, dtype: torch.dtype, seed: int) -> Served:
    """Make all of it."""
    base = random_base(config, device, dtype, seed)
    packed = random_adapters(base.site_table, room.adapters, room.rank, device, dtype, seed)
    budget = room.adapters * aligned(adapter_elements(base.site_table, room.rank)) * dtype.itemsize
    store = DeviceStore(base.site_table, dtype, device, budget, max_slots=max(1, room.adapters))
    slots = tuple(_install(store, each) for each in packed)
    lora = LoraBatch(store, max_tokens=room.step_tokens, max_segments=room.requests)
    base.wrap_sites(lambda linear, site: LoraLinear(linear, site, lora))
    cache = base.new_kv_cache(room.blocks, room.block_size)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()  # a step over zeros is not what a server computes, and can be faster
    adaptations = tuple(Adaptation.single(AdapterVersion(f"random-{i}", f"{i:064x}")) for i in range(len(slots)))
    runner = _new_runner(base, lora, cache, room, graphs=True)
    return Served(base, slots, adaptations, lora, cache, runner, room)


def another_runner(served: Served, *, graphs: bool = True) -> Runner:
    """A runner of its own over the same model, adapters and cache."""
    return _new_runner(served.base, served.lora, served.cache, served.room, graphs=graphs)


def _new_runner(base: BaseModel, lora: LoraBatch, cache: KVCache, room: Room, *, graphs: bool) -> Runner:
    return Runner(
        base,
        lora,
        cache,
        max_tokens=room.step_tokens,
        max_requests=room.requests,
        max_blocks=-(-room.context // room.block_size),
        expand=lambda slot: ((slot, 1.0),),
        capture=CudaCapture(base.device) if graphs and base.device.type == "cuda" else None,
    )


def random_base(config: PretrainedConfig, device: torch.device, dtype: torch.dtype, seed: int) -> BaseModel:
    """A base of random weights, quantized where they are drawn."""

    def fill(model: nn.Module, plans: list[SitePlan]) -> None:
        drawn = _Drawn(lambda: random_parameters(model, device, seed))
        fill_model(model, plans, drawn, device, dtype, quantized=False, progress=False)  # type: ignore[arg-type]

    return build_base(
        config,
        fill,
        tokenizer=word_tokenizer(config.vocab_size),
        eos_token_ids=frozenset((1,)),
        fingerprint=BaseFingerprint("random", certain=False),
        device=device,
        compute_dtype=dtype,
    )


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What `fill_model` needs of a checkpoint."""

    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    nbytes: int = 0


def adapter_elements(sites: SiteTable, rank: int) -> int:
    """Of one adapter of this rank on all linears of the layers."""
    return sum(_block_elements(sites, rank))


def random_adapters(
    sites: SiteTable, count: int, rank: int, device: torch.device, dtype: torch.dtype, seed: int
) -> Iterator[PackedAdapter]:
    """Adapters of one rank on all linears of the layers; each is drawn on the device when it is asked for."""
    blocks = torch.tensor([0, *_block_elements(sites, rank)]).cumsum(0)
    is_adapted = torch.tensor([not site.is_head for site in sites.sites])
    offsets = torch.where(is_adapted, blocks[:-1], -1)
    ranks = torch.zeros((len(sites.sites), sites.max_slices), dtype=torch.int32)
    for site in sites.sites:
        ranks[site.index, : len(site.slices)] = 0 if site.is_head else rank
    report = AdapterReport("LoRA", "", rank, int((ranks > 0).sum()), {})
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(count):
        data = torch.empty(int(blocks[-1]), dtype=dtype, device=device).normal_(std=ADAPTER_STD, generator=generator)
        yield PackedAdapter(data, offsets, ranks, report, torch.full_like(offsets, -1))


def _block_elements(sites: SiteTable, rank: int) -> Sequence[int]:
    """Elements of each site's block; see `packing.py`."""
    return [
        0 if site.is_head else rank * (len(site.slices) * site.in_features + site.out_features) for site in sites.sites
    ]


def _install(store: DeviceStore, packed: PackedAdapter) -> int:
    slot = store.install(packed)
    assert slot is not None, "the arena was sized for them"
    return slot
