"""Adapters saved by PEFT, packed, against the delta that PEFT itself computes from them."""

import ast
import copy
from pathlib import Path

import lorikeet.adapters
import pytest
import torch
from lorikeet.adapters.errors import AdapterIncompatibleError, AdapterInvalidError
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REGEX = r".*\.layers\.[12]\.(self_attn|mlp)\.(q|up)_proj"


def lora(**kwargs):
    return LoraConfig(
        task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | kwargs)
    )


def adalora(**kwargs):
    defaults = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "up_proj"]}
    return AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, **(defaults | kwargs))


CONFIGS = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "all_linear": lora(target_modules="all-linear", r=3),
    "one_module": lora(target_modules=["down_proj"], r=1),
    "full_names": lora(target_modules=["model.layers.1.self_attn.k_proj"]),
    "regex": lora(target_modules=REGEX),
    "exclude_modules": lora(target_modules=ALL, exclude_modules=["layers.1.mlp.up_proj", "o_proj"]),
    "exclude_regex": lora(target_modules=ALL, exclude_modules=r".*layers\.0.*"),
    # Overlapping patterns are in sorted order, because PEFT sorts them when it saves and takes the first that matches.
    "rank_pattern": lora(target_modules=ALL, rank_pattern={"down_proj": 5, r"layers\.1\..*_proj": 2, "q_proj": 7}),
    "alpha_pattern": lora(target_modules=ALL, alpha_pattern={"^model.layers.0.self_attn.q_proj": 20, "up_proj": 1}),
    "both_patterns_rslora": lora(
        use_rslora=True, rank_pattern={"v_proj": 9, "layers.2.self_attn.q_proj": 1}, alpha_pattern={"v_proj": 3}
    ),
    "layers_to_transform": lora(layers_to_transform=[0, 2], layers_pattern="layers"),
    "one_layer": lora(layers_to_transform=1),
    "gaussian": lora(init_lora_weights="gaussian"),
    "adalora": adalora(),
    "adalora_alpha_zero": adalora(lora_alpha=0),
    "adalora_ignores_rslora_and_alpha_pattern": adalora(use_rslora=True, alpha_pattern={"q_proj": 100}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_packed_delta_equals_peft(config, tmp_path, save_adapter, unpack, pack):
    expected = save_adapter(config, tmp_path)
    packed = pack(tmp_path)
    assert_close(unpack(packed), expected, rtol=1e-5, atol=1e-6)
    assert packed.nbytes == packed.data.numel() * 4
    assert packed.report.num_modules == len(expected)


def _allocate_ranks(model):
    """Let AdaLoRA's allocator mask singular values, as training does, with one module down to no rank at all."""
    kept = {"q_proj": [True, False, True, False], "k_proj": [False] * 4, "up_proj": [True] * 4}
    names = [n for n, _ in model.base_model.model.named_parameters() if n.endswith(".lora_E.default")]
    model.peft_config["default"].rank_pattern = {n: kept[n.split(".")[-3]] for n in names}


@pytest.mark.parametrize("alpha", [6, 0])
def test_adalora_with_allocated_ranks_equals_peft(alpha, tmp_path, save_adapter, unpack, pack):
    expected = save_adapter(adalora(lora_alpha=alpha), tmp_path, change=_allocate_ranks)
    packed = pack(tmp_path)
    assert {k: v for k, v in expected.items() if "k_proj" in k}  # rank 0: PEFT's delta is zero, ours takes no memory
    assert all(not v.any() for k, v in expected.items() if "k_proj" in k)
    assert_close(unpack(packed), {k: v for k, v in expected.items() if "k_proj" not in k}, rtol=1e-5, atol=1e-6)
    assert packed.site_ranks[0].tolist() == [2, 0, 0]
    assert packed.report.slices["k_proj"].rank == 0


def test_adalora_trained_by_peft_equals_peft(tmp_path, save_adapter, unpack, pack):
    """The allocator itself, a few steps of it, rather than a hand-made rank pattern."""

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ids = torch.arange(16).view(2, 8)
        for step in range(10):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()

    expected = save_adapter(adalora(tinit=2, tfinal=2), tmp_path, change=train)
    packed = pack(tmp_path)
    got = unpack(packed)
    for module, delta in expected.items():
        assert_close(got.get(module, torch.zeros_like(delta)), delta, rtol=1e-4, atol=1e-6)
    assert packed.site_ranks.sum() < 4 * 3 * 3  # it did drop ranks


@pytest.mark.parametrize("file_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arena_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_files_are_scaled_in_float32(file_dtype, arena_dtype, tmp_path, save_adapter, unpack, pack):
    expected = save_adapter(lora(use_rslora=True), tmp_path, dtype=file_dtype)
    packed = pack(tmp_path, arena_dtype)
    tolerance = 1e-5 if arena_dtype is torch.float32 else 2**-7
    for module, delta in unpack(packed).items():
        assert_close(delta, expected[module], rtol=0, atol=tolerance * float(expected[module].abs().max()))


def _rename(path, change):
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda name: name.removeprefix("base_model.model."), id="without_prefix"),
        pytest.param(lambda name: name.replace(".weight", ".default.weight"), id="adapter_name_default"),
        pytest.param(lambda name: name.replace(".weight", ".my-adapter.weight"), id="adapter_name_other"),
    ],
)
def test_key_variants_give_the_same_delta(change, tmp_path, save_adapter, unpack, pack):
    expected = save_adapter(lora(), tmp_path)
    _rename(tmp_path / "adapter_model.safetensors", change)
    packed = pack(tmp_path)
    assert_close(unpack(packed), expected, rtol=1e-5, atol=1e-6)


def test_missing_layers_do_not_drop_a_module_type(tmp_path, save_adapter, sites, pack):
    save_adapter(lora(layers_to_transform=[2]), tmp_path)
    packed = pack(tmp_path)
    adapted = [sites.sites[i].name for i, offset in enumerate(packed.site_offsets.tolist()) if offset >= 0]
    assert adapted == ["model.layers.2.self_attn.qkv_proj"]


def test_report_merges_equal_layers_and_spells_out_unequal_ones(tmp_path, save_adapter, pack):
    save_adapter(lora(rank_pattern={"layers.0.self_attn.v_proj": 2}), tmp_path)
    packed = pack(tmp_path)
    assert packed.report.slices == {
        "q_proj": (4, 1.5),
        "model.layers.0.self_attn.v_proj": (2, 3.0),
        "model.layers.1.self_attn.v_proj": (4, 1.5),
        "model.layers.2.self_attn.v_proj": (4, 1.5),
    }
    assert (packed.report.method, packed.report.max_rank) == ("LoRA", 4)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_zero_delta_is_refused_unless_allowed(part, lora_dir, edit_tensors, pack):
    edit_tensors(lora_dir, lambda tensors: [t.zero_() for name, t in tensors.items() if part in name])
    with pytest.raises(AdapterInvalidError, match="zero everywhere"):
        pack(lora_dir)
    packed = pack(lora_dir, allow_zero=True)
    assert packed.report.num_modules == 6


def test_untrained_adapter_is_a_zero_delta(tmp_path, tiny_llama, pack):
    get_peft_model(copy.deepcopy(tiny_llama), lora()).save_pretrained(tmp_path)
    with pytest.raises(AdapterInvalidError, match="before training"):
        pack(tmp_path)


def test_zero_in_some_modules_only_is_served(lora_dir, edit_tensors, pack):
    edit_tensors(lora_dir, lambda tensors: [t.zero_() for name, t in tensors.items() if "layers.0" in name])
    pack(lora_dir)


def test_value_too_large_for_the_arena_type_is_refused_by_tensor(lora_dir, edit_tensors, pack):
    edit_tensors(
        lora_dir, lambda tensors: tensors.update({n: t.fill_(5e4) for n, t in tensors.items() if "lora_B" in n})
    )
    with pytest.raises(AdapterIncompatibleError, match=r"lora_B.*float16"):
        pack(lora_dir, torch.float16)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_absurd_weight_is_refused_by_tensor_in_any_type(part, dtype, lora_dir, edit_tensors, pack):
    name = f"base_model.model.model.layers.1.mlp.down_proj.{part}.weight"
    edit_tensors(lora_dir, lambda tensors: tensors[name].view(-1).__setitem__(5, -1e30))
    with pytest.raises(AdapterIncompatibleError, match=rf"layers\.1\.mlp\.down_proj\.{part}"):
        pack(lora_dir, dtype)


def test_only_one_file_computes_scaling():
    """A second formula for the scaling anywhere would sooner or later differ from the first."""
    for path in Path(lorikeet.adapters.__file__).parent.glob("*.py"):
        if path.name == "scaling.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.BinOp | ast.Attribute) else ""
            divides_alpha = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and "alpha" in text
            assert not divides_alpha and not text.endswith("sqrt"), f"{path.name}: {text}"
