"""A golden file made with PEFT alone, replayed by the engine that serves: the right adapter passes, no other does.

The names of these tests are the traps: what other servers load without a word and answer wrongly.
"""

import dataclasses
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lorikeet.adapters.errors import AdapterInvalidError, AdapterProofError
from lorikeet.adapters.info import AdapterInfo
from lorikeet.server.app import App
from lorikeet.server.golden_reference import reference_logits
from lorikeet.server.proof import GoldenProver
from safetensors.torch import load_file, save_file

from ..conftest import TINY_ADAPTERS
from ..tiny import save_tiny_adapter, save_tiny_model
from .golden_files import edit_config, golden_of, stamp, write_true_golden
from .in_process import Call, greedy_params, serving

WEIGHTS = "adapter_model.safetensors"
Q1 = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def root(tiny_model: Path, tiny_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tiny adapter with its golden file."""
    directory = tmp_path_factory.mktemp("proven")
    for name in TINY_ADAPTERS:
        write_true_golden(shutil.copytree(tiny_adapters / name, directory / name), tiny_model)
    return directory


@pytest.fixture(scope="module")
def app(tiny_model: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """A server's parts; steps of 12 tokens, so that a prompt takes more than one."""
    state = tmp_path_factory.mktemp("state")
    with serving(tiny_model, root, step_tokens=12, max_running=8, state_dir=state / "s", cache_dir=state / "c") as app:
        yield app


@pytest.fixture
def in_16_bit(app: App) -> Iterator[None]:
    """The engine's float32 logits are judged as those of 16-bit arithmetic."""
    before, manager = app.manager.prover, app.manager
    size = app.base.vocab_size
    manager.prover = GoldenProver(app.engine, manager.hold, manager.release, 60.0, vocab_size=size, exact=False)
    yield
    manager.prover = before


@pytest.fixture
def copy(root: Path):
    """copy(name): a proven adapter under a name of its own, to be spoiled."""
    made: list[Path] = []

    def make(name: str = "cedar") -> Path:
        made.append(shutil.copytree(root / name, root / f"{name}-{secrets.token_hex(4)}"))
        return made[-1]

    yield make
    for directory in made:
        shutil.rmtree(directory)


def refused(app: App, directory: Path) -> AdapterProofError:
    """Load an adapter that must not get through: afterwards there is none of that id, and nothing is held."""
    with pytest.raises(AdapterProofError) as caught:
        app.manager.load(directory.name)
    assert app.manager.get(directory.name).digest == ""
    assert caught.value.message.split(" ")[1].startswith(f"{directory.name}@")
    return caught.value


def loaded(app: App, directory: Path) -> AdapterInfo:
    info = app.manager.load(directory.name)
    assert info.in_flight == 0
    return info


@pytest.mark.parametrize("name", TINY_ADAPTERS)
def test_right_adapter_passes_and_says_how_close_it_is(name, app, root):
    info = loaded(app, root / name)
    assert info.proof.startswith("golden file: 4 prompts, largest difference ") and info.proof.endswith(" of 0.01")
    assert float(info.proof.split()[-3]) < 1e-4


def test_proof_counts_as_no_request(app, copy):
    loaded(app, copy())
    text = [metric for metric in app.registry.collect() if metric.name == "lorikeet_requests"]
    assert not [s for metric in text for s in metric.samples if s.labels["adapter"].startswith("cedar-")]


def test_other_requests_go_on_and_are_answered_alike(app, copy, root):
    loaded(app, root / "amber")
    prompt = list(golden_of(root / "amber").prompts[1])
    alone = Call(app, "alone", "amber", prompt, greedy_params(24)).result()
    call = Call(app, "meanwhile", "amber", prompt, greedy_params(24))
    loaded(app, copy("birch"))
    assert call.result().token_ids == alone.token_ids


def test_weights_that_were_changed_since_are_refused_by_the_digest(app, copy):
    directory = copy()
    tensors = load_file(directory / WEIGHTS)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, directory / WEIGHTS)
    with pytest.raises(AdapterInvalidError, match="lorikeet adapters golden"):
        app.manager.load(directory.name)


def test_weights_that_were_changed_since_are_refused_by_the_logits(app, copy):
    directory = copy()
    golden = golden_of(directory)
    tensors = load_file(directory / WEIGHTS)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, directory / WEIGHTS)
    stamp(directory, golden)
    error = refused(app, directory)
    assert float(error.metadata["difference"]) > float(error.metadata["tolerance"]) == 0.01


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 12}, {"use_rslora": True}, {"alpha_pattern": {"down_proj": 4}}], ids=str
)
def test_wrong_scaling_is_refused(changes, app, copy):
    directory = copy()
    golden = golden_of(directory)
    edit_config(directory, **changes)
    stamp(directory, golden)
    refused(app, directory)


def test_missing_module_is_refused(app, copy):
    directory = copy()
    golden = golden_of(directory)
    tensors = load_file(directory / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if Q1 not in name}, directory / WEIGHTS)
    edit_config(directory, target_modules=None)
    stamp(directory, golden)
    refused(app, directory)


def test_layers_that_are_swapped_are_refused(app, copy):
    directory = copy()
    golden = golden_of(directory)

    def swapped(name: str) -> str:
        return re.sub(r"layers\.(\d)", lambda layer: f"layers.{1 - int(layer[1])}", name)

    save_file({swapped(name): tensor for name, tensor in load_file(directory / WEIGHTS).items()}, directory / WEIGHTS)
    stamp(directory, golden)
    refused(app, directory)


def test_another_adapter_is_refused(app, copy, root):
    directory = copy("amber")
    stamp(directory, golden_of(root / "birch"))
    refused(app, directory)


def test_unadapted_base_is_refused(app, copy, tiny_model):
    directory = copy("amber")
    golden = golden_of(directory)
    prompts = [list(prompt) for prompt in golden.prompts]
    plain = reference_logits(tiny_model, directory, prompts, progress=False).plain
    stamp(directory, dataclasses.replace(golden, logits=plain))
    refused(app, directory)


def test_another_base_of_the_same_shape_and_name_is_refused(app, copy, tmp_path, tiny_model):
    other = tmp_path / tiny_model.name
    save_tiny_model(other)
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    noise = {name: torch.randn(t.shape, generator=generator) * 0.05 * t.float().std() for name, t in tensors.items()}
    save_file({name: (t.float() + noise[name]).to(t.dtype) for name, t in tensors.items()}, other / "model.safetensors")
    directory = copy("amber")
    write_true_golden(directory, other)
    refused(app, directory)


def test_golden_file_is_no_part_of_the_version(app, copy):
    directory = copy()
    digest = loaded(app, directory).digest
    (directory / "lorikeet.golden.safetensors").unlink()
    assert loaded(app, directory).digest == digest


def test_refused_replacement_leaves_the_version_that_serves(app, copy, tiny_model):
    directory = copy("amber")
    before = loaded(app, directory)
    golden = golden_of(directory)
    save_tiny_adapter(tiny_model, directory, seed=99, rank=2)
    stamp(directory, golden)
    with pytest.raises(AdapterProofError):
        app.manager.load(directory.name)
    now = app.manager.get(directory.name)
    assert now.digest == before.digest and "golden file" in (now.error or "")
    call = Call(app, "still there", directory.name, list(golden.prompts[0]), greedy_params(3))
    assert call.result().finished is not None


def test_arithmetic_of_16_bits_is_tolerated_and_a_wrong_adapter_is_not(app, copy, in_16_bit):
    directory = copy()
    golden = golden_of(directory)
    noise = torch.randn(golden.logits.shape) * 0.05
    stamp(directory, dataclasses.replace(golden, logits=golden.logits + noise))
    assert loaded(app, directory).proof.endswith(" of 0.2")
    directory = copy()
    edit_config(directory, lora_alpha=12)
    stamp(directory, golden)
    refused(app, directory)
