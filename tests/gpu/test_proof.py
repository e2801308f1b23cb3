"""The golden file that a CPU wrote, replayed on a GPU: the right adapter passes in fp32 and bf16, no other does."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from lorikeet.adapters.errors import AdapterProofError
from lorikeet.server.app import App

from ..devices import CPU, GPU, Place
from ..golden.golden_files import edit_config, golden_of, stamp, write_true_golden
from ..golden.in_process import serving
from ..golden.mixed_batch import Golden, make_golden, random_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("proof")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Eight adapters, made and proven on the CPU."""
    made = make_golden(Place("llama", CPU), tmp_path_factory.mktemp("proven"))
    for number, name in enumerate(made.names):
        write_true_golden(made.adapters / name, made.model, random_prompts(5, seed=number))
    return made


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def app(request: pytest.FixtureRequest, made: Golden) -> Iterator[App]:
    with serving(made.model, made.adapters, device=GPU, dtype=request.param, step_tokens=24, max_running=8) as app:
        yield app


def test_right_adapters_pass(app: App, made: Golden) -> None:
    exact = app.base.compute_dtype is torch.float32
    for name in made.names:
        proof = app.manager.load(name).proof
        assert proof.endswith(" of 0.01" if exact else " of 0.2"), name
        assert not exact or float(proof.split()[-3]) < 1e-3, proof


@pytest.mark.parametrize("wrong", ["scaling", "another", "unadapted"])
def test_wrong_adapter_is_refused(wrong: str, app: App, made: Golden) -> None:
    name = f"{wrong}-{app.base.compute_dtype}".replace(".", "-")
    directory = shutil.copytree(made.adapters / "plain-all", made.adapters / name)
    golden = golden_of(directory)
    match wrong:
        case "scaling":
            edit_config(directory, lora_alpha=24)  # it was 16
        case "another":
            golden = golden_of(made.adapters / "rslora")
        case "unadapted":
            edit_config(directory, lora_alpha=1e-4)
    stamp(directory, golden)
    with pytest.raises(AdapterProofError):
        app.manager.load(name)
