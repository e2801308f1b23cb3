"""Traps of adapters' content: what other servers scale wrongly, drop, or load without applying. PEFT is the judge."""

import shutil

import pytest
from lorikeet.adapters.errors import (
    AdapterIncompatibleError,
    AdapterInvalidError,
    AdapterNotFoundError,
    ServingError,
)
from lorikeet.adapters.info import AdapterState

from ..adapters.managing import WEIGHTS
from .conftest import answer, call, edit_config, edit_tensors


@pytest.mark.parametrize("name", ["rslora", "patterns", "wide", "plain"])
def test_rslora_alpha_pattern_and_rank_pattern_are_exact(name, world, put, serve, prompt):
    """sglang#40835, TensorRT-LLM#1668: rsLoRA with scale alpha / r; patterns not read: other answers, and no error.

    Also vllm#10798: outputs that do not match PEFT's; vllm#14435, #2847: ranks that the server was not started for.
    """
    put(name)
    app = serve()
    app.manager.load(name)
    world.check(name, prompt, answer(app, name, prompt).token_ids)


def test_scales_are_what_peft_applies(put, serve):
    """sglang#40835: the report says which scale each slice got, so that nobody has to guess."""
    put("rslora"), put("patterns")
    app = serve()
    assert {s.factor for s in app.manager.load("rslora").slices.values()} == {7 / 5**0.5}
    slices = app.manager.load("patterns").slices
    found = {name: (s.rank, s.factor) for name, s in slices.items()}
    assert found["q_proj"] == (17, 9 / 17) and found["up_proj"] == (4, 2.0)
    down = {name: value for name, value in found.items() if "down_proj" in name}
    assert set(down.values()) == {(3, 2 / 3), (4, 2 / 4)}, "one layer differs from the others"


@pytest.mark.parametrize("name", ["some-layers", "ragged", "narrow"])
def test_missing_layers_do_not_drop_a_module_type(name, world, put, serve, prompt):
    """LoRAX, TGI: if one layer lacks a module, `LoraWeights.load` returns None and no layer gets it."""
    put(name)
    app = serve()
    info = app.manager.load(name)
    assert info.num_modules == {"some-layers": 4, "ragged": 3, "narrow": 1}[name]
    tokens = answer(app, name, prompt).token_ids
    world.check(name, prompt, tokens)


def wrong_prefix(folder):
    edit_tensors(folder, lambda tensors: {f"language_model.{name}": tensor for name, tensor in tensors.items()})


def other_modules(folder):
    edit_tensors(folder, lambda t: {name.replace("self_attn", "attention"): v for name, v in t.items()})


def layers_beyond_the_base(folder):
    edit_tensors(folder, lambda t: {name.replace("layers.", "layers.1"): v for name, v in t.items()})


def filter_matches_nothing(folder):
    edit_config(folder, target_modules=["nothing_proj"])


def zero_delta(folder):
    edit_tensors(folder, lambda t: {name: v * ("lora_A" in name) for name, v in t.items()})


@pytest.mark.parametrize(
    "spoil", [wrong_prefix, other_modules, layers_beyond_the_base, filter_matches_nothing, zero_delta]
)
def test_adapter_that_would_answer_like_the_base_is_refused(spoil, put, serve, prompt):
    """vllm#34186, #55193, #41754; text-generation-inference#2441; unsloth#2142: it "loads", and the base answers."""
    spoil(put("plain"))
    app = serve()
    with pytest.raises((AdapterInvalidError, AdapterIncompatibleError)) as raised:
        app.manager.load("plain")
    assert app.manager.get("plain").error == raised.value.message
    with pytest.raises(AdapterNotFoundError, match="failed to load"):
        call(app, "plain", prompt)


def test_one_tensor_that_cannot_be_applied_refuses_the_adapter_by_name(put, serve):
    """SGLang, LoRAX, TGI: a warning in the log, and the rest is served."""
    for extra in ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", "lm_head.bias"):
        folder = put("plain")
        edit_tensors(folder, lambda tensors, extra=extra: tensors | {extra: next(iter(tensors.values())).clone()})
        with pytest.raises((AdapterInvalidError, AdapterIncompatibleError)) as raised:
            serve().manager.load("plain")
        assert extra in raised.value.message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_qalora", True),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [5]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("init_lora_weights", "pissa"),
        ("peft_type", "VERA"),
    ],
)
def test_what_is_not_supported_is_refused_and_not_ignored(setting, value, put, serve):
    """vllm#9280 and SGLang, where settings are not read: the adapter answers as another one."""
    edit_config(put("plain"), **{setting: value})
    with pytest.raises(AdapterIncompatibleError, match=setting):
        serve().manager.load("plain")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_dora", True), ("lora_bias", True), ("modules_to_save", ["lm_head"]), ("trainable_token_indices", [3, 5])],
)
def test_what_the_config_says_and_the_file_lacks_is_refused(setting, value, put, serve):
    """SGLang and LoRAX read neither the key nor the tensors, so a file cut short is served as plain LoRA."""
    edit_config(put("plain"), **{setting: value})
    with pytest.raises((AdapterInvalidError, AdapterIncompatibleError)):
        serve().manager.load("plain")


def test_load_of_a_path_that_does_not_exist_is_no_success(world, put, serve, prompt):
    """vllm#12199, #18372: dynamic loading answers OK for a path without files, and the output does not change."""
    app = serve()
    for source in (None, "nowhere", "/nonexistent"):
        with pytest.raises(ServingError):
            app.manager.load("plain", source)
    assert app.manager.list() == []
    put("plain")
    app.manager.load("plain")
    tokens = answer(app, "plain", prompt).token_ids
    world.check("plain", prompt, tokens)
    assert tokens != answer(app, "", prompt).token_ids


def test_pickle_is_never_opened(put, serve, tmp_path):
    """vllm's docs/usage/security: loading is "not a secure operation". A pickle can run code, so none is read."""
    folder = put("plain")
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR.")
    shutil.copy(folder / "adapter_model.bin", put("narrow") / WEIGHTS)
    app = serve()
    for name in ("plain", "narrow"):
        with pytest.raises(AdapterInvalidError):
            app.manager.load(name)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("source", ["../../etc", "/etc", "..", ".", "a/../../b", "~root", "link"])
def test_load_path_is_contained(source, put, serve, tmp_path):
    """vLLM's filesystem resolver joins the client's model name to a directory and does not look where that leads."""
    outside = shutil.copytree(put("plain"), tmp_path / "outside")
    (tmp_path / "adapters" / "link").symlink_to(outside)
    app = serve()
    with pytest.raises(ServingError) as raised:
        app.manager.load("x", source)
    assert raised.value.code in ("INVALID_ARGUMENT", "NOT_FOUND") and str(tmp_path) not in raised.value.message
    for name in (source, f"../{source}", "x/../plain"):
        with pytest.raises(ServingError):
            app.manager.resolve(name)
    assert all(info.state is not AdapterState.READY for info in app.manager.list())
