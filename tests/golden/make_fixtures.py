"""Writes tests/golden/fixtures: an adapter of each format as PEFT saves it, and what PEFT answers with it.

Run from the directory that holds the package, after a change of the formats or of PEFT's:

    python -m lorikeet.tests.golden.make_fixtures

The base is not stored: its weights are computed from integers, alike on every machine.
"""

import dataclasses
import json
import shutil
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from ..base.family_models import save_tokenizer
from .format_oracle import FormatOracle
from .formats import CONFIG, WEIGHTS, Format, formats

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = FIXTURES / "expected.safetensors"
BASE = "tiny-qwen2"
VOCAB = 31
# Every row of the embedding that an adapter has for itself is among them; added tokens are not.
PROMPT = (3, 7, 30, 11, 5, 4, 9, 22, 7, 15, 3, 28)

# What is another spelling of the same, or no other format to who reads it.
_LEFT_OUT = {
    "one-linear",
    "regex",
    "exclude",
    "gaussian",
    "whole-embedding-and-head",
    "dora-rslora",
    "dora-bias-all",
    "fp16",
    "bf16",
}


def fixture_formats() -> dict[str, Format]:
    """The formats of an untied base with biases, at rank 2, in bf16, by name."""
    return {
        made.name: dataclasses.replace(made, config=_small(made.config), dtype=torch.bfloat16)
        for made in formats("qwen2")
        if made.respell is None and made.name not in _LEFT_OUT
    }


def save_base(directory: Path) -> Path:
    """Save the base of the fixtures; returns where."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = _values(parameter.numel(), seed=zlib.crc32(name.encode())).view(parameter.shape)
            parameter.copy_(1 + values if "norm" in name else values)
    path = directory / BASE
    model.save_pretrained(path)
    save_tokenizer(path, VOCAB)
    return path


def make_all(workspace: Path) -> FormatOracle:
    """Make every adapter with today's PEFT; they are in the `out` of what is returned.

    Args:
        workspace: an empty folder.
    """
    oracle = FormatOracle(save_base(workspace), workspace / "adapters", workspace / "pristine")
    for number, made in enumerate(fixture_formats().values()):
        oracle.make(made, seed=number)
        path = oracle.out / made.name / CONFIG
        path.write_text(json.dumps(_settled(json.loads(path.read_text())), indent=2, sort_keys=True) + "\n")
    return oracle


def main() -> None:
    """Replace the fixtures."""
    warnings.simplefilter("ignore")
    shutil.rmtree(FIXTURES, ignore_errors=True)
    expected: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as workspace:
        oracle = make_all(Path(workspace))
        for name, made in fixture_formats().items():
            (FIXTURES / name).mkdir(parents=True)
            for file in (CONFIG, WEIGHTS):
                shutil.copy(oracle.out / name / file, FIXTURES / name / file)
            expected[name] = oracle.logits_of(made, FIXTURES / name, PROMPT)[-1].clone()
    save_file(expected, EXPECTED)


def _settled(config: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two runs: PEFT writes sets of names in any order, and where the base was."""
    in_order = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    return in_order | {"base_model_name_or_path": BASE}


def _small(config: Any) -> Any:
    """The same with rank 2 (but for what AdaLoRA and patterns say) and token ids of this vocabulary."""
    indices: Any = config.trainable_token_indices
    if isinstance(indices, dict):
        indices = {"embed_tokens": [4, 7], "lm_head": [7, 9, 30]}
    elif indices is not None:
        indices = [3, 5, 30]
    return dataclasses.replace(config, r=2, trainable_token_indices=indices)


def _values(count: int, seed: int) -> Tensor:
    """Float32 values of -0.25 to 0.25, from integers alone (a linear congruence, its middle bits)."""
    state = (torch.arange(count, dtype=torch.int64) * 2654435761 + seed) % 2**32
    state = (state ^ (state >> 15)) * 2246822519 % 2**32
    state = (state ^ (state >> 13)) * 3266489917 % 2**32
    return ((state >> 8).to(torch.float64) / 2**24 - 0.5).float() / 2


if __name__ == "__main__":
    main()
