"""Random 16-bit Llama checkpoints of any size, sharded as a hub's are. No network needed."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WEIGHT_STD = 0.02


def llama_half_billion() -> LlamaConfig:
    """About 0.5 billion parameters: large enough that a loader's own objects do not count."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def write_random_llama(folder: Path, config: LlamaConfig, *, shard_bytes: int, seed: int) -> int:
    """Write config, tokenizer and shards.

    Args:
        folder: made if missing.
        config: shapes.
        shard_bytes: a shard is closed once it holds that much.
        seed: of the weights.

    Returns:
        Bytes of the largest shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: list[dict[str, Tensor]] = [{}]
    where: dict[str, str] = {}
    largest = 0
    for name, tensor in random_parameters(model, "cpu", seed):
        shards[-1][name] = tensor
        held = sum(t.nbytes for t in shards[-1].values())
        if held >= shard_bytes:
            largest = max(largest, _close_shard(folder, shards, where))
    if shards[-1]:
        largest = max(largest, _close_shard(folder, shards, where))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return largest


def random_parameters(model: nn.Module, device: torch.device | str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """A bfloat16 value for every parameter of a model on the meta device; one tensor at a time is in memory."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in [(n, p.shape) for n, p in model.named_parameters()]:
        if len(shape) == 1:  # norms
            yield name, torch.ones(shape, dtype=torch.bfloat16, device=device)
        else:
            yield name, torch.randn(shape, generator=generator, device=device).mul_(WEIGHT_STD).bfloat16()


def _close_shard(folder: Path, shards: list[dict[str, Tensor]], where: dict[str, str]) -> int:
    """Write the last shard and start another; returns its bytes."""
    path = folder / f"model-{len(shards):05d}.safetensors"
    save_file(shards[-1], path, metadata={"format": "pt"})
    where.update(dict.fromkeys(shards[-1], path.name))
    shards[-1].clear()
    shards.append({})
    return path.stat().st_size


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word for each id; nothing here is meant to be read."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")
