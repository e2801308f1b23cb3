"""A base held as on CUDA, with nested constants: bitsandbytes' values bit for bit, whatever they were loaded from."""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from lorikeet.kernels.nf4_weight import NestedAbsmax
from lorikeet.server.base import site_plan
from lorikeet.server.base.linears import NF4Linear
from lorikeet.server.base.loader import load_base
from lorikeet.server.base.model import BaseModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig

from .family_models import COMMON, oracle, save_model

CPU = torch.device("cpu")
# Parts of 256 constants each; and k, v, gate and up that leave groups half full.
NESTABLE = COMMON | {"num_key_value_heads": 4, "intermediate_size": 256}
SHAPES = {"nestable": (NESTABLE, set()), "in_part": (COMMON, {"qkv_proj", "gate_up_proj"})}


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """(16-bit model, the sites whose constants cannot stay nested)."""
    config, plain = SHAPES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    save_model(LlamaConfig(**config), directory)
    return directory, plain


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay as they are where they would be prepared for the CPU."""
    monkeypatch.setattr(site_plan, "prepare_for_device", lambda weight, dtype: weight)


def load(directory: Path, cache_dir: Path | None = None) -> BaseModel:
    return load_base(
        str(directory), device=CPU, compute_dtype=torch.float32, progress=False, cache_dir=cache_dir, name="base"
    )


def check(base: BaseModel, expected: nn.Module, plain: set[str]) -> None:
    """Forms are as expected and values equal, read as a whole and row by row."""
    for site in base.site_table.sites[:-1]:
        linear = base.site_module(site)
        assert isinstance(linear, NF4Linear)
        name = site.name.rpartition(".")[2]
        assert isinstance(linear.nf4.absmax, NestedAbsmax) == (name not in plain), name
        if isinstance(linear.nf4.absmax, NestedAbsmax):
            assert linear.nf4.absmax.one_offset == (len(site.slices) == 1)
        parts = torch.split(linear.nf4.dequantize(torch.float32), [s.out_features for s in site.slices])
        for piece, part in zip(site.slices, parts, strict=True):
            want = expected.get_submodule(piece.module).weight.data
            assert torch.equal(part, want), piece.module
            a, b = torch.zeros(1, want.shape[1]), torch.zeros(want.shape[0], 1)
            norms = base.weights.column_norms(piece.module, a, b)
            torch.testing.assert_close(norms, torch.linalg.norm(want, dim=1), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("as_on_cuda")
def test_from_16_bit_and_from_the_cache(checkpoint: tuple[Path, set[str]], tmp_path: Path) -> None:
    directory, plain = checkpoint
    expected = oracle(directory)
    check(load(directory, tmp_path), expected, plain)
    (file,) = (tmp_path / "nf4").glob("*.safetensors")
    stamp = file.stat().st_mtime_ns
    check(load(directory, tmp_path), expected, plain)
    assert file.stat().st_mtime_ns == stamp


def test_either_device_reads_what_the_other_cached(checkpoint: tuple[Path, set[str]], tmp_path: Path) -> None:
    directory, plain = checkpoint
    expected = oracle(directory)
    every = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_plan, "prepare_for_device", lambda weight, dtype: weight)
        check(load(directory, tmp_path / "cuda"), expected, plain)
    check(load(directory, tmp_path / "cuda"), expected, every)
    load(directory, tmp_path / "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_plan, "prepare_for_device", lambda weight, dtype: weight)
        check(load(directory, tmp_path / "cpu"), expected, plain)


def test_cache_without_its_second_level_is_not_read(checkpoint: tuple[Path, set[str]], tmp_path: Path) -> None:
    directory, _ = checkpoint
    load(directory, tmp_path)
    (file,) = (tmp_path / "nf4").glob("*.safetensors")
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith(".absmax.scales"))
    save_file({name: t for name, t in tensors.items() if name != lost}, file)
    assert load(directory, tmp_path).nf4_bytes > 0
    assert lost in load_file(file)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
def test_from_bitsandbytes_checkpoints(nested: bool, checkpoint: tuple[Path, set[str]], tmp_path: Path) -> None:
    directory, plain = checkpoint
    expected = oracle(directory)
    saved = {}
    for file in directory.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            saved[name] = tensor
            if name.endswith("proj.weight"):
                saved[name], state = bnb.quantize_4bit(tensor, quant_type="nf4", compress_statistics=nested)
                saved |= {f"{name}.{key}": v.contiguous() for key, v in state.as_dict(packed=True).items()}
                if not nested:
                    weight = expected.get_submodule(name.removesuffix(".weight")).weight
                    weight.data = bnb.dequantize_4bit(saved[name], state).float()
    for file in directory.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = settings | {"bnb_4bit_use_double_quant": nested}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = load(tmp_path)
    if nested:
        check(base, expected, plain)
        return
    for site in base.site_table.sites[:-1]:
        linear = base.site_module(site)
        assert isinstance(linear, NF4Linear) and isinstance(linear.nf4.absmax, torch.Tensor)
        rows = linear.nf4.dequantize(torch.bfloat16).float()  # bitsandbytes rounds to the weight's dtype, bf16
        want = torch.cat([expected.get_submodule(s.module).weight.data for s in site.slices])
        assert torch.equal(rows, want), site.name
