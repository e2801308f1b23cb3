"""Every format that is served, merged: as PEFT merges it, and answering as it does unmerged."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lorikeet.adapters.merge.targets import Onto, Target
from lorikeet.server.merge_job import merge
from lorikeet.server.merge_plan import MergeRequest, plan_merge
from torch import nn
from transformers import AutoModelForCausalLM

from ...base.family_models import save_family
from ...golden.formats import Format, formats
from .peft_merges import answer, plain_base, save_adapter, unmerged, untied, values_of

# float32 both times, but sums in another order.
VALUES = {"atol": 2e-6, "rtol": 2e-6}
LOGITS = {"atol": 2e-4, "rtol": 2e-4}
IDS = [5, 9, 100, 198, 3, 7, 150, 4, 11, 42]
# PEFT cannot merge the bias of a lora_B into a linear that has none.
UNMERGEABLE = {"lora-bias"}
# What differs in how a config or file is read only.
PLAIN = {
    "regex", "exclude", "one-linear", "rslora", "patterns", "dora-rslora", "whole-embedding", "added-tokens-whole",
    "lora-embedding-alone", "whole-q",
}  # fmt: skip
QWEN2 = (
    "rslora", "bias-all", "bias-lora-only", "dora-bias-all", "tokens-by-module", "added-tokens-whole", "sharded",
)  # fmt: skip
CASES = [
    *(("qwen2", Onto.ORIGINAL, name) for name in QWEN2),
    *(("llama", Onto.NF4, made.name) for made in formats("llama") if made.name not in PLAIN),
    ("gemma3", Onto.NF4, "lora-embedding"),  # its embedding scales its rows
]


@dataclass(frozen=True)
class World:
    """A base as it lies on disk, and as PEFT gets it."""

    directory: Path
    plain: nn.Module
    formats: dict[str, Format]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    found = {}
    for family, onto in sorted({(family, onto) for family, onto, _ in CASES}):
        directory = tmp_path_factory.mktemp(family) / "model"
        save_family(family, directory)
        plain = plain_base(directory, nf4=onto is Onto.NF4)
        found[family] = World(directory, plain, {made.name: made for made in formats(family)})
    return found


@pytest.mark.parametrize(("family", "onto", "name"), CASES)
def test_a_merged_adapter_is_what_peft_merges_and_answers_as_it_did(
    family: str, onto: Onto, name: str, worlds: dict[str, World], tmp_path: Path
) -> None:
    world = worlds[family]
    made = world.formats[name]
    adapter = tmp_path / "adapter"
    save_adapter(world.plain, made, adapter, seed=len(name))
    peft = unmerged(world.plain, made, adapter)
    if made.respell is not None:
        made.respell(adapter)
    plan = plan_merge(MergeRequest(str(world.directory), (adapter,), Target.FP32, tmp_path / "out", onto=onto))
    merge(plan, lambda *_: None, lambda: False)

    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    ids = [*IDS, *range(world.plain.config.vocab_size, ours.config.vocab_size)]  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(answer(ours, ids), answer(peft, ids), **LOGITS)
    if name in UNMERGEABLE:
        return
    expected = values_of(untied(peft).merge_and_unload())
    for key, value in values_of(ours).items():
        torch.testing.assert_close(value, expected[key], **VALUES, msg=lambda text, key=key: f"{key}: {text}")
