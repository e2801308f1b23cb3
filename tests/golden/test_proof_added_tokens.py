"""`lorikeet adapters golden` for an adapter with more tokens than its base, and the server that replays the file."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lorikeet.adapters.errors import AdapterProofError
from lorikeet.adapters.golden import GOLDEN_FILE, read_golden, write_golden
from lorikeet.adapters.inspection import inspect_directory
from lorikeet.server.app import App
from lorikeet.server.cli import run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .in_process import serving
from .peft_oracle import nf4_model

ADDED = 5
PROMPTS = ("In the beginning", "parrot and fox", "Größe 🦜")
WEIGHTS = "adapter_model.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's hints for training


def save_wide_adapter(model: Path, directory: Path) -> None:
    """LoRA, and embeddings and head with added rows, as PEFT saves them."""
    torch.manual_seed(11)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    size = base.config.vocab_size
    base.resize_token_embeddings(size + ADDED, mean_resizing=False)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter[size:].normal_(std=0.3)
    adapted.save_pretrained(directory, save_embedding_layers=True)


@pytest.fixture(scope="module")
def root(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter, `wide`, with the golden file that the command wrote."""
    directory = tmp_path_factory.mktemp("wide")
    save_wide_adapter(tiny_model, directory / "wide")
    prompts = [argument for text in PROMPTS for argument in ("--prompt", text)]
    assert run(["adapters", "golden", str(directory / "wide"), "--model", str(tiny_model), *prompts]) == 0
    return directory


@pytest.fixture(scope="module")
def app(tiny_model: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    state = tmp_path_factory.mktemp("state")
    with serving(tiny_model, root, state_dir=state / "s", cache_dir=state / "c") as app:
        yield app


def digest_of(directory: Path) -> str:
    return inspect_directory(directory, None, check_golden=False).digest


@torch.inference_mode()
def test_file_holds_peft_s_answers_for_every_token(root: Path, tiny_model: Path) -> None:
    golden = read_golden(root / "wide", digest=digest_of(root / "wide"))
    assert golden is not None and len(golden.prompts) == len(PROMPTS)
    base = nf4_model(tiny_model)
    size = base.config.vocab_size
    assert golden.vocab_size == size + ADDED
    base.resize_token_embeddings(size + ADDED, mean_resizing=False)
    model = PeftModel.from_pretrained(base, str(root / "wide")).eval()
    want = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in golden.prompts])
    torch.testing.assert_close(golden.logits, want, atol=1e-5, rtol=1e-5)


def test_server_replays_it_on_the_wider_vocabulary(app: App, root: Path) -> None:
    assert app.manager.load("wide").proof.startswith("golden file: ")


def test_added_rows_take_part_in_the_proof(app: App, root: Path) -> None:
    """A server that lost, or mixed up, the rows of added tokens would be found out."""
    spoiled = shutil.copytree(root / "wide", root / "spoiled")
    golden = read_golden(spoiled, digest=digest_of(spoiled))
    assert golden is not None
    tensors = load_file(spoiled / WEIGHTS)
    (head,) = [name for name in tensors if name.endswith("lm_head.weight") or "lm_head.base_layer.weight" in name]
    tensors[head][-ADDED:] *= -20
    save_file(tensors, spoiled / WEIGHTS, {"format": "pt"})
    (spoiled / GOLDEN_FILE).unlink()
    golden = type(golden)(digest_of(spoiled), golden.prompts, golden.logits, golden.tolerance, golden.made_by)
    write_golden(spoiled, golden)
    with pytest.raises(AdapterProofError, match="does not answer as its golden file says"):
        app.manager.load("spoiled")
