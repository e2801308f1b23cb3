"""adapter_config.json: every key is served, ignored for a reason, or refused by name."""

import dataclasses
import json

import pytest
from lorikeet.adapters.config import parse_config
from lorikeet.adapters.config_fields import DEFAULT_ONLY, IGNORED, SERVED
from lorikeet.adapters.errors import AdapterIncompatibleError, AdapterInvalidError
from lorikeet.adapters.patterns import TargetMatcher, compile_pattern
from lorikeet.adapters.scaling import resolve_scaling
from peft import AdaLoraConfig, LNTuningConfig, LoraConfig, TrainableTokensConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

Q0 = "model.layers.0.self_attn.q_proj"
MODULES = [
    f"model.layers.{i}.{name}"
    for i in (0, 1, 2, 11)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.xq_proj")
] + ["lm_head", "q_proj", "model.h.3.q_proj"]


def parse(**changes):
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | changes
    return parse_config(json.dumps(raw).encode())


@pytest.mark.parametrize("cls", [LoraConfig, AdaLoraConfig, TrainableTokensConfig, LNTuningConfig])
def test_every_field_of_the_installed_peft_is_classified(cls):
    fields = {field.name for field in dataclasses.fields(cls)}
    assert not fields - SERVED - IGNORED.keys() - DEFAULT_ONLY.keys(), "new PEFT fields: say what happens to them"


def test_no_field_is_classified_twice():
    assert not SERVED & IGNORED.keys() and not SERVED & DEFAULT_ONLY.keys() and not IGNORED.keys() & DEFAULT_ONLY.keys()
    assert all(IGNORED.values())


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(),
        AdaLoraConfig(total_step=1),
        LoraConfig(init_lora_weights="eva"),
        LoraConfig(modules_to_save=[]),
        TrainableTokensConfig(token_indices=[3]),
        LNTuningConfig(),
    ],
    ids=["lora", "adalora", "eva", "empty_modules_to_save", "trainable_tokens", "ln_tuning"],
)
def test_defaults_of_peft_are_served(config, tmp_path):
    config.save_pretrained(tmp_path)
    parse_config((tmp_path / "adapter_config.json").read_bytes())


REFUSED = {
    "layer_replication": [[0, 2], [1, 3]],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "alora_invocation_tokens": [5],
    "megatron_config": {"tensor_parallel": 2},
    "runtime_config": {"ephemeral_gpu_offload": True},
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"x": 1},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 0.1},
    "task_type": "SEQ_CLS",
}


def test_every_default_only_field_has_a_refused_example():
    assert REFUSED.keys() == DEFAULT_ONLY.keys()


@pytest.mark.parametrize(("key", "value"), REFUSED.items(), ids=REFUSED)
def test_unserved_setting_is_refused_by_name(key, value):
    with pytest.raises(AdapterIncompatibleError, match=key) as error:
        parse(**{key: value})
    assert error.value.metadata == {"field": key}
    parse(**{key: None})


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_16", "PiSSA", "olora", "loftq", "corda", "lora_ga", "something_new", 3]
)
def test_base_changing_init_is_refused_by_name(init):
    with pytest.raises(AdapterIncompatibleError, match="init_lora_weights"):
        parse(init_lora_weights=init)


@pytest.mark.parametrize("init", ["pissa_niter_16", "olora", "corda", "lora_ga"])
def test_what_peft_can_convert_is_refused_with_the_call_that_does(init):
    with pytest.raises(AdapterIncompatibleError, match="path_initial_model_for_weight_conversion"):
        parse(init_lora_weights=init)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"use_dora": True, "lora_bias": True}, "use_dora"),
        ({"use_dora": True, "peft_type": "ADALORA"}, "use_dora"),
        ({"token_indices": [1]}, "token_indices"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_by_name(changes, key):
    with pytest.raises(AdapterIncompatibleError, match=key) as error:
        parse(**changes)
    assert error.value.metadata == {"field": key}


@pytest.mark.parametrize("init", [None, True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_init_that_leaves_the_base_is_served(init):
    parse(init_lora_weights=init)


@pytest.mark.parametrize("value", [True, 1, 0.5, "x", [0], {"a": None}])
def test_unknown_key_is_refused_by_name(value):
    with pytest.raises(AdapterIncompatibleError, match="brand_new_option"):
        parse(brand_new_option=value)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_empty_unknown_key_is_ignored(value):
    parse(brand_new_option=value)


@pytest.mark.parametrize("peft_type", ["VERA", "IA3", "PROMPT_TUNING", "LOHA", "lora", 7, ["LORA"]])
def test_unknown_peft_type_is_refused_by_name(peft_type):
    with pytest.raises(AdapterIncompatibleError, match="peft_type"):
        parse(peft_type=peft_type)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'"x"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"peft_type": null}'],
    ids=["empty", "cut", "list", "string", "no_type", "binary", "nested", "null_type"],
)
def test_config_that_is_not_a_peft_config_is_invalid(data):
    with pytest.raises(AdapterInvalidError):
        parse_config(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": -1},
        {"r": 1.5},
        {"r": "8"},
        {"r": True},
        {"r": 10**9},
        {"lora_alpha": "8"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"use_rslora": "yes"},
        {"rank_pattern": [1]},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": {"q_proj": True}},
        {"target_modules": 3},
        {"target_modules": [1]},
        {"target_modules": "(unclosed"},
        {"rank_pattern": {"(": 3}},
        {"layers_to_transform": ["a"]},
        {"layers_to_transform": -1},
        {"target_modules": ".*q_proj", "layers_to_transform": [1]},
        {"base_model_name_or_path": 3},
        {"bias": "some"},
        {"bias": True},
        {"use_dora": 1},
        {"modules_to_save": 3},
        {"modules_to_save": [""]},
        {"trainable_token_indices": "x"},
        {"trainable_token_indices": [-1]},
        {"trainable_token_indices": [1, 2, 1]},
        {"trainable_token_indices": {"embed_tokens": [True]}},
        {"trainable_token_indices": {"embed_tokens": 3}},
        {"peft_type": "ADALORA", "rank_pattern": {Q0: [True]}},
        {"peft_type": "ADALORA", "rank_pattern": {f"{Q0}.lora_E": 3}},
    ],
    ids=str,
)
def test_value_of_wrong_type_or_range_is_invalid(changes):
    with pytest.raises(AdapterInvalidError):
        parse(**changes)


@pytest.mark.parametrize("pattern", [r"(a+)+b", r"(a|a)*b", r"((x*)y)*", r"(.*,){2,}x", r"(?:a|b)+", ".*" * 13])
def test_pattern_that_could_match_for_ever_is_refused(pattern):
    with pytest.raises(AdapterIncompatibleError, match="regular expression"):
        parse(target_modules=pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.up)",
        r"model\.layers\.(0|1|2)\.[^.]+\.(q_proj|[)(]x)?$",
        r"[*+(]*\(a+\)+",
    ],
)
def test_usual_patterns_are_accepted(pattern):
    compile_pattern("target_modules", pattern, pattern)


def _targets(**kwargs):
    fields = {
        "target_modules": ["q_proj"],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return fields | kwargs


@pytest.mark.parametrize(
    "kwargs",
    [
        _targets(),
        _targets(target_modules=["q_proj", "mlp.down_proj"]),
        _targets(target_modules=["model.layers.1.self_attn.q_proj", "k_proj"], layers_to_transform=[0]),
        _targets(target_modules=r".*layers\.(0|11)\..*proj"),
        _targets(target_modules=r"q_proj"),
        _targets(target_modules=[]),
        _targets(exclude_modules=["layers.0.self_attn.q_proj"]),
        _targets(exclude_modules=r".*layers\.1\..*"),
        _targets(layers_to_transform=[1, 2]),
        _targets(layers_to_transform=0),
        _targets(layers_to_transform=[]),
        _targets(layers_to_transform=[1, 3], layers_pattern="layers"),
        _targets(layers_to_transform=[1, 3], layers_pattern=["h", "blocks"]),
        _targets(layers_to_transform=[1, 11], layers_pattern=[]),
    ],
    ids=str,
)
def test_targets_equal_peft(kwargs):
    peft = LoraConfig(**kwargs)
    ours = parse(**kwargs).targets
    assert {m for m in MODULES if ours(m)} == {m for m in MODULES if check_target_module_exists(peft, m)}


def test_all_linear_targets_every_site():
    assert all(parse(target_modules="all-linear").targets(m) for m in MODULES)


def test_missing_target_modules_restricts_nothing():
    targets = TargetMatcher(None, None, (), ())
    assert all(map(targets, MODULES)) and not targets.explicit


PATTERNS = [
    {},
    {"q_proj": 16},
    {"layers.1.self_attn.q_proj": 3, "q_proj": 5},
    {"q_proj": 5, "layers.1.self_attn.q_proj": 3},
    {"^model.layers.0.self_attn.q_proj": 2, r".*down_proj": 9, "proj": 4},
    {r"layers\.\d\.mlp\..*": 6, "(q|k)_proj": 7, "x": 1},
]


@pytest.mark.parametrize("ranks", PATTERNS, ids=str)
@pytest.mark.parametrize("alphas", PATTERNS, ids=str)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_patterns_are_resolved_like_peft(ranks, alphas, use_rslora):
    config = parse(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=use_rslora)
    for module in MODULES:
        rank = ranks.get(get_pattern_key(ranks.keys(), module), 4)
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), 8)
        assert resolve_scaling(config, module) == (rank, pytest.approx(alpha / (rank**0.5 if use_rslora else rank)))


def test_adalora_scaling_uses_the_initial_rank():
    config = parse(peft_type="ADALORA", init_r=12, r=3, rank_pattern={f"{Q0}.lora_E": [True] * 5 + [False] * 7})
    assert resolve_scaling(config, Q0) == (5, pytest.approx(8 / (12 + 1e-5)))
    assert resolve_scaling(config, "model.layers.1.self_attn.q_proj") == (12, pytest.approx(8 / (12 + 1e-5)))


def test_adalora_rank_pattern_may_carry_the_adapter_name():
    config = parse(peft_type="ADALORA", rank_pattern={f"{Q0}.lora_E.default": [True, False]})
    assert resolve_scaling(config, Q0).rank == 1


def test_messages_show_long_values_shortened():
    with pytest.raises(AdapterIncompatibleError) as error:
        parse(unknown_key="x" * 100_000)
    assert len(error.value.message) < 400
