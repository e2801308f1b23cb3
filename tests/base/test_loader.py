"""16-bit and pre-quantized checkpoints give bitsandbytes' own values; what can't be served is refused by name."""

import json
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from lorikeet.kernels.nf4 import nf4_linear, nf4_linear_reference, prepare_for_device
from lorikeet.kernels.nf4_quantize import quantize_nf4
from lorikeet.kernels.nf4_weight import NF4Weight
from lorikeet.server.base.linears import NF4Linear, StackedLinear
from lorikeet.server.base.loader import empty_model, load_base
from lorikeet.server.base.model import BaseModel
from lorikeet.server.errors import BaseModelError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from .family_models import FAMILIES, family_config, oracle, save_family

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bf16, in several shards."""
    directory = tmp_path_factory.mktemp("llama")
    save_family("llama", directory, max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


def load(directory: Path, **kwargs: object) -> BaseModel:
    return load_base(str(directory), device=CPU, compute_dtype=torch.float32, progress=False, **kwargs)  # type: ignore[arg-type]


def copy_of(directory: Path, to: Path) -> Path:
    shutil.copytree(directory, to, dirs_exist_ok=True)
    return to


def edit_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def stacked_values(base: BaseModel) -> dict[str, torch.Tensor]:
    """Dequantized rows of every original linear, sliced out of its stack."""
    values = {}
    for site in base.site_table.sites[:-1]:  # the last is the head
        linear = base.site_module(site)
        assert isinstance(linear, NF4Linear)
        parts = torch.split(linear.nf4.dequantize(torch.float32), [s.out_features for s in site.slices])
        values |= {s.module: part for s, part in zip(site.slices, parts, strict=True)}
    return values


def test_stacked_weights_dequantize_to_bitsandbytes_values_bit_for_bit(checkpoint: Path) -> None:
    expected = {n: m.weight for n, m in oracle(checkpoint).named_modules() if isinstance(m, nn.Linear)}
    values = stacked_values(load(checkpoint))
    assert len(values) == 3 * 7
    for name, value in values.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_model_has_shapes_and_computed_buffers_of_a_real_one(family: str) -> None:
    config = family_config(family)
    got, want = empty_model(config, torch.bfloat16), AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    def shapes(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (p.shape, p.dtype) for name, p in model.named_parameters()}

    assert shapes(got) == shapes(want)
    assert all(p.is_meta for p in got.parameters() if p.dim() > 1)
    buffers, real = dict(got.named_buffers()), dict(want.named_buffers())
    assert buffers.keys() == real.keys() and buffers
    for name, buffer in buffers.items():
        assert torch.equal(buffer, real[name]) and buffer.dtype is real[name].dtype, name


def test_qkv_and_gate_up_run_as_one_matmul_each(checkpoint: Path) -> None:
    base = load(checkpoint)
    names = [s.name.rpartition(".")[2] for s in base.site_table.sites]
    assert names[:4] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    calls: list[str] = []
    for module in base.model.modules():
        if isinstance(module, StackedLinear):
            module.linear.register_forward_hook(lambda *_: calls.append("stack"))
    base.model.config._attn_implementation = "eager"
    base.logits(torch.randint(3, 99, (1, 5)), torch.arange(5)[None])
    assert len(calls) == 2 * base.num_layers


def test_prequantized_checkpoint_is_taken_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    """As transformers saves a bitsandbytes NF4 model: codes, nested constants and all."""
    tensors = {k: v for f in checkpoint.glob("*.safetensors") for k, v in load_file(f).items()}
    saved = {}
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            packed, state = bnb.quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
            saved[name] = packed
            saved |= {f"{name}.{k}": v.contiguous() for k, v in state.as_dict(packed=True).items()}
        else:
            saved[name] = tensor
    copy_of(checkpoint, tmp_path)
    for file in [*tmp_path.glob("*.safetensors"), tmp_path / "model.safetensors.index.json"]:
        file.unlink()
    save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_config(tmp_path, quantization_config=settings | {"bnb_4bit_use_double_quant": True})
    expected = stacked_values(load(checkpoint))
    for name, value in stacked_values(load(tmp_path)).items():
        assert torch.equal(value, expected[name]), name


def test_second_load_reads_the_cache_and_gives_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    first = load(checkpoint, cache_dir=tmp_path)
    (file,) = (tmp_path / "nf4").glob("*.safetensors")
    stamp = file.stat().st_mtime_ns
    second = load(checkpoint, cache_dir=tmp_path)
    assert file.stat().st_mtime_ns == stamp
    for (name, a), (_, b) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    expected = stacked_values(first)
    assert all(torch.equal(v, expected[n]) for n, v in stacked_values(second).items())


def test_damaged_cache_means_quantizing_again(checkpoint: Path, tmp_path: Path) -> None:
    load(checkpoint, cache_dir=tmp_path)
    (file,) = (tmp_path / "nf4").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert stacked_values(load(checkpoint, cache_dir=tmp_path))
    assert file.stat().st_size > 1000


def test_full_disk_while_caching_leaves_nothing_and_serves(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorikeet.server.base.nf4_cache.save_file", no_space)
    assert load(checkpoint, cache_dir=tmp_path).nf4_bytes > 0
    assert not list((tmp_path / "nf4").iterdir())


def test_changed_source_is_not_answered_from_the_cache(checkpoint: Path, tmp_path: Path) -> None:
    model = copy_of(checkpoint, tmp_path / "model")
    before = stacked_values(load(model, cache_dir=tmp_path / "cache"))
    shutil.rmtree(model)
    save_family("llama", model, seed=1, max_shard_size="100KB")
    after = stacked_values(load(model, cache_dir=tmp_path / "cache"))
    assert not any(torch.equal(v, before[n]) for n, v in after.items())


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(96, 64), (33, 128), (256, 192)], ids=str)
def test_nf4_linear_equals_its_reference(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    n, k = shape
    torch.manual_seed(n + k)
    weight = torch.randn(n, k, dtype=torch.bfloat16)
    bias = torch.randn(n, dtype=dtype)
    canonical = NF4Weight(*quantize_nf4(weight), n, k)
    for rows in (0, 1, 3, 17):
        x = torch.randn(rows, k, dtype=dtype)
        got = nf4_linear(x, prepare_for_device(canonical, dtype), bias)
        want = nf4_linear_reference(x, canonical, bias)
        assert got.dtype == dtype and got.shape == (rows, n)
        scale = want.abs().max().clamp(min=1.0) if rows else torch.tensor(1.0)
        torch.testing.assert_close(got.float() / scale, want / scale, atol=tolerance, rtol=tolerance)


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(BaseModelError) as caught:
        load(directory)
    for word in words:
        assert word in caught.value.message


def test_directory_without_config_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "config.json")


def test_unknown_architecture_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    model = copy_of(checkpoint, tmp_path)
    edit_config(model, architectures=["T5ForConditionalGeneration"], model_type="t5")
    refused(model, "T5ForConditionalGeneration", "encoder-decoder")
    edit_config(model, architectures=["NoSuchForCausalLM"], model_type="no_such")
    refused(model, "config.json")


@pytest.mark.parametrize(
    "model_type,architecture,reason",
    [("mixtral", "MixtralForCausalLM", "mixture of experts"), ("mamba", "MambaForCausalLM", "attention")],
    ids=["mixture-of-experts", "state-space"],
)
def test_architecture_that_cannot_be_served_is_refused_with_its_reason(
    checkpoint: Path, tmp_path: Path, model_type: str, architecture: str, reason: str
) -> None:
    model = copy_of(checkpoint, tmp_path)
    edit_config(model, architectures=[architecture], model_type=model_type)
    refused(model, architecture, reason)


def test_missing_shard_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    model = copy_of(checkpoint, tmp_path)
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    refused(model, shard.name)


def test_truncated_shard_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = copy_of(checkpoint, tmp_path)
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(model, "truncated")


def test_pickled_weights_are_never_read(checkpoint: Path, tmp_path: Path) -> None:
    model = copy_of(checkpoint, tmp_path)
    for file in [*model.glob("*.safetensors"), model / "model.safetensors.index.json"]:
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"x")
    refused(model, "pytorch_model.bin", "pickle")


def test_other_quantization_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    model = copy_of(checkpoint, tmp_path)
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(model, "gptq")


def test_missing_and_unexpected_tensors_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    model = copy_of(checkpoint, tmp_path)
    edit_config(model, attention_bias=True)
    refused(model, "q_proj.bias")
    edit_config(model, attention_bias=False, num_hidden_layers=2)
    refused(model, "model.layers.2")


def test_model_that_is_neither_directory_nor_hub_id_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "neither an existing directory nor a hub id")


def test_context_of_length_dependent_rope_is_limited_to_its_original_length(checkpoint: Path, tmp_path: Path) -> None:
    model = copy_of(checkpoint, tmp_path)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    edit_config(model, rope_parameters=rope, rope_scaling=rope)
    assert load(model).max_context == 128
