"""A tiny Llama, its site table written by hand, and adapters made and saved by PEFT itself."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lorikeet.adapters.checkpoint import load_checkpoint
from lorikeet.adapters.core import Prover
from lorikeet.adapters.fingerprint import BaseFingerprint
from lorikeet.adapters.manager import AdapterManager
from lorikeet.adapters.modules import ModuleTable
from lorikeet.adapters.packing import PackedAdapter, pack_adapter
from lorikeet.adapters.sites import Site, SiteTable, Slice
from lorikeet.adapters.state.state_dir import StateDir, open_state_dir
from lorikeet.adapters.tensor_plan import TensorPlanner
from lorikeet.adapters.watcher import AdapterWatcher
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .managing import wait_until
from .tiny_base import DenseWeights, describe_modules

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 32, 48, 3, 4, 2
HEAD_DIM = HIDDEN // HEADS
VOCAB = 64

Deltas = dict[str, Tensor]


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB,
    )
    return LlamaForCausalLM(config).eval()


def make_site_table(layers: int = LAYERS, hidden: int = HIDDEN) -> SiteTable:
    sites: list[Site] = []

    def add(layer: int, parent: str, stacked: str, in_features: int, **slices: int) -> None:
        prefix = f"model.layers.{layer}.{parent}"
        pieces = tuple(Slice(f"{prefix}.{name}", width) for name, width in slices.items())
        sites.append(Site(len(sites), f"{prefix}.{stacked}", layer, in_features, pieces))

    for layer in range(layers):
        kv = KV_HEADS * HEAD_DIM
        add(layer, "self_attn", "qkv_proj", hidden, q_proj=HEADS * HEAD_DIM, k_proj=kv, v_proj=kv)
        add(layer, "self_attn", "o_proj", hidden, o_proj=hidden)
        add(layer, "mlp", "gate_up_proj", hidden, gate_proj=INNER, up_proj=INNER)
        add(layer, "mlp", "down_proj", INNER, down_proj=hidden)
    sites.append(Site(len(sites), "lm_head", -1, hidden, (Slice("lm_head", VOCAB),), is_head=True))
    return SiteTable(sites)


@pytest.fixture(scope="session")
def sites() -> SiteTable:
    return make_site_table()


@pytest.fixture(scope="session")
def modules(tiny_llama: LlamaForCausalLM) -> ModuleTable:
    return describe_modules(tiny_llama)


@pytest.fixture(scope="session")
def weights(tiny_llama: LlamaForCausalLM) -> DenseWeights:
    return DenseWeights(tiny_llama)


@pytest.fixture(scope="session")
def base() -> BaseFingerprint:
    return BaseFingerprint("tiny-llama")


@pytest.fixture(scope="session")
def pack(
    sites: SiteTable, modules: ModuleTable, weights: DenseWeights, base: BaseFingerprint
) -> Callable[..., PackedAdapter]:
    """pack(directory, dtype=float32, **kwargs): an adapter directory, read and packed; all with one planner."""
    planner = TensorPlanner(sites, modules, base)

    def load_and_pack(directory: Path, dtype: torch.dtype = torch.float32, **kwargs: bool) -> PackedAdapter:
        checkpoint = load_checkpoint(directory, planner)
        return pack_adapter(checkpoint, weights, dtype=dtype, pin_memory=False, **kwargs)

    return load_and_pack


@pytest.fixture(scope="session")
def save_adapter(tiny_llama: LlamaForCausalLM, peft_deltas: Callable[[Path], Deltas]) -> Callable[..., Deltas]:
    """save_adapter(config, directory, seed=0, dtype=float32): an adapter with random weights, saved by PEFT.

    Returns the deltas that PEFT computes after loading it again: module path -> [out_features, in_features].
    """

    def save(
        config: LoraConfig,
        directory: Path,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        change: Callable[[PeftModel], None] | None = None,
    ) -> Deltas:
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(tiny_llama), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape).to(dtype) * 0.1)
        if change is not None:
            change(model)
        model.save_pretrained(str(directory))
        if dtype is not torch.float32:
            path = directory / "adapter_model.safetensors"
            save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
        return peft_deltas(directory)

    return save


@pytest.fixture(scope="session")
def save_adapter_only(tiny_llama: LlamaForCausalLM) -> Callable[..., None]:
    """save_adapter_only(config, directory, std=0.1): whatever PEFT trains is changed at random, and saved."""

    def save(config: PeftConfig, directory: Path, std: float = 0.1) -> None:
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(tiny_llama), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * std)
        model.save_pretrained(str(directory))

    return save


@pytest.fixture(scope="session")
def peft_deltas(tiny_llama: LlamaForCausalLM) -> Callable[[Path], Deltas]:
    """peft_deltas(directory): what PEFT adds to each weight when it loads an adapter directory, in float32."""

    def deltas(directory: Path) -> Deltas:
        loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(directory)).float()
        with torch.no_grad():
            return {
                name.removeprefix("base_model.model."): module.get_delta_weight("default").float()
                for name, module in loaded.named_modules()
                if isinstance(module, LoraLayer)
            }

    return deltas


@pytest.fixture(scope="session")
def unpack(sites: SiteTable) -> Callable[..., Deltas]:
    """unpack(packed, start=0, data=None): the deltas B @ A as they lie in an arena."""

    def deltas(packed: PackedAdapter, data: Tensor | None = None, start: int = 0) -> Deltas:
        arena = packed.data if data is None else data
        result: Deltas = {}
        for site in sites.sites:
            offset = int(packed.site_offsets[site.index])
            if offset < 0:
                continue
            ranks = packed.site_ranks[site.index].tolist()
            width = site.in_features
            a_at = start + offset
            b_at = a_at + sum(ranks) * width
            for rank, piece in zip(ranks, site.slices, strict=False):
                if rank:
                    a = arena[a_at : a_at + rank * width].view(rank, width).float()
                    b_t = arena[b_at : b_at + rank * piece.out_features].view(rank, piece.out_features).float()
                    result[piece.module] = b_t.t() @ a
                a_at += rank * width
                b_at += rank * piece.out_features
        return result

    return deltas


@pytest.fixture(scope="session")
def plain_adapter(tmp_path_factory: pytest.TempPathFactory, save_adapter: Callable[..., Deltas]) -> Path:
    """A plain adapter on q_proj and down_proj, made once."""
    directory = tmp_path_factory.mktemp("plain")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    save_adapter(config, directory)
    return directory


@pytest.fixture
def lora_dir(tmp_path: Path, plain_adapter: Path) -> Path:
    """A copy of the plain adapter at tmp_path/adapters/plain, to be spoiled by tests."""
    return Path(shutil.copytree(plain_adapter, tmp_path / "adapters" / "plain"))


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """edit_config(directory, key=value, ...): change keys of adapter_config.json."""

    def edit(directory: Path, **changes: object) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.fixture
def edit_tensors() -> Callable[..., None]:
    """edit_tensors(directory, change): change(tensors) edits the dict of tensors in place."""

    def edit(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    return edit


@pytest.fixture
def clone_adapter(lora_dir: Path, edit_tensors: Callable[..., None]) -> Callable[..., Path]:
    """clone_adapter(name, factor=1.0): a copy of lora_dir beside it, its weights multiplied."""

    def clone(name: str, factor: float = 1.0) -> Path:
        target = lora_dir.parent / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(lora_dir, target)

        def scale(tensors: dict[str, Tensor]) -> None:
            for tensor in tensors.values():
                tensor *= factor

        edit_tensors(target, scale)
        return target

    return clone


@pytest.fixture
def make_manager(
    tmp_path: Path, sites: SiteTable, modules: ModuleTable, weights: DenseWeights, base: BaseFingerprint
) -> Iterator[Callable[..., AdapterManager]]:
    """make_manager(**overrides): a started manager on the CPU; closed at the end of the test."""
    opened: list[AdapterManager | StateDir] = []

    def make(**overrides: object) -> AdapterManager:
        if "state" not in overrides:
            overrides["state"] = open_state_dir(None, tmp_path / "state", 2**24)
            opened.append(overrides["state"])
        arguments: dict[str, object] = {
            "dtype": torch.float32,
            "device": torch.device("cpu"),
            "device_budget_bytes": 2**20,
            "host_budget_bytes": 2**20,
            "roots": [tmp_path / "adapters"],
            "max_slots": 8,
            "drain_deadline_s": 60.0,
        }
        (tmp_path / "adapters").mkdir(exist_ok=True)
        manager = AdapterManager(sites, modules, weights, base, **(arguments | overrides))  # type: ignore[arg-type]
        opened.append(manager)
        manager.start()
        return manager

    yield make
    for thing in reversed(opened):
        thing.close()


@pytest.fixture
def boot(make_manager: Callable[..., AdapterManager], tmp_path: Path) -> Iterator[Any]:
    """boot(**overrides): start a server's adapters as the server does, after ending those that ran before.

    boot.stop() only ends them.
    """
    running: list[Any] = []

    def stop() -> None:
        while running:
            running.pop().close()

    def start(store_bytes: int = 2**24, prover: Prover | None = None, **overrides: Any) -> AdapterManager:
        stop()
        roots = overrides.setdefault("roots", [tmp_path / "adapters"])
        running.append(open_state_dir(tmp_path / "durable", tmp_path / "scratch", store_bytes))
        manager = make_manager(state=running[0], **overrides)
        running.append(manager)
        if prover is not None:
            manager.prover = prover
        manager.restore()
        watcher = AdapterWatcher(manager, roots, settle_s=0.01)
        wait_until(lambda: not watcher.scan(), "the folders to settle")
        watcher.start()
        running.append(watcher)
        manager.finish_restore()
        return manager

    start.stop = stop  # type: ignore[attr-defined]
    yield start
    stop()
