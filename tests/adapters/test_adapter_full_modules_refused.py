"""Bad files with whole modules, magnitudes, biases and token rows: refused by the name of the tensor or field."""

import pytest
import torch
from lorikeet.adapters.checkpoint import load_checkpoint
from lorikeet.adapters.errors import AdapterIncompatibleError, AdapterInvalidError, AdapterMemoryError
from lorikeet.adapters.tensor_plan import TensorPlanner
from peft import LoraConfig

PREFIX = "base_model.model."
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"
TOKENS = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's hints for training


def lora(**kwargs):
    return LoraConfig(**({"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]} | kwargs))


def put(name, *shape):
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def drop(name):
    return lambda tensors: tensors.pop(name)


def fill(name, value):
    return lambda tensors: tensors[name].fill_(value)


DORA, WHOLE, ROWS = lora(use_dora=True), lora(modules_to_save=["lm_head", "norm"]), lora(trainable_token_indices=[5, 3])
MAGNITUDE, NORM = f"{Q0}.lora_magnitude_vector", f"{PREFIX}model.norm.weight"
CASES = {
    "magnitude_of_wrong_length": (DORA, put(MAGNITUDE, 31), r"magnitude.*\[31\].*must be \[32\]"),
    "magnitude_as_matrix": (DORA, put(MAGNITUDE, 32, 1), r"magnitude.*\[32, 1\].*must be \[32\]"),
    "magnitude_missing": (DORA, drop(MAGNITUDE), "has no lora_magnitude_vector beside it"),
    "magnitude_nan": (DORA, fill(MAGNITUDE, float("nan")), "magnitude.*not finite"),
    "magnitude_huge": (DORA, fill(MAGNITUDE, 1e30), "q_proj.*larger than"),
    "magnitude_without_dora": (lora(), put(MAGNITUDE, 32), "magnitude.*use_dora is false"),
    "lora_bias_not_in_config": (lora(), put(f"{Q0}.lora_B.bias", 32), "lora_B.bias.*lora_bias"),
    "lora_bias_of_wrong_length": (lora(lora_bias=True), put(f"{Q0}.lora_B.bias", 33), r"lora_B.bias.*\[33\]"),
    "lora_A_with_bias": (lora(), put(f"{Q0}.lora_A.bias", 2), "lora_A.bias"),
    "whole_missing": (WHOLE, drop(f"{HEAD}.weight"), "lm_head has weights of its own, but the file has none"),
    "whole_norm_missing": (WHOLE, drop(NORM), "model.norm has weights of its own"),
    "whole_not_in_config": (lora(), put(NORM, 32), "norm.weight.*modules_to_save does not name"),
    "whole_of_wrong_shape": (WHOLE, put(NORM, 16), r"norm.weight.*\[16\].*needs \[32\]"),
    "whole_of_wrong_width": (WHOLE, put(f"{HEAD}.weight", 64, 31), r"lm_head.weight.*\[64, 31\]"),
    "whole_infinite": (WHOLE, fill(f"{HEAD}.weight", float("inf")), "lm_head.weight.*not finite"),
    "whole_huge": (WHOLE, fill(f"{HEAD}.weight", 1e30), "lm_head.weight.*larger than"),
    "whole_without_rows": (WHOLE, put(f"{HEAD}.weight", 0, 32), r"lm_head.weight.*\[0, 32\]"),
    "head_of_another_size": (WHOLE, put(f"{HEAD}.weight", 70, 32), "64 tokens and the head for 70; save both"),
    "weight_twice": (
        lora(),
        lambda t: t.update({f"{HEAD}.weight": torch.ones(64, 32), f"{HEAD}.base_layer.weight": torch.ones(64, 32)}),
        "are both the weight of the same module",
    ),
    "bias_of_norm_that_has_none": (lora(bias="all"), put(f"{PREFIX}model.norm.bias", 32), "norm.bias"),
    "bias_of_linear_that_has_none": (lora(bias="all"), put(f"{Q0}.base_layer.bias", 32), "q_proj has no bias"),
    "bias_untargeted": (lora(bias="lora_only"), put(f"{Q0[:-6]}k_proj.bias", 16), "k_proj.bias.*lora_only"),
    "embedding_lora_with_dora": (
        lora(use_dora=True, target_modules=["q_proj", "embed_tokens"]), lambda t: None,
        "embed_tokens.lora_magnitude_vector.*DoRA on embeddings is not served",
    ),
    "embedding_lora_of_wrong_rows": (
        lora(target_modules=["q_proj", "embed_tokens"]), put(f"{EMBEDDING}.lora_embedding_A", 8, 63), "lora_embedding_A"
    ),
    "embedding_lora_missing": (
        lora(target_modules=["q_proj", "embed_tokens"]),
        lambda t: (t.pop(f"{EMBEDDING}.lora_embedding_A"), t.pop(f"{EMBEDDING}.lora_embedding_B")),
        "targets model.embed_tokens, but the file has no tensors",
    ),
    "embedding_lora_on_linear": (
        lora(),
        lambda t: (put(f"{Q0}.lora_embedding_A", 2, 32)(t), put(f"{Q0}.lora_embedding_B", 32, 2)(t)),
        "q_proj",
    ),
    "rows_missing": (ROWS, drop(TOKENS), "the file has no rows"),
    "rows_too_few": (ROWS, put(TOKENS, 1, 32), r"delta.*\[1, 32\].*need \[2, 32\]"),
    "rows_beyond_the_vocabulary": (
        lora(trainable_token_indices=[5, 3]), None, "token 70 is beyond the 64 rows",
    ),
    "rows_continue_one_of_two": (
        lora(trainable_token_indices=[5, 3]), None, "65 tokens and the head for 64",
    ),
}  # fmt: skip
IDS = {"rows_beyond_the_vocabulary": [70, 3], "rows_continue_one_of_two": [64, 3]}


@pytest.mark.parametrize("name", CASES)
def test_refused_by_name(name, tmp_path, save_adapter_only, edit_tensors, edit_config, pack):
    config, change, message = CASES[name]
    save_adapter_only(config, tmp_path)
    if name in IDS:
        edit_config(tmp_path, trainable_token_indices=IDS[name])
    else:
        edit_tensors(tmp_path, change)
    with pytest.raises((AdapterInvalidError, AdapterIncompatibleError), match=message):
        pack(tmp_path)


def test_module_to_save_that_does_not_exist_is_refused_by_name(lora_dir, edit_config, pack):
    edit_config(lora_dir, modules_to_save=["classifier"])
    with pytest.raises(AdapterIncompatibleError, match="modules_to_save names 'classifier'") as error:
        pack(lora_dir)
    assert error.value.metadata == {"field": "modules_to_save"}


def test_dora_over_a_row_of_zeros_is_refused(tmp_path, save_adapter_only, weights, pack, monkeypatch):
    save_adapter_only(DORA, tmp_path)
    norms = torch.ones(32).index_fill_(0, torch.tensor([7]), 0.0)
    monkeypatch.setattr(weights, "column_norms", lambda *_: norms)
    with pytest.raises(AdapterInvalidError, match=r"q_proj\.lora_magnitude_vector.*norm of zero in row 7"):
        pack(tmp_path)


def test_untrained_dora_is_a_zero_delta(tmp_path, save_adapter_only, edit_tensors, pack):
    save_adapter_only(DORA, tmp_path, std=0.0)
    edit_tensors(tmp_path, lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    with pytest.raises(AdapterInvalidError, match="zero everywhere"):
        pack(tmp_path)
    pack(tmp_path, allow_zero=True)


@pytest.mark.parametrize("config", [WHOLE, DORA, lora(target_modules=["embed_tokens"])], ids=["whole", "dora", "lora"])
def test_everything_counts_before_the_payload_is_read(config, tmp_path, save_adapter_only, sites, modules, base, pack):
    save_adapter_only(config, tmp_path)
    elements = pack(tmp_path).data.numel()
    load_checkpoint(tmp_path, TensorPlanner(sites, modules, base), max_elements=elements)
    with pytest.raises(AdapterMemoryError, match=f"takes {elements} elements"):
        load_checkpoint(tmp_path, TensorPlanner(sites, modules, base), max_elements=elements - 1)


@pytest.mark.parametrize("change", ["default_everywhere", "no_prefix", "compiled", "mixed_types"])
def test_old_spellings_land_in_the_same_places(change, tmp_path, save_adapter_only, edit_tensors, pack):
    config = lora(use_dora=True, modules_to_save=["lm_head"], trainable_token_indices=[3, 9], target_modules=["q_proj"])
    save_adapter_only(config, tmp_path)
    expected = pack(tmp_path)

    def respell(name):
        if change == "no_prefix":
            return name.removeprefix(PREFIX)
        if change == "compiled":
            return name.replace(PREFIX, f"{PREFIX}_orig_mod.")
        if change == "mixed_types":
            return name
        for part in ("lora_A", "lora_B", "lora_magnitude_vector", "trainable_tokens_delta"):
            name = name.replace(part, f"{part}.default")
        return name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight").replace(
            "magnitude_vector.default", "magnitude_vector.default.weight"
        )

    def edit(tensors):
        types = [torch.float16, torch.bfloat16, torch.float32]
        items = list(tensors.items())
        tensors.clear()
        for i, (name, tensor) in enumerate(items):
            tensors[respell(name)] = tensor.to(types[i % 3]) if change == "mixed_types" else tensor

    edit_tensors(tmp_path, edit)
    packed = pack(tmp_path)
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if change == "mixed_types" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(packed.data, expected.data, **tolerance, equal_nan=True)
    assert packed.overrides[0].regions == expected.overrides[0].regions
    assert len(packed.overrides) == len(expected.overrides) == 2
