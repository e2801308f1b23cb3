"""Random adapters of every served format, made and saved by PEFT itself, alike but for the format."""

from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from workload import LORA_B_STD

PLAIN, DOUBLE = "LoRA", "LoRA of twice the rank"
TRAINED_TOKENS = 64
# Around one: what was trained is near what it started from.
FACTOR_STD = 0.05


def format_configs(model: nn.Module, rank: int) -> dict[str, LoraConfig]:
    """Format -> its PEFT config: all linears of the decoder at one rank, and what is special about the format.

    PLAIN comes first, then rsLoRA, which differs from it in nothing that takes time: it shows what the machine's noise
    does. The vocabulary's matrices are adapted by the formats that are about them only.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding = names[model.get_input_embeddings()].rpartition(".")[2]
    head = names[model.get_output_embeddings()].rpartition(".")[2]
    linears = sorted({n.rpartition(".")[2] for m, n in names.items() if isinstance(m, nn.Linear) and ".layers." in n})
    vocab_size = model.get_input_embeddings().num_embeddings
    tokens = list(range(0, vocab_size, max(1, vocab_size // TRAINED_TOKENS)))[:TRAINED_TOKENS]

    def lora(r: int = rank, *, others: tuple[str, ...] = (), **special: object) -> LoraConfig:
        return LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules=[*linears, *others], **special)

    return {
        PLAIN: lora(),
        "rsLoRA": LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=round(2 * rank**0.5), target_modules=linears, use_rslora=True
        ),
        "DoRA": lora(use_dora=True),
        "lora_bias": lora(lora_bias=True),
        "head and embedding": lora(others=(head, embedding)),
        "modules_to_save head": lora(modules_to_save=[head]),
        "trained tokens": lora(trainable_token_indices={embedding: tokens}),
        "AdaLoRA": AdaLoraConfig(
            task_type="CAUSAL_LM",
            init_r=rank,
            target_r=rank,
            lora_alpha=2 * rank,
            total_step=1,
            target_modules=linears,
        ),
        DOUBLE: lora(2 * rank),
    }


def write_format_adapters(base: Path, folder: Path, *, count: int, rank: int, seed: int) -> dict[str, list[str]]:
    """Write `count` adapters of each format, one subfolder each.

    Args:
        base: the base model's directory, in 16 bit: DoRA, saved heads and tokens begin with its weights.
        folder: made if missing.
        count: of each format.
        rank: of every module, but for DOUBLE.
        seed: of the weights.

    Returns:
        Format -> the subfolders' names, which are the adapter ids.
    """
    torch.manual_seed(seed)
    ids: dict[str, list[str]] = {}
    for name in format_configs(_load(base), rank):
        model = _load(base)
        adapted = get_peft_model(model, format_configs(model, rank)[name])
        ids[name] = [f"{name.lower().replace(' ', '-')}-{i}" for i in range(count)]
        begin = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
        for adapter_id in ids[name]:
            _draw(adapted, begin)
            adapted.save_pretrained(folder / adapter_id)
    return ids


def _load(base: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return model


@torch.no_grad()
def _draw(adapted: PeftModel, begin: dict[str, torch.Tensor]) -> None:
    """Weights as if trained a little: what starts from the base stays near it, what starts at zero is small."""
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn_like(parameter)
        if any(part in name for part in ("magnitude", "modules_to_save", "trainable_tokens")):
            parameter.copy_(begin[name] * (1 + FACTOR_STD * noise))
        elif "lora_E" in name:
            parameter.fill_(1.0)
        elif "lora_A" in name or "lora_embedding_A" in name:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(noise * LORA_B_STD)
