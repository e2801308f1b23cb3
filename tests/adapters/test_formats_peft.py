"""Every tuner type and every option of the installed PEFT through the server's own reader: nothing in silence.

A PEFT that brings a new type, option or initialisation fails here and says where to decide what becomes of it.
"""

import dataclasses
import json
import re
import typing

import peft
import pytest
import torch
from lorikeet.adapters.config_fields import DEFAULT_ONLY, IGNORED, SERVED
from lorikeet.adapters.errors import AdapterIncompatibleError
from lorikeet.adapters.formats import FORMATS, Status, find_format
from lorikeet.adapters.info import LoadOptions
from lorikeet.adapters.reader import AdapterReader
from peft import AdaLoraConfig, LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from .peft_makes import CONFIG, adapt, save_config_alone, type_config

NEW = f"peft {peft.__version__} has a new {{}}: say what becomes of it in adapters/{{}}, then run make docs"
SERVED_TYPES = [f.value for f in FORMATS if f.field == "peft_type" and f.status is Status.SERVED]
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's hints for training

# AdaMSS needs scikit-learn, X-LoRA adapters to mix; both are refused before a tensor is looked at.
NOT_MADE = {"ADAMSS", "XLORA"}


@pytest.fixture(scope="module")
def read(sites, modules, weights, base):
    """read(directory): as the manager reads it."""
    reader = AdapterReader(sites, modules, weights, base, dtype=torch.float32, pin_memory=False, max_bytes=2**24)
    return lambda directory: reader.read("x", directory, roots=[directory], options=LoadOptions()).packed


@pytest.fixture
def save(tiny_llama, tmp_path):
    """save(config): made, changed and saved by PEFT; the directory."""

    def make(config, name="made"):
        adapt(tiny_llama, config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def edit(directory, **changes):
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def content(packed):
    """All that decides how an adapter answers."""
    overrides = [(o.module, o.kind, dict(o.regions), str(o.token_ids)) for o in packed.overrides]
    tables = (packed.site_offsets.tolist(), packed.site_ranks.tolist(), packed.site_affines.tolist())
    return packed.data.numpy().tobytes(), tables, overrides, packed.vocab_size


def refused(read, directory):
    with pytest.raises(AdapterIncompatibleError) as error:
        read(directory)
    return error.value


@pytest.mark.parametrize("peft_type", list(PeftType), ids=lambda t: t.value)
def test_every_type_of_peft_is_served_or_refused_by_name(peft_type, tiny_llama, read, save, tmp_path):
    entry = find_format("peft_type", peft_type.value)
    assert entry is not None, NEW.format(f"type {peft_type.value}", "formats.py")
    if peft_type.value in NOT_MADE:
        save_config_alone(peft_type, tmp_path / "made")
    else:
        save(type_config(peft_type))
    if entry.status is Status.SERVED:
        assert read(tmp_path / "made").nbytes > 0
        return
    error = refused(read, tmp_path / "made")
    assert error.metadata == {"field": "peft_type"}
    assert peft_type.value in error.message and entry.text in error.message


@pytest.mark.parametrize("peft_type", [t for t in PeftType if t.value not in NOT_MADE], ids=lambda t: t.value)
def test_remedies_exist_in_peft(peft_type, tiny_llama):
    entry = find_format("peft_type", peft_type.value)
    if entry is None or entry.status is Status.SERVED:
        return
    adapted = adapt(tiny_llama, type_config(peft_type))
    if "save_as_lora" in entry.text:
        assert adapted.supports_lora_conversion() and callable(peft.save_as_lora)
    if "merge_and_unload" in entry.text:
        assert hasattr(adapted.base_model, "merge_and_unload")


def test_served_types_are_those_whose_options_are_known():
    assert {"LORA", "ADALORA"} <= set(SERVED_TYPES)
    for peft_type in SERVED_TYPES:
        fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type])}
        unknown = fields - SERVED - IGNORED.keys() - DEFAULT_ONLY.keys()
        assert not unknown, NEW.format(f"option of {peft_type}: {unknown}", "config_fields.py")


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings))


def adalora(**settings):
    return type_config(PeftType.ADALORA, **settings)


# Options that are served: a config with another value, and one without. PEFT makes both with the same noise.
CHANGED = {
    "peft_type": (adalora(), lora()),
    "r": (lora(r=3), lora()),
    "lora_alpha": (lora(lora_alpha=20), lora()),
    "use_rslora": (lora(use_rslora=True), lora()),
    "use_dora": (lora(use_dora=True), lora()),
    "lora_bias": (lora(lora_bias=True), lora()),
    "rank_pattern": (lora(rank_pattern={"q_proj": 2}), lora()),
    "alpha_pattern": (lora(alpha_pattern={"q_proj": 2}), lora()),
    "target_modules": (lora(target_modules=["k_proj"]), lora()),
    "exclude_modules": (lora(exclude_modules=["layers.1.self_attn.q_proj"]), lora()),
    "layers_to_transform": (lora(layers_to_transform=[1]), lora()),
    "layers_pattern": (lora(layers_to_transform=[1], layers_pattern="layers"), lora()),
    "modules_to_save": (lora(modules_to_save=["lm_head", "norm"]), lora()),
    "trainable_token_indices": (lora(trainable_token_indices=[2, 7]), lora()),
    "token_indices": (
        type_config(PeftType.TRAINABLE_TOKENS, token_indices=[3]),
        type_config(PeftType.TRAINABLE_TOKENS),
    ),
    "init_r": (adalora(init_r=6), adalora()),
}
# Served, and the same content whatever they are on this base: what they mean is elsewhere in the files, or nothing.
NO_EFFECT_HERE = {
    "base_model_name_or_path": "tiny-llama",  # a name of the base that is served
    "bias": "all",  # no linear and no norm of this base has one; tests/golden has a base with biases
    "ensure_weight_tying": True,  # its head is not tied
    "init_lora_weights": "gaussian",
}


def test_every_served_option_has_an_example():
    assert CHANGED.keys() | NO_EFFECT_HERE.keys() == SERVED, "give a new option an example in CHANGED"


@pytest.mark.parametrize(("changed", "usual"), CHANGED.values(), ids=CHANGED)
def test_served_option_is_not_ignored(changed, usual, read, save):
    assert content(read(save(changed, "changed"))) != content(read(save(usual, "usual")))


@pytest.mark.parametrize(("key", "value"), NO_EFFECT_HERE.items(), ids=NO_EFFECT_HERE)
def test_served_option_without_effect_on_this_base_is_accepted(key, value, read, save):
    assert content(read(save(lora(**{key: value}), "changed"))) == content(read(save(lora(), "usual")))


# Any value does; these are of the kind that PEFT writes.
IGNORED_VALUES = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "peft_version": "99.0.0",
    "revision": "main",
    "inference_mode": False,
    "lora_dropout": 0.3,
    "fan_in_fan_out": True,
    "init_weights": False,
    "megatron_core": "megatron.other",
    "qalora_group_size": 32,
    "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "random"},
    "eva_config": {"rho": 1.5},
    "target_r": 3,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 4,
    "beta1": 0.5,
    "beta2": 0.5,
    "orth_reg_weight": 0.1,
    "total_step": 77,
}


def test_every_ignored_option_has_an_example():
    assert IGNORED_VALUES.keys() == IGNORED.keys(), "give a new option an example in IGNORED_VALUES"


@pytest.mark.parametrize(("key", "value"), IGNORED_VALUES.items(), ids=IGNORED_VALUES)
def test_ignored_option_changes_nothing(key, value, read, save):
    config = adalora() if key in {f.name for f in dataclasses.fields(AdaLoraConfig)} else lora()
    directory = save(config)
    before = content(read(directory))
    assert content(read(edit(directory, **{key: value}))) == before


# As PEFT makes them where it can on this model, else what it would write.
REFUSED = {
    "layer_replication": lora(layer_replication=[(0, 2), (1, 3)]),
    "target_parameters": lora(target_parameters=["mlp.down_proj.weight"]),
    "alora_invocation_tokens": lora(alora_invocation_tokens=[3, 4]),
    "use_bdlora": lora(
        use_bdlora=peft.tuners.lora.config.BdLoraConfig(nblocks=2, target_modules_bd_a=["q_proj", "v_proj"])
    ),
    "velora_config": lora(velora_config=peft.tuners.lora.config.VeloraConfig()),
    "monteclora_config": lora(monteclora_config=peft.tuners.lora.config.MontecloraConfig()),
    "kasa_config": lora(kasa_config=peft.tuners.lora.config.KasaConfig()),
    "task_type": {"task_type": "SEQ_CLS"},
    "megatron_config": {"megatron_config": {"tensor_model_parallel_size": 2}},
    "use_qalora": {"use_qalora": True},
    "arrow_config": {"arrow_config": {"top_k": 2}},
    "runtime_config": {"runtime_config": {"ephemeral_gpu_offload": True}},
}


def test_every_refused_option_has_an_example():
    assert REFUSED.keys() == DEFAULT_ONLY.keys(), "give a new option an example in REFUSED"


@pytest.mark.parametrize(("key", "made"), REFUSED.items(), ids=REFUSED)
def test_refused_option_is_refused_by_name(key, made, read, save):
    directory = edit(save(lora()), **made) if isinstance(made, dict) else save(made)
    error = refused(read, directory)
    assert error.metadata == {"field": key}
    assert key in error.message and find_format(key).text in error.message


def initialisations():
    """Every value that PEFT's own annotation of init_lora_weights lists."""
    annotation = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    # Its text leaves one out.
    named = {"lora_ga"} | {
        v for part in typing.get_args(annotation) for v in typing.get_args(part) if isinstance(v, str)
    }
    return sorted(re.sub(r"\[.*\]", "4", name) for name in named)


@pytest.mark.parametrize("init", initialisations())
def test_every_initialisation_is_served_or_refused_by_name(init, read, save):
    """Those that take a part of the base away would, served as they are, answer wrongly without a word."""
    entry = find_format("init_lora_weights", re.sub(r"_niter_\d+", "", init))
    assert entry is not None, NEW.format(f"init_lora_weights {init!r}", "formats.py")
    directory = edit(save(lora()), init_lora_weights=init)
    if entry.status is Status.SERVED:
        assert content(read(directory)) == content(read(save(lora(), "usual")))
        return
    error = refused(read, directory)
    assert error.metadata == {"field": "init_lora_weights"} and entry.text in error.message
