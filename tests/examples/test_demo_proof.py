"""Each demo adapter proves itself with the prompts and tolerance of `lorikeet adapters golden`, and nothing else does.

What the tolerance lets through and what it does not is measured in adapters/golden_comparison.py; this holds it there.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lorikeet.adapters.errors import AdapterProofError
from lorikeet.adapters.golden import DEFAULT_TOLERANCE, Golden, write_golden
from lorikeet.adapters.golden_comparison import difference
from lorikeet.adapters.inspection import inspect_directory
from lorikeet.server.app import App
from lorikeet.server.base.demo import MODEL_DIR_NAME
from lorikeet.server.cli_golden import DEFAULT_PROMPTS
from lorikeet.server.config import default_cache_dir
from lorikeet.server.golden_reference import encode
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..golden.in_process import serving
from ..golden.peft_oracle import nf4_model

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
NAMES = sorted(p.name for p in EXAMPLES.iterdir() if p.is_dir())
BASE = Path(os.environ.get("LORIKEET_CACHE_DIR") or default_cache_dir()) / MODEL_DIR_NAME

pytestmark = [
    pytest.mark.skipif(not BASE.is_dir(), reason="no demo base in the cache; `make demo` prepares it"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys"),  # PEFT on AdaLoRA; it is not so
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return encode(BASE, DEFAULT_PROMPTS)


@pytest.fixture(scope="module")
def references(prompts: list[list[int]]) -> dict[str, Tensor]:
    """PEFT's logits by adapter, "" for none: those of LoRA first, and then, with these unloaded, of AdaLoRA."""

    # All at once; a token sees none of those that fill up its row behind it.
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts])

    def rows(model: Any) -> Tensor:
        with torch.inference_mode():
            return model(ids, use_cache=False).logits[torch.arange(len(prompts)), ends].float()  # type: ignore[no-any-return]

    base: Any = nf4_model(BASE)
    found = {"": rows(base)}
    methods = {name: json.loads((EXAMPLES / name / "adapter_config.json").read_text())["peft_type"] for name in NAMES}
    for method in sorted(set(methods.values())):
        first, *others = (name for name in NAMES if methods[name] == method)
        model = PeftModel.from_pretrained(base, str(EXAMPLES / first), adapter_name=first).eval()
        for name in others:
            model.load_adapter(str(EXAMPLES / name), name)
        for name in (first, *others):
            model.set_adapter(name)
            found[name] = rows(model.eval())
        base = model.unload()
        assert torch.equal(rows(base), found[""])
    return found


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, demo_cache: Path) -> Iterator[App]:
    root, state = tmp_path_factory.mktemp("adapters"), tmp_path_factory.mktemp("state")
    sizes = {"kv_cache_bytes": "64MiB", "adapter_device_bytes": "64MiB"}
    with serving(BASE, root, state_dir=state / "s", cache_dir=state / "c", base_cache=demo_cache, **sizes) as app:
        yield app


def put(app: App, adapter_id: str, source: str, logits: Tensor, prompts: list[list[int]], factor: float = 1.0) -> None:
    """A copy of a demo adapter, its scaling multiplied, with a golden file of these logits."""
    directory = shutil.copytree(EXAMPLES / source, app.config.adapters[0] / adapter_id)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config["lora_alpha"] *= factor
    config["alpha_pattern"] = {key: value * factor for key, value in (config.get("alpha_pattern") or {}).items()}
    path.write_text(json.dumps(config))
    digest = inspect_directory(directory, None).digest
    write_golden(directory, Golden(digest, tuple(map(tuple, prompts)), logits, DEFAULT_TOLERANCE, "a test"))


@pytest.mark.parametrize("name", NAMES)
def test_right_adapter_passes(name, app, references, prompts):
    put(app, f"{name}-right", name, references[name], prompts)
    proof = app.manager.load(f"{name}-right").proof
    assert proof.startswith("golden file: 6 prompts") and float(proof.split()[-3]) < 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1.5, 0.5])
def test_wrong_scaling_is_refused_even_where_16_bit_arithmetic_is_tolerated(name, factor, app, references, prompts):
    put(app, f"{name}-{factor}", name, references[name], prompts, factor)
    with pytest.raises(AdapterProofError) as caught:
        app.manager.load(f"{name}-{factor}")
    assert float(caught.value.metadata["difference"]) > 2 * DEFAULT_TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_base_and_other_adapters_are_far_away(name, references):
    for other, logits in references.items():
        if other != name:
            assert difference(references[name], logits).max() > 2 * DEFAULT_TOLERANCE
