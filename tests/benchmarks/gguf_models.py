"""Writes a tiny Llama as a GGUF file in float32, without a vocabulary: what comes in and goes out are token ids."""

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file


def save_gguf_model(model: Path, out: Path) -> None:
    """Write a model directory's Llama as `out`, every weight as it is."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for key, weight in load_file(model / "model.safetensors").items():
        module = key.removesuffix(".weight")
        rows = weight.float()
        if count := heads.get(module.rpartition(".")[2]):
            rows = _pairs_adjacent(rows, count)
        writer.add_tensor(f"{names.get_name(module)}.weight", rows.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pairs_adjacent(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Row 2i is row i of a head's first half, row 2i + 1 that of its second: told one by one, unlike the benchmark."""
    size = len(rows) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order].contiguous()
