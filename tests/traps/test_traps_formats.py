"""Traps of adapters that are more than plain LoRA, and of several in one request. PEFT is the judge.

Each is what others do by the field's own survey: drop a part in silence, refuse it, or run one configuration a batch.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from lorikeet.adapters.errors import AdapterIncompatibleError, AdapterInvalidError
from lorikeet.adapters.info import Tier
from safetensors.torch import load_file

from ..adapters.managing import CONFIG, WEIGHTS, wait_until
from ..base.family_models import VOCAB, save_family
from ..golden.format_oracle import FormatOracle, random_prompts
from ..golden.format_requests import ask, check
from ..golden.formats import Format, formats
from ..golden.in_process import serving
from .conftest import edit_config, edit_tensors

MADE = {
    *("plain", "one-linear", "rslora", "dora", "lora-bias", "bias-all", "pissa"),
    *("whole-head", "whole-norms", "lora-embedding", "lora-head", "tokens", "added-tokens"),
}

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's hints for training


class FormatWorld(NamedTuple):
    """A base, adapters by name as PEFT saved them, and PEFT itself."""

    model: Path
    made: dict[str, Format]
    oracle: FormatOracle


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("format-traps")
    save_family("qwen2", root / "model")  # has biases, and a head of its own
    oracle = FormatOracle(root / "model", root / "adapters", root / "pristine")
    made = {each.name: each for each in formats("qwen2") if each.name in MADE}
    assert made.keys() == MADE
    for number, each in enumerate(made.values()):
        oracle.make(each, seed=number)
    return FormatWorld(root / "model", made, oracle)


@pytest.fixture
def put(world, tmp_path):
    """put(name, folder=name): have the adapter's files in that folder of the server's root."""
    (tmp_path / "adapters").mkdir()
    return lambda name, folder="": Path(
        shutil.copytree(world.oracle.out / name, tmp_path / "adapters" / (folder or name))
    )


@pytest.fixture
def app(world, tmp_path, put):
    """A server on the root of `put`."""
    with serving(
        world.model, tmp_path / "adapters", cache_dir=tmp_path / "cache", step_tokens=24, max_running=12
    ) as app:
        yield app


def asking(app, *wanted):
    """Requests for these members, each with another prompt, at once."""
    prompts = random_prompts(len(wanted), (20, 40), VOCAB, seed=5)
    return [ask(app, f"trap-{i}", tuple(m), p, 6) for i, (m, p) in enumerate(zip(wanted, prompts, strict=True))]


def one(name):
    return ((name, 1.0),)


def check_mixed(app, world, put, *names):
    """The adapters, plain LoRA and the base in one batch all answer as PEFT answers with each alone."""
    for name in dict.fromkeys((*names, "plain")):
        put(name)
        app.manager.load(name)
    for asked in asking(app, *map(one, names), (), one("plain"), *map(one, names), ()):
        check(asked, world.oracle)


def test_dora_in_a_mixed_batch(app, world, put):
    """PEFT raises on it; vLLM and SGLang refuse DoRA, LoRAX does not read `use_dora` and serves the rest as LoRA."""
    check_mixed(app, world, put, "dora")


def test_dora_without_its_magnitudes_is_not_served_as_lora(app, put):
    """LoRAX, TGI: no check is seen; B·A alone is another adapter."""
    for name, change in (
        ("without", lambda folder: edit_tensors(folder, drop("magnitude"))),
        ("unsaid", lambda folder: edit_config(folder, use_dora=False)),
    ):
        change(put("dora", name))
        with pytest.raises((AdapterInvalidError, AdapterIncompatibleError), match=r"magnitude|use_dora"):
            app.manager.load(name)


def drop(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize("name", ["whole-head", "whole-norms"])
def test_modules_to_save_are_not_silently_ignored(name, app, world, put):
    """SGLang does not read the key; LoRAX and TGI drop the tensors; TensorRT-LLM has one head for all adapters."""
    check_mixed(app, world, put, name)
    folder = put(name, "stripped")
    module = "lm_head" if name == "whole-head" else "norm"
    edit_tensors(folder, drop(module))
    with pytest.raises((AdapterInvalidError, AdapterIncompatibleError), match=r"modules_to_save|lm_head|norm"):
        app.manager.load("stripped")


@pytest.mark.parametrize("name", ["lora-embedding", "lora-head"])
def test_lora_on_embedding_and_head_is_not_skipped(name, app, world, put):
    """TensorRT-LLM: skipped without a word in `iterate_hf_lora`; vLLM: where the model declares it only."""
    check_mixed(app, world, put, name)


@pytest.mark.parametrize("name", ["tokens", "added-tokens"])
def test_trained_and_added_tokens_are_not_cut_off(name, app, world, put):
    """vLLM has removed extra vocabulary, SGLang rejects it, others load the rest."""
    check_mixed(app, world, put, name)


def test_bias_is_not_silently_ignored(app, world, put):
    """SGLang and LoRAX do not read `bias` and `lora_bias`; vLLM refuses them."""
    check_mixed(app, world, put, "lora-bias", "bias-all")


def test_pissa_is_not_served_over_the_unchanged_base(app, world, put):
    """SGLang, LoRAX and TGI do not look: A and B that were taken out of the base are added to it once more."""
    edit_config(put("pissa", "as-trained"), init_lora_weights="pissa_niter_4")
    with pytest.raises(AdapterIncompatibleError, match="path_initial_model_for_weight_conversion"):
        app.manager.load("as-trained")
    check_mixed(app, world, put, "pissa")


def test_slot_that_is_used_again_keeps_no_gain_and_no_module(world, put, tmp_path):
    """sglang#7426 with more to leave behind: magnitudes, biases, heads, token rows."""
    names = ("dora", "one-linear", "lora-bias", "plain", "whole-norms", "one-linear", "tokens", "plain")
    for name in set(names):
        put(name)
    with serving(world.model, tmp_path / "adapters", cache_dir=tmp_path / "cache", adapter_slots=1) as app:
        for name in names:
            app.manager.load(name)
            for asked in asking(app, one(name), ()):
                check(asked, world.oracle)


def test_whole_modules_count_as_bytes(app, put):
    """lorax#53: memory runs out although the number of adapters is in its limit."""
    folder = put("whole-head")
    size = app.manager.load("whole-head").bytes
    elements = sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())
    assert elements * 4 <= size < elements * 4 + 4096 and (folder / CONFIG).is_file()
    asking(app, one("whole-head"))[0].wait()
    assert app.manager.snapshot().bytes_used[Tier.DEVICE] >= size
    app.manager.unload("whole-head")
    wait_until(lambda: app.manager.store.used_bytes == 0, "the memory")


def test_strength_of_one_request_is_not_another_s(app, world, put, prompt):
    """llama.cpp#10374: one global scale; and its cache does not know with which scale it was filled."""
    put("plain")
    app.manager.load("plain")
    wanted = [(("plain", weight),) for weight in (1.0, 0.5, -1.0, 0.25)] + [()]
    for turn in range(2):
        calls = [ask(app, f"scale-{turn}-{i}", members, prompt, 6) for i, members in enumerate(wanted)]
        for asked in calls:
            check(asked, world.oracle)


def test_composition_is_batched_with_everything_else(app, world, put):
    """llama.cpp batches requests of one LoRA configuration only; vLLM and SGLang have one adapter a request."""
    for name in ("plain", "one-linear", "rslora", "dora"):
        put(name)
        app.manager.load(name)
    two, other = (("plain", 0.7), ("one-linear", 0.3)), (("one-linear", -1.5), ("rslora", 0.5), ("plain", 0.1))
    for asked in asking(app, two, one("plain"), other, (), one("dora"), two):
        check(asked, world.oracle)


def test_composition_makes_no_adapter(app, world, put):
    """LoRAX builds a merged adapter first: it takes memory, and every pair of weights another one."""
    for name in ("plain", "one-linear"):
        put(name)
        app.manager.load(name)
        asking(app, one(name))[0].wait()
    before = app.manager.snapshot().bytes_used
    for weight in (0.1, 0.2, 0.3):
        for asked in asking(app, (("plain", weight), ("one-linear", 1 - weight))):
            check(asked, world.oracle)
    assert app.manager.snapshot().bytes_used == before and len(app.manager.list()) == 2
