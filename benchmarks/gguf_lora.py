"""Writes a PEFT LoRA adapter as a GGUF file, the form in which llama.cpp takes it.

Layout as in llama.cpp's `convert_lora_to_gguf.py` and its reader `src/llama-adapter.cpp` (in llama-cpp-python 0.3.36):
`general.type` is `adapter`, `adapter.type` is `lora`, and every adapted weight `blk.N.x.weight` has `….lora_a` of shape
(rank, in) and `….lora_b` of shape (out, rank). The scale is alpha / rank, as in PEFT.

llama.cpp turns neighbouring pairs of a head's values by one rotary angle, transformers turns value i of the first half
with value i of the second. So in a GGUF file of the Llama family the rows of q and k are interleaved
(`conversion/llama.py`, `LlamaModel.permute`), and with them the rows of their adapters' B.
"""

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PretrainedConfig

ARCHITECTURE = "llama"
PREFIX = "base_model.model."
# What the writer does not translate; where it is set, the file would say something else than the adapter.
UNWRITTEN = ("use_rslora", "use_dora", "lora_bias", "alpha_pattern", "rank_pattern", "modules_to_save")


def write_gguf_lora(adapter: Path, base: Path, out: Path, data_type: gguf.GGMLQuantizationType) -> None:
    """Write one adapter.

    Args:
        adapter: its directory, as PEFT saves it; plain LoRA on linears of a Llama's layers.
        base: the base model's directory; only its config is read.
        out: the file to write.
        data_type: of A and B in the file: F32, F16 or BF16.

    Raises:
        ValueError: the adapter, or the base, is of another kind.
    """
    peft_config = json.loads((adapter / "adapter_config.json").read_text())
    config = AutoConfig.from_pretrained(base)
    unwritten = [name for name in UNWRITTEN if peft_config.get(name)]
    if peft_config["peft_type"] != "LORA" or unwritten:
        raise ValueError(f"only plain LoRA can be written as GGUF, not {', '.join(unwritten) or 'other formats'}")
    if config.model_type != ARCHITECTURE:
        raise ValueError(f"only adapters of Llama models can be written as GGUF, not of {config.model_type}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(out, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(peft_config["lora_alpha"]))
    for key, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items()):
        module, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        name = names.get_name(module)
        if name is None or part not in ("lora_A", "lora_B"):
            raise ValueError(f"only LoRA on linears of the layers can be written as GGUF, not {key}")
        rows = tensor.float()
        if part == "lora_B":
            rows = in_gguf_order(module, rows, config)
        writer.add_tensor(f"{name}.weight.{part.lower()}", gguf.quantize(rows.numpy(), data_type), raw_dtype=data_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_gguf_order(module: str, rows: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """A weight's rows [out, ...] in the order of a GGUF file: those of q and k interleaved, others as they are."""
    if module.endswith("q_proj"):
        return interleave(rows, config.num_attention_heads)
    if module.endswith("k_proj"):
        return interleave(rows, config.num_key_value_heads)
    return rows


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * d, ...] with each head's halves a0 a1 …, b0 b1 … woven into a0 b0 a1 b1 …."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape).contiguous()
