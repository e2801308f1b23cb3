"""Random Llama checkpoints of any size, in 16 bit or already in NF4, sharded as a hub's are. No network needed."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WEIGHT_STD = 0.02


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


def write_random_llama(
    folder: Path, config: LlamaConfig, *, shard_bytes: int, nf4: bool, device: str, seed: int
) -> int:
    """Write config, tokenizer and shards.

    Args:
        folder: made if missing.
        config: shapes.
        shard_bytes: a shard is closed once it holds that much.
        nf4: quantize the decoder's linears with double quantization, as bitsandbytes saves them.
        device: where weights are drawn and quantized.
        seed: of the weights.

    Returns:
        Bytes of the largest shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    if nf4:
        config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ).to_dict()
    config.save_pretrained(folder)
    _write_tokenizer(folder, config.vocab_size)

    shards: list[dict[str, Tensor]] = [{}]
    where: dict[str, str] = {}
    largest = 0
    for name, tensor in _tensors(config, nf4, device, seed):
        shards[-1][name] = tensor
        held = sum(t.nbytes for t in shards[-1].values())
        if held >= shard_bytes:
            largest = max(largest, _close_shard(folder, shards, where))
    if shards[-1]:
        largest = max(largest, _close_shard(folder, shards, where))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return largest


def _tensors(config: LlamaConfig, nf4: bool, device: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Names as transformers has them; one tensor at a time is in memory."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator(device).manual_seed(seed)
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    for name, shape in [(n, p.shape) for n, p in model.named_parameters()]:
        if len(shape) == 1:  # norms
            yield name, torch.ones(shape, dtype=torch.bfloat16)
            continue
        weight = torch.randn(shape, generator=generator, device=device).mul_(WEIGHT_STD).bfloat16()
        if not nf4 or name not in linears:
            yield name, weight.cpu()
            continue
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        yield name, packed.cpu()
        for suffix, value in state.as_dict(packed=True).items():
            yield f"{name}.{suffix}", value.cpu().contiguous()


def _close_shard(folder: Path, shards: list[dict[str, Tensor]], where: dict[str, str]) -> int:
    """Write the last shard and start another; returns its bytes."""
    path = folder / f"model-{len(shards):05d}.safetensors"
    # State dictionaries share their lookup tables; safetensors wants storage of its own for every tensor.
    save_file({n: t.clone() for n, t in shards[-1].items()}, path, metadata={"format": "pt"})
    where.update(dict.fromkeys(shards[-1], path.name))
    shards[-1].clear()
    shards.append({})
    return path.stat().st_size


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """One word for each id; nothing here is meant to be read."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
