"""What is written: bfloat16 is rounded once, NF4 is bitsandbytes' own, and both load where they should."""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from lorikeet.adapters.errors import AdapterCompositionError
from lorikeet.adapters.merge.errors import MergeError
from lorikeet.adapters.merge.targets import Onto, Target
from lorikeet.adapters.merge.weights import write_weights
from lorikeet.server.base.loader import load_base
from lorikeet.server.merge_job import merge
from lorikeet.server.merge_plan import MergePlan, MergeRequest, plan_merge
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ...base.family_models import save_family
from .peft_merges import answer, plain_base, values_of

CPU = torch.device("cpu")
IDS = [5, 9, 100, 198, 3, 7, 150, 4, 11, 42]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "model"
    save_family("llama", directory)
    return directory


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Path]:
    """Three: of overlapping linears, and one that does more than add a delta."""
    torch.manual_seed(3)
    found = []
    for name, targets, settings in (
        ("one", ["q_proj", "down_proj"], {}),
        ("two", ["q_proj", "v_proj"], {"use_rslora": True}),
        ("three", ["o_proj"], {"use_dora": True}),
    ):
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        for key, parameter in model.named_parameters():
            if "lora_" in key and "magnitude" not in key:
                parameter.data.normal_(std=0.2)
        found.append(base.parent / name)
        model.save_pretrained(found[-1])
    return found


def planned(base: Path, adapters: list[Path], out: Path, to: Target, **settings: object) -> MergePlan:
    settings = {"onto": Onto.NF4} | settings
    return plan_merge(MergeRequest(str(base), tuple(adapters), to, out, **settings))  # type: ignore[arg-type]


def merged(base: Path, adapters: list[Path], out: Path, to: Target, **settings: object) -> Path:
    return merge(planned(base, adapters, out, to, **settings), lambda *_: None, lambda: False).out


def loaded(directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def test_bf16_is_the_float32_result_rounded_once(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    exact = tensors(merged(base, adapters[:1], tmp_path / "fp32", Target.FP32))
    rounded = tensors(merged(base, adapters[:1], tmp_path / "bf16", Target.BF16))
    assert rounded.keys() == exact.keys()
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)


def served_logits(directory: Path) -> Tensor:
    model = load_base(str(directory), device=CPU, compute_dtype=torch.float32, progress=False)
    model.model.config._attn_implementation = "eager"
    return model.logits(torch.tensor([IDS]), torch.arange(len(IDS))[None])


def test_a_16_bit_result_is_served_as_any_model(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    out = merged(base, adapters[:1], tmp_path / "out", Target.BF16, onto=Onto.ORIGINAL)
    expected = answer(plain_base(out, nf4=True), IDS)
    torch.testing.assert_close(served_logits(out), expected, atol=2e-4, rtol=2e-4)


def test_an_nf4_result_has_bitsandbytes_values_and_is_loaded_by_transformers_and_served(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    exact = loaded(merged(base, adapters[:1], tmp_path / "fp32", Target.FP32))
    out = merged(base, adapters[:1], tmp_path / "nf4", Target.NF4)
    by_transformers = loaded(out)
    for name, module in exact.named_modules():
        found = by_transformers.get_submodule(name)
        if isinstance(module, nn.Linear) and ".layers." in name:
            packed, state = bnb.quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            module.weight.data = bnb.dequantize_4bit(packed, state)
            assert found.weight.quant_state.dtype == torch.bfloat16
            found.weight.quant_state.dtype = torch.float32
            values = bnb.dequantize_4bit(found.weight.data, found.weight.quant_state)
            assert torch.equal(values, module.weight.data), name
        elif getattr(module, "weight", None) is not None:
            module.weight.data = module.weight.data.bfloat16().float()
            assert torch.equal(found.weight.data, module.weight.data), name
    torch.testing.assert_close(served_logits(out), answer(exact, IDS), atol=2e-4, rtol=2e-4)


def test_an_nf4_checkpoint_is_merged_onto_its_values(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "base"
    )
    for file in base.glob("tokenizer*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    plan = planned(tmp_path / "base", adapters[:1], tmp_path / "of-nf4", Target.FP32, onto=None)
    assert plan.onto.onto is Onto.NF4 and "NF4 checkpoint" in plan.onto.reason
    merge(plan, lambda *_: None, lambda: False)
    expected = tensors(merged(base, adapters[:1], tmp_path / "of-16-bit", Target.FP32))
    found = tensors(tmp_path / "of-nf4")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "quantization_config" not in json.loads((tmp_path / "of-nf4" / "config.json").read_text())


def test_several_adapters_are_merged_with_their_weights(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    out = merged(base, adapters[:2], tmp_path / "out", Target.FP32, weights=(0.5, -1.5))
    model = PeftModel.from_pretrained(plain_base(base, nf4=True), str(adapters[0]), adapter_name="one")  # type: ignore[arg-type]
    model.load_adapter(str(adapters[1]), "two")
    model.add_weighted_adapter(["one", "two"], [0.5, -1.5], "sum", combination_type="cat")
    model.set_adapter("sum")
    expected = values_of(model.merge_and_unload())
    for name, value in values_of(loaded(out)).items():
        torch.testing.assert_close(value, expected[name], atol=2e-6, rtol=2e-6)


def test_what_has_no_weight_has_none_here_either(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterCompositionError, match=r"three.*o_proj"):
        planned(base, [adapters[0], adapters[2]], tmp_path / "out", Target.BF16, weights=(1.0, 0.5))


def test_a_bias_that_the_architecture_cannot_have_is_refused_by_name(tmp_path: Path) -> None:
    save_family("qwen2", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["o_proj"], lora_bias=True, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"gives model\.layers\.0\.self_attn\.o_proj a bias, and a Qwen2ForCausalLM"):
        planned(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", Target.BF16)


def test_shards_are_no_larger_than_asked_and_their_index_has_every_tensor(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    plan = planned(base, adapters[:1], tmp_path / "out", Target.NF4)
    (tmp_path / "shards").mkdir()
    write_weights(plan.model, plan.parameters, tmp_path / "shards", Target.NF4, lambda _: None, shard_bytes=100_000)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    assert {tensor for file in files for tensor in _names(file)} == set(index["weight_map"])
    for file in files:
        sizes = [(name, value.nbytes, value.data_ptr() % 4) for name, value in load_file(file).items()]
        assert sum(size for _, size, _ in sizes) <= max(100_000, max(size for _, size, _ in sizes))
        assert all(not offset for _, size, offset in sizes if size % 8 == 0)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as shard:
        return list(shard.keys())
