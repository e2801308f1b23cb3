"""What every side of a comparison runs: prompts, adapters and stream counts, all from one seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

# Small enough that greedy text stays text, large enough that every adapter changes it.
LORA_B_STD = 0.005

Adapter = TypeVar("Adapter")


@dataclass(frozen=True, slots=True)
class Workload:
    """One stream count of a comparison.

    Attributes:
        streams: requests that run at the same time.
        prompt_tokens: length of each prompt.
        new_tokens: tokens generated for each; end-of-sequence is ignored.
    """

    streams: int
    prompt_tokens: int
    new_tokens: int

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Seeded random token ids, a different prompt for each stream, so that no prefix cache can help.

        Only the middle of the vocabulary is drawn from: special tokens lie at one of its ends.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (self.streams, self.prompt_tokens)
        prompts: list[list[int]] = torch.randint(vocab_size // 4, vocab_size // 2, shape, generator=generator).tolist()
        return prompts


@dataclass(frozen=True, slots=True)
class Size:
    """How much a comparison runs.

    Attributes:
        streams: stream counts, one after the other.
        prompt: tokens in each prompt.
        tokens: to generate for each.
        adapters: of each kind.
        rounds: times that every side runs.
    """

    streams: Sequence[int]
    prompt: int
    tokens: int
    adapters: int
    rounds: int


def in_turn(adapters: Sequence[Adapter], streams: int) -> list[Adapter]:
    """The adapter of each stream: 0, 1, 2, ... and from the first again."""
    return [adapters[stream % len(adapters)] for stream in range(streams)]


def write_random_adapters(
    base: Path, folder: Path, *, count: int, rank: int, seed: int, b_std: float = LORA_B_STD
) -> list[str]:
    """Write `count` random LoRA adapters over all linears of a base, as PEFT saves them: one subfolder each.

    Args:
        base: the base model's directory; only its config is read.
        folder: made if missing.
        count: number of adapters.
        rank: of every module.
        seed: of the weights.
        b_std: standard deviation of B, by which strong adapters differ from weak ones.

    Returns:
        The subfolders' names, which are the adapter ids.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    generator = torch.Generator().manual_seed(seed)
    names = [f"random-{i}" for i in range(count)]
    for name in names:
        tensors: dict[str, torch.Tensor] = {}
        for module, linear in linears.items():
            a = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
            b = torch.randn(linear.out_features, rank, generator=generator) * b_std
            tensors[f"base_model.model.{module}.lora_A.weight"] = a.bfloat16()
            tensors[f"base_model.model.{module}.lora_B.weight"] = b.bfloat16()
        directory = folder / name
        directory.mkdir(parents=True, exist_ok=True)
        modules = sorted({n.rpartition(".")[2] for n in linears})
        # Written without PEFT, which may be one of the peers that are not installed; the rest is as it defaults to.
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "base_model_name_or_path": str(base),
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": 0.0,
            "target_modules": modules,
            "bias": "none",
        }
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return names
