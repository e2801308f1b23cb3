"""Layouts of 4-bit weights are read as the values that they stand for; auto-round's own packing where it is there."""

import json
import math
from pathlib import Path

import pytest
import torch
from lorikeet.server.evaluation.errors import EvaluationError
from lorikeet.server.evaluation.packed_layouts import layout_of, unpack_awq, unpack_gptq
from lorikeet.server.evaluation.transformers_model import TransformersModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..devices import CPU
from ..tiny import save_tiny_model

GROUP = 32
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of one int32, from the lowest bits


class Quantized:
    """A random weight's values on a grid of 4 bits.

    Attributes:
        values: float32 [out, in], exactly (q - zero) * scale.
        q, zeros, scales: [in, out], [in / GROUP, out] and float16 [in / GROUP, out].
    """

    def __init__(self, out_features: int, in_features: int, *, symmetric: bool) -> None:
        groups = in_features // GROUP
        self.q = torch.randint(0, 16, (in_features, out_features), dtype=torch.int32)
        self.zeros = torch.randint(0, 16, (groups, out_features), dtype=torch.int32)
        if symmetric:
            self.zeros.fill_(8)
        self.scales = (torch.rand(groups, out_features) + 0.1).half()
        spread = [each.repeat_interleave(GROUP, 0) for each in (self.zeros, self.scales.float())]
        self.values = ((self.q - spread[0]) * spread[1]).t().contiguous()


def packed(values: Tensor, columns: tuple[int, ...]) -> Tensor:
    """int32 [a, b] -> [a, b / 8]: of each eight, `columns` from the lowest bits."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate(columns):
        words |= values[:, column::8].long() << (4 * place)
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.parametrize(("out_features", "in_features"), [(8, 32), (24, 96), (200, 64)])
def test_awq(out_features: int, in_features: int) -> None:
    weight = Quantized(out_features, in_features, symmetric=False)
    found = unpack_awq(packed(weight.q, AWQ_COLUMNS), packed(weight.zeros, AWQ_COLUMNS), weight.scales)
    assert torch.equal(found, weight.values)


@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize(("out_features", "in_features"), [(8, 32), (24, 96), (200, 64)])
def test_gptq(out_features: int, in_features: int, less_one: bool) -> None:
    weight = Quantized(out_features, in_features, symmetric=True)
    order = tuple(range(8))
    qweight = packed(weight.q.t().contiguous(), order).t().contiguous()
    qzeros = packed(weight.zeros - int(less_one), order)
    assert torch.equal(unpack_gptq(qweight, qzeros, weight.scales, less_one=less_one), weight.values)


def test_auto_rounds_packing_is_read_exactly() -> None:
    """What it writes, against the values that it packed."""
    awq = pytest.importorskip("auto_round.export.export_to_awq.utils")
    gptq = pytest.importorskip("auto_round_extension.torch.qlinear_torch_zp")
    linear = nn.Linear(96, 64, bias=False)
    weight = Quantized(64, 96, symmetric=False)
    linear.weight.data = weight.values
    scales, zeros = weight.scales.float(), weight.zeros.float()
    made = awq.WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales, zeros=zeros, device="cpu")
    assert torch.equal(unpack_awq(made.qweight, made.qzeros, made.scales), weight.values)
    weight = Quantized(64, 96, symmetric=True)
    linear.weight.data = weight.values
    made = gptq.QuantLinear(4, GROUP, 96, 64, bias=False)
    made.pack(linear, weight.scales.float().t().contiguous(), 8.0, None, device="cpu")
    assert torch.equal(unpack_gptq(made.qweight, made.qzeros, made.scales, less_one=True), weight.values)


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """A tiny model whose q_proj are in AWQ's layout, beside one that stores the same values."""
    save_tiny_model(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    stored = dict(tensors)
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        weight = Quantized(*tensors[name].shape, symmetric=False)
        # (dtype bf16 in the file, exact): values that bf16 has, since the other file is read from it.
        weight.scales = torch.full_like(weight.scales, 2.0 ** -math.ceil(math.log2(weight.q.shape[0])))
        spread = weight.scales.float().repeat_interleave(GROUP, 0)
        tensors[name] = ((weight.q - weight.zeros.repeat_interleave(GROUP, 0)) * spread).t().bfloat16().contiguous()
        path = name.removesuffix(".weight")
        del stored[name]
        stored |= {
            f"{path}.qweight": packed(weight.q, AWQ_COLUMNS),
            f"{path}.qzeros": packed(weight.zeros, AWQ_COLUMNS),
            f"{path}.scales": weight.scales,
        }
    save_file(tensors, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    out = tmp_path / "awq"
    out.mkdir()
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return out


@torch.inference_mode()
def test_a_model_answers_as_the_values_it_stores(quantized: Path) -> None:
    ids = [5, 9, 100, 3, 7, 150, 4, 11, 42]
    model = TransformersModel(quantized, device=CPU, compute_dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(quantized.parent / "plain", dtype=torch.float32).eval()
    expected = plain(input_ids=torch.tensor([ids])).logits[0, :-1]
    # (dtype fp32, tolerance): the same values and the same computation.
    torch.testing.assert_close(model.logits(ids, 1), expected, atol=1e-5, rtol=1e-5)
    assert not model.is_timed and model.resident_bytes < model.disk_bytes


@pytest.mark.parametrize("wrong", [{"bits": 8}, {"desc_act": True}, {"version": "gemv"}])
def test_what_is_packed_otherwise_is_refused(wrong: dict[str, object], quantized: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] |= wrong
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(EvaluationError, match="in a form that is not read here"):
        TransformersModel(quantized, device=CPU, compute_dtype=torch.float32)


@pytest.mark.parametrize(
    ("settings", "device", "layout"),
    [
        ({}, "cpu", ""),
        ({"quant_method": "bitsandbytes"}, "cpu", ""),
        ({"quant_method": "awq"}, "cuda", "awq"),
        ({"quant_method": "gptq"}, "cpu", "gptq"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, "cpu", "gptq"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, "cuda", ""),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, "cpu", ""),
    ],
)
def test_what_is_unpacked(settings: dict[str, str], device: str, layout: str) -> None:
    assert layout_of(settings, torch.device(device)) == layout
