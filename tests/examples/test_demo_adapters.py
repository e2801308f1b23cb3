"""The four committed demo adapters: small, complete, documented, and free of the machine that made them."""

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[2] / "examples"
METHODS = {"kjv": "QLoRA", "devil": "LoRA", "jargon": "AdaLoRA", "austen": "LoRA+"}
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_BYTES = 2_000_000
# Input and output width of the base's linears.
WIDTHS = {
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}

each_adapter = pytest.mark.parametrize("name", sorted(METHODS))


def config_of(name: str) -> dict:
    return json.loads((EXAMPLES / "adapters" / name / "adapter_config.json").read_text())


def card_of(name: str) -> str:
    return (EXAMPLES / "adapters" / name / "README.md").read_text(encoding="utf-8")


def perplexities_of(name: str) -> dict:
    return json.loads((EXAMPLES / "heldout" / "perplexity.json").read_text())["adapters"][name]


def records_of(name: str) -> list[str]:
    return (EXAMPLES / "heldout" / f"{name}.txt").read_text(encoding="utf-8").strip().split("\n\n")


def test_there_is_one_adapter_for_each_method():
    assert {path.name for path in (EXAMPLES / "adapters").iterdir()} == set(METHODS)
    assert {config_of(name)["peft_type"] for name in METHODS} == {"LORA", "ADALORA"}


@each_adapter
def test_a_folder_holds_config_weights_card_calibration_text_and_no_more(name):
    folder = EXAMPLES / "adapters" / name
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "calibration.txt",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES


@each_adapter
def test_weights_are_finite_16_bit_pairs_that_fit_the_base(name):
    targets = set(config_of(name)["target_modules"])
    ranks: dict[str, dict[str, int]] = {}
    with safe_open(EXAMPLES / "adapters" / name / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            tensor = file.get_tensor(key)
            match = re.fullmatch(r"base_model\.model\.(.*\.(\w+_proj))\.lora_(A|B|E)(\.weight)?", key)
            assert match, key
            module, kind, part = match[1], match[2], match[3]
            assert kind in targets, key
            inputs, outputs = WIDTHS[kind]
            assert tensor.dtype.itemsize == 2, key
            assert tensor.isfinite().all(), key
            rank_axis = 1 if part == "B" else 0
            assert tensor.shape[1 - rank_axis] == {"A": inputs, "B": outputs, "E": 1}[part], key
            ranks.setdefault(module, {})[part] = tensor.shape[rank_axis]
    parts = {"A", "B", "E"} if config_of(name)["peft_type"] == "ADALORA" else {"A", "B"}
    for module, by_part in ranks.items():
        assert set(by_part) == parts, module
        assert len(set(by_part.values())) == 1, module


@each_adapter
def test_the_delta_is_not_zero(name):
    with safe_open(EXAMPLES / "adapters" / name / "adapter_model.safetensors", framework="pt") as file:
        b_keys = [key for key in file.keys() if "lora_B" in key]  # noqa: SIM118
        assert any(file.get_tensor(key).abs().max() > 1e-3 for key in b_keys)


def test_ranks_and_targets_differ_between_the_four():
    shapes = {
        (config_of(name).get("init_r") or config_of(name)["r"], *sorted(config_of(name)["target_modules"]))
        for name in METHODS
    }
    assert len(shapes) == 4
    assert config_of("austen")["use_rslora"]
    assert config_of("austen")["rank_pattern"]


def test_adalora_has_pruned():
    config = config_of("jargon")
    kept = [sum(mask) for mask in config["rank_pattern"].values()]
    assert min(kept) < max(kept) <= config["init_r"]
    assert sum(kept) / len(kept) == pytest.approx(config["target_r"], rel=0.05)


@each_adapter
def test_the_config_names_the_public_base_and_nothing_unservable(name):
    config = config_of(name)
    assert config["base_model_name_or_path"] == BASE
    assert config["task_type"] == "CAUSAL_LM"
    assert config["bias"] == "none"
    assert not config.get("use_dora")
    assert not config.get("modules_to_save")


@each_adapter
def test_the_card_has_data_method_numbers_example_and_date(name):
    card = card_of(name)
    numbers = perplexities_of(name)
    for fact in (
        f"base_model: {BASE}",
        f"learned with {METHODS[name]}",
        "public domain",
        "Debian's package",
        "| steps |",
        "| seed |",
        "| time |",
        "| rank |",
        f"{numbers['base_nf4']:.2f}",
        f"{numbers['base_16bit']:.2f}",
        f"**{numbers['adapter_on_nf4']:.2f}**",
        "Base:",
        "Adapter:",
        "peft 0.",
        "2026-",
    ):
        assert fact in card, fact


@each_adapter
def test_no_path_of_the_machine_that_trained_it_is_left(name):
    config = (EXAMPLES / "adapters" / name / "adapter_config.json").read_text()
    assert not re.search(r"(/home|/root|/tmp|/work|/usr|[A-Z]:\\\\)", config + card_of(name))


@each_adapter
def test_held_out_text_is_there_and_its_perplexity_falls_clearly(name):
    numbers = perplexities_of(name)
    records = records_of(name)
    assert numbers["records"] == len(records)
    assert 4_000 < sum(len(record) for record in records) < 16_000
    assert numbers["tokens"] > 1_000
    assert numbers["adapter_on_nf4"] < 0.85 * numbers["base_nf4"]
