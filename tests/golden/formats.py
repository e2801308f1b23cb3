"""The adapter formats that PEFT saves: how each is made, and what is left of it without its special part."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Without:
    """What a server that does not know the special part would make of the adapter.

    Attributes:
        tensors: regular expression of the names that it drops.
        config: keys of adapter_config.json that it does not read, with the value that it assumes.
    """

    tensors: str = "$^"
    config: Mapping[str, Any] = field(default_factory=dict)

    def strip(self, directory: Path) -> None:
        """Rewrite an adapter's folder."""
        tensors = load_file(directory / WEIGHTS)
        kept = {name: tensor for name, tensor in tensors.items() if not re.search(self.tensors, name)}
        save_file(kept, directory / WEIGHTS, metadata={"format": "pt"})
        path = directory / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | self.config))


@dataclass(frozen=True)
class Format:
    """One adapter to make.

    Attributes:
        name: of the format and of the adapter.
        config: for PEFT.
        without: see there; None where the format is but another way to write plain LoRA.
        added_tokens: by how many the vocabulary is resized.
        thawed: last names of linears that are not NF4 while the adapter is made, nor for PEFT when it answers with
            whole linears of its own (`modules_to_save`): PEFT cannot train or load these as NF4.
        dtype: of the saved tensors.
        save: arguments of PEFT's save_pretrained.
        respell: rewrites the folder that is served to another spelling of the same, which this PEFT would not read.
        is_low_rank: nothing but low-rank deltas to linears, so that it can be weighted.
    """

    name: str
    config: LoraConfig
    without: Without | None = None
    added_tokens: int = 0
    thawed: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    save: Mapping[str, Any] = field(default_factory=dict)
    respell: Callable[[Path], None] | None = None
    is_low_rank: bool = False

    @property
    def has_token_rows(self) -> bool:
        """Whether single rows of the embedding are its own."""
        return self.config.trainable_token_indices is not None


_ELSEWHERE = frozenset(
    {
        "plain", "rslora", "one-linear", "dora", "lora-bias", "whole-head", "whole-embedding", "whole-norms", "whole-q",
        "lora-embedding", "lora-embedding-tied", "lora-head", "tokens", "added-tokens",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Names:
    """What a family calls its linears."""

    q: str = "q_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    up: str = "up_proj"
    down: str = "down_proj"


def names_of(family: str) -> Names:
    """Phi-3's are fused."""
    return Names(q="qkv_proj", v="o_proj", up="gate_up_proj") if family == "phi3" else Names()


def formats(family: str) -> list[Format]:
    """Every format for Qwen2 (biases, an untied head); of the other families, those that they change something about.

    Llama's head is tied. Gemma has other norms, caps its logits and (Gemma 3) scales its embeddings; Phi-3's linears
    are fused.
    """
    n = names_of(family)
    tied = family in ("llama", "gemma2", "gemma3")
    found = [*_low_rank(n), *_rescaled(n), *_whole_modules(n), *_vocabulary(n, tied=tied)]
    if family == "qwen2":
        return [*found, *_inits(n), *_spellings(n), *_biases(n)]
    return found if family == "llama" else [made for made in found if made.name in _ELSEWHERE]


def _lora(rank: int = 4, **settings: Any) -> LoraConfig:
    return LoraConfig(r=rank, **({"lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False} | settings))


def _low_rank(n: Names) -> list[Format]:
    every_q = rf"model\.layers\.\d+\.self_attn\.{n.q}"
    adalora = AdaLoraConfig(
        init_r=6, target_r=4, lora_alpha=12, target_modules=[n.q, n.down], total_step=10, task_type="CAUSAL_LM"
    )
    patterned = _lora(
        target_modules=[n.q, n.up, n.down], layers_to_transform=[0, 2],
        rank_pattern={n.q: 9, rf"layers\.2\..*{n.down}": 3}, alpha_pattern={n.down: 2, n.q: 9},
    )  # fmt: skip
    return [
        Format("plain", _lora(8, target_modules="all-linear"), is_low_rank=True),
        Format(
            "rslora", _lora(5, use_rslora=True, target_modules=[n.q, n.v]), Without(config={"use_rslora": False}),
            is_low_rank=True,
        ),
        Format("patterns", patterned, Without(config={"alpha_pattern": {}}), is_low_rank=True),
        Format("one-linear", _lora(1, lora_alpha=3, target_modules=[n.up]), is_low_rank=True),
        Format("adalora", adalora, Without("lora_E"), is_low_rank=True),
        Format("regex", _lora(target_modules=rf"({every_q}|.*\.mlp\.{n.down})"), is_low_rank=True),
        Format(
            "exclude", _lora(target_modules=[n.q, n.o, n.down], exclude_modules=r".*layers\.1\..*"), is_low_rank=True
        ),
    ]  # fmt: skip


def _inits(n: Names) -> list[Format]:
    """Other starts than PEFT's own; PiSSA's is converted when it is saved."""
    return [
        Format("gaussian", _lora(3, init_lora_weights="gaussian", target_modules=[n.o, n.up]), is_low_rank=True),
        Format(
            "eva", _lora(6, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0), target_modules=[n.q, n.down]),
            is_low_rank=True,
        ),
        Format(
            "pissa", _lora(init_lora_weights="pissa", target_modules=[n.q, n.down]), thawed=(n.q, n.down),
            is_low_rank=True,
        ),
    ]  # fmt: skip


def _rescaled(n: Names) -> list[Format]:
    plain = Without("lora_magnitude_vector", {"use_dora": False})
    return [
        Format("dora", _lora(use_dora=True, target_modules=[n.q, n.v, n.o, n.down]), plain),
        Format("dora-rslora", _lora(7, use_dora=True, use_rslora=True, target_modules="all-linear"), plain),
        Format(
            "lora-bias", _lora(lora_bias=True, target_modules=[n.q, n.down]),
            Without(r"lora_B\.bias", {"lora_bias": False}),
        ),
    ]  # fmt: skip


def _biases(n: Names) -> list[Format]:
    none = Without(r"\.bias$", {"bias": "none"})
    return [
        Format("bias-all", _lora(bias="all", target_modules=[n.q, n.down]), none),
        Format("bias-lora-only", _lora(bias="lora_only", target_modules=[n.v, n.down]), none),
        Format("dora-bias-all", _lora(bias="all", use_dora=True, target_modules=[n.q]), none),
    ]


def _whole_modules(n: Names) -> list[Format]:
    def whole(name: str, *modules: str, thawed: tuple[str, ...] = (), targets: tuple[str, ...] = (n.q,)) -> Format:
        config = _lora(target_modules=list(targets), modules_to_save=list(modules))
        dropped = Without("|".join(rf"{module}\." for module in modules), {"modules_to_save": None})
        return Format(name, config, dropped, thawed=thawed)

    return [
        whole("whole-head", "lm_head"),
        whole("whole-embedding", "embed_tokens"),
        whole("whole-embedding-and-head", "embed_tokens", "lm_head"),
        whole("whole-norms", "input_layernorm", "model.norm"),
        whole("whole-down", n.down, thawed=(n.down,)),
        whole("whole-q", n.q, thawed=(n.q,), targets=(n.o,)),
    ]


def _vocabulary(n: Names, *, tied: bool) -> list[Format]:
    no_tokens = Without("token_adapter", {"trainable_token_indices": None})
    no_head = Without(r"lm_head\.", {"target_modules": [n.q]})
    no_embedding = Without(r"embed_tokens\.", {"target_modules": [n.q]})
    found = [
        Format("lora-embedding", _lora(target_modules=[n.q, "embed_tokens"]), no_embedding),
        Format(
            "lora-embedding-alone", _lora(5, target_modules=[n.q, "embed_tokens"]), no_embedding,
            save={"save_embedding_layers": False},
        ),
        Format("lora-head", _lora(target_modules=[n.q, "lm_head"]), no_head, is_low_rank=True),
        Format("tokens", _lora(target_modules=[n.q], trainable_token_indices=[3, 5, 100, 198]), no_tokens),
        Format("added-tokens", _lora(target_modules=[n.q]), added_tokens=5),
        Format(
            "added-tokens-whole", _lora(target_modules=[n.q], modules_to_save=["embed_tokens", "lm_head"]),
            added_tokens=3,
        ),
    ]  # fmt: skip
    if tied:
        config = _lora(target_modules=[n.q, "embed_tokens"], ensure_weight_tying=True)
        return [*found, Format("lora-embedding-tied", config, no_head, save={"save_embedding_layers": False})]
    indices = {"embed_tokens": [4, 7], "lm_head": [7, 9, 150]}
    by_module = _lora(target_modules=[n.q], trainable_token_indices=indices)
    return [*found, Format("tokens-by-module", by_module, no_tokens)]


def _spellings(n: Names) -> list[Format]:
    def plain(name: str, **settings: Any) -> Format:
        return Format(name, _lora(target_modules=[n.q, n.down]), is_low_rank=True, **settings)

    return [
        plain("fp16", dtype=torch.float16),
        plain("bf16", dtype=torch.bfloat16),
        plain("without-prefix", respell=_renamed(lambda name: name.removeprefix("base_model.model."))),
        plain("with-adapter-name", respell=_renamed(lambda name: re.sub(r"(lora_[AB])\.", r"\1.default.", name))),
        plain("sharded", respell=_sharded),
    ]


def _renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    def respell(directory: Path) -> None:
        tensors = {rename(name): tensor for name, tensor in load_file(directory / WEIGHTS).items()}
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})

    return respell


def _sharded(directory: Path) -> None:
    """Three files and an index, as transformers splits and names them (`PreTrainedModel.save_pretrained`)."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    shards: list[dict[str, Tensor]] = [{}, {}, {}]
    for number, (name, tensor) in enumerate(tensors.items()):
        shards[number % 3][name] = tensor
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"adapter_model-{number:05}-of-00003.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)
