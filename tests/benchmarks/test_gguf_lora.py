"""Adapters as GGUF files: what llama.cpp's reader expects, and nothing silently left out."""

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from .scripts import BENCHMARKS

gguf = pytest.importorskip("gguf")
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("gguf_lora", "workload")})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def adapter(bench, tiny_model, tmp_path):
    (name,) = bench.workload.write_random_adapters(tiny_model, tmp_path, count=1, rank=6, seed=11)
    return tmp_path / name


@pytest.fixture
def written(bench, adapter, tiny_model, tmp_path):
    out = tmp_path / "adapter.gguf"
    bench.gguf_lora.write_gguf_lora(adapter, tiny_model, out, gguf.GGMLQuantizationType.F32)
    return gguf.GGUFReader(out)


def test_the_file_says_what_llama_cpp_asks_for(written):
    said = {name: field.contents() for name, field in written.fields.items()}
    assert said["general.type"] == "adapter"
    assert said["general.architecture"] == "llama"
    assert said["adapter.type"] == "lora"
    assert said["adapter.lora.alpha"] == 12.0


def test_every_linear_of_every_layer_has_both_factors_in_llama_cpps_shape(written):
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in written.tensors}
    assert set(shapes) == {
        f"blk.{layer}.{name}.weight.lora_{part}" for layer in (0, 1) for name in LINEARS.values() for part in "ab"
    }
    # ggml names the innermost dimension first.
    assert shapes["blk.0.attn_k.weight.lora_a"] == (128, 6)
    assert shapes["blk.0.attn_k.weight.lora_b"] == (6, 64)
    assert shapes["blk.1.ffn_down.weight.lora_a"] == (192, 6)


def test_values_are_the_adapters_and_only_rows_of_q_and_k_move(written, adapter, tiny_model):
    config = AutoConfig.from_pretrained(tiny_model)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    of_file = {tensor.name: np.array(tensor.data) for tensor in written.tensors}
    for key, expected in load_file(adapter / "adapter_model.safetensors").items():
        _, _, layer, *module, part, _ = key.removeprefix("base_model.model.").rsplit(".")
        name = LINEARS[".".join(module)]
        found = torch.from_numpy(of_file[f"blk.{layer}.{name}.weight.{part.lower()}"])
        if part == "lora_B" and name in heads:
            # Back to halves: even rows of a head are its first half, odd rows its second.
            by_head = found.unflatten(0, (heads[name], -1))
            assert not torch.equal(found, expected.float())
            found = torch.cat([by_head[:, 0::2], by_head[:, 1::2]], dim=1).flatten(0, 1)
        assert torch.equal(found, expected.float()), key


def test_interleaving_keeps_rotary_pairs_together(bench):
    rows = torch.arange(2 * 6).reshape(-1, 1)
    assert bench.gguf_lora.interleave(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_half_precision_is_written_as_such(bench, adapter, tiny_model, tmp_path):
    out = tmp_path / "half.gguf"
    bench.gguf_lora.write_gguf_lora(adapter, tiny_model, out, gguf.GGMLQuantizationType.F16)
    (tensor,) = [t for t in gguf.GGUFReader(out).tensors if t.name == "blk.1.ffn_up.weight.lora_a"]
    expected = load_file(adapter / "adapter_model.safetensors")[
        "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    ]
    assert tensor.tensor_type == gguf.GGMLQuantizationType.F16
    assert np.array_equal(tensor.data, expected.half().numpy())


@pytest.mark.parametrize(
    "change",
    [{"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"q_proj": 1}}, {"peft_type": "LOHA"}],
    ids=str,
)
def test_what_the_file_could_not_say_is_refused(bench, adapter, tiny_model, tmp_path, change):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="only plain LoRA"):
        bench.gguf_lora.write_gguf_lora(adapter, tiny_model, tmp_path / "x.gguf", gguf.GGMLQuantizationType.F32)
