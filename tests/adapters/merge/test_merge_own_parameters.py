"""Parameters that no adapter changes, of architectures that have more than weights and biases, come out as they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lorikeet.adapters.merge.merged import MergedModel
from lorikeet.adapters.merge.targets import Onto, Target
from lorikeet.server.errors import BaseModelError
from lorikeet.server.merge_job import merge
from lorikeet.server.merge_plan import MergeRequest, plan_merge
from lorikeet.server.merge_source import CheckpointWeights, _DenseRows
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DiffLlamaConfig

from ...base.family_models import COMMON, save_model


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def request_of(base: Path, root: Path, to: Target, **settings: Any) -> MergeRequest:
    """To merge an adapter that does nothing, since its weight is zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(root / "adapter")
    return MergeRequest(str(base), (root / "adapter",), to, root / "out", weights=(0.0,), **settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("own") / "model"
    save_model(DiffLlamaConfig(**COMMON), directory)
    return directory


def test_a_merge_that_changes_nothing_keeps_every_tensor(base: Path, tmp_path: Path) -> None:
    request = request_of(base, tmp_path, Target.BF16, onto=Onto.ORIGINAL)
    merge(plan_merge(request), lambda *_: None, lambda: False)
    expected, found = tensors(base), tensors(tmp_path / "out")
    assert found.keys() == expected.keys() and any("lambda_k1" in name for name in found)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class _State:
    """A `MergeBase` of tensors in memory; its sites and modules are of no module here."""

    def __init__(self, state: Mapping[str, Tensor], real: CheckpointWeights) -> None:
        self.sites, self.modules, self.linears = real.sites, real.modules, frozenset[str]()
        self.shapes = {name: tuple(value.shape) for name, value in state.items()}
        self._state = state

    def open(self, name: str) -> _DenseRows:
        return _DenseRows(self._state[name])


def test_parameters_of_any_number_of_dimensions_are_copied_whole(base: Path) -> None:
    torch.manual_seed(7)
    shapes: list[tuple[int, ...]] = [(), (1,), (5,), (3, 7), (4, 300, 1100), (2, 3, 4, 5), (3, 0)]
    state = {f"model.layers.0.mlp.own_{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    state |= {"model.conv.weight": torch.randn(6, 1, 4), "model.gate_up_proj": torch.randn(2, 6, 4)}
    state["lm_head.scale"] = torch.randn(3)  # of the head, and yet not as long as the vocabulary
    merged: Any = MergedModel(_State(state, CheckpointWeights(str(base), base)), (), lambda: None)
    for parameter in merged.parameters(frozenset()):
        values = torch.cat([piece.reshape(-1) for piece in merged.read(parameter)])
        assert torch.equal(values.view(parameter.shape), state[parameter.name]), parameter.name


def test_a_4_bit_weight_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    out = merge(plan_merge(request_of(base, tmp_path, Target.NF4)), lambda *_: None, lambda: False).out
    name = "model.layers.0.self_attn.k_proj.weight"
    state = tensors(out)
    for part in [key for key in state if key.startswith(name)]:
        state[part] = state[part.replace("k_proj", "q_proj")]
    for file in out.glob("*.safetensors"):
        save_file({key: value.clone() for key, value in state.items()}, file)
    with pytest.raises(BaseModelError, match=r"k_proj.weight is \[128, 128\]; the config asks for \[64, 128\]"):
        CheckpointWeights(str(out), out).open(name)
