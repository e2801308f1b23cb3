"""Small random models of every proven family, saved as 16-bit checkpoints, and their oracle."""

from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from ..devices import CPU

VOCAB = 199  # odd on purpose
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def family_config(family: str) -> PretrainedConfig:
    """A small config that switches on what is special about the family."""
    match family:
        case "llama":
            return LlamaConfig(**COMMON, tie_word_embeddings=True, rope_parameters={
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            })  # fmt: skip
        case "mistral":
            return MistralConfig(**COMMON, sliding_window=11)
        case "qwen2":
            return Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=9, max_window_layers=1)
        case "qwen3":
            return Qwen3Config(**COMMON, head_dim=48)
        case "gemma2":
            return Gemma2Config(
                **COMMON, head_dim=48, sliding_window=8, query_pre_attn_scalar=40,
                attn_logit_softcapping=5.0, final_logit_softcapping=7.0,
            )  # fmt: skip
        case "gemma3":
            return Gemma3TextConfig(
                **COMMON, head_dim=32, sliding_window=8, query_pre_attn_scalar=24, layer_types=[
                    "sliding_attention", "sliding_attention", "full_attention"
                ],
            )  # fmt: skip
        case "phi3":
            return Phi3Config(**COMMON, sliding_window=13)
    raise ValueError(family)


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


def save_tokenizer(directory: Path, vocab_size: int = VOCAB) -> None:
    """A word-level tokenizer: enough for loading."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>").save_pretrained(directory)


def save_family(family: str, directory: Path, seed: int = 0, max_shard_size: str = "300KB") -> nn.Module:
    """Save a seeded bf16 model of a family and return it."""
    return save_model(family_config(family), directory, seed, max_shard_size)


def save_model(config: PretrainedConfig, directory: Path, seed: int = 0, max_shard_size: str = "300KB") -> nn.Module:
    """Save a seeded bf16 model and return it. Weights are scaled up so that every projection matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    save_tokenizer(directory)
    return model


def oracle(directory: Path, device: torch.device = CPU) -> nn.Module:
    """transformers' own model in fp32 with eager attention, its decoder linears replaced by bitsandbytes' NF4 values.

    Quantized on that device by bitsandbytes with double quantization from the stored bf16 tensors, part by part, and
    dequantized by bitsandbytes from its nested state: none of Lorikeet's code is involved.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").to(device)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            stored = module.weight.data.bfloat16()
            packed, state = bnb.quantize_4bit(stored, quant_type="nf4", compress_statistics=True)
            state.dtype = torch.float32
            module.weight = nn.Parameter(bnb.dequantize_4bit(packed, state), requires_grad=False)
    return model.eval()
