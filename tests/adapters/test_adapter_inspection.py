"""What an inspection says of a folder is what the tensors in it come to."""

import secrets

import pytest
import torch
from lorikeet.adapters.card import CARD_FILE, HASH_KEY
from lorikeet.adapters.errors import AdapterIncompatibleError, AdapterInvalidError
from lorikeet.adapters.fingerprint import BaseFingerprint
from lorikeet.adapters.golden import Golden, write_golden
from lorikeet.adapters.inspection import inspect_directory
from peft import AdaLoraConfig, LoraConfig

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
VOCAB = 64

QV = ["q_proj", "v_proj"]
CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=9, target_modules="all-linear", task_type="CAUSAL_LM"),
    "rslora": LoraConfig(r=5, lora_alpha=7, use_rslora=True, target_modules=QV),
    "patterns": LoraConfig(r=3, rank_pattern={"q_proj": 17}, alpha_pattern={"v_proj": 2}, target_modules=QV),
    "adalora": AdaLoraConfig(init_r=6, target_r=4, lora_alpha=12, target_modules=["down_proj"], total_step=10),
}


def golden_for(digest: str, vocab_size: int = VOCAB) -> Golden:
    return Golden(digest, ((1, 2),), torch.randn(1, vocab_size), 0.2, "a test")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norms_are_those_of_what_peft_adds(name, dtype, tmp_path, save_adapter, sites, modules):
    deltas = save_adapter(CONFIGS[name], tmp_path, seed=secrets.randbits(31), dtype=dtype)
    found = inspect_directory(tmp_path, sites, modules)
    assert found.problem is None and found.warnings == ()
    assert found.modules.keys() == deltas.keys()
    for module, delta in deltas.items():
        assert found.modules[module].delta_norm == pytest.approx(delta.double().norm().item(), rel=1e-4)


def test_untrained_module_is_a_warning_by_name(lora_dir, sites, modules, edit_tensors):
    edit_tensors(lora_dir, lambda tensors: tensors[f"{Q0}.lora_B.weight"].zero_())
    found = inspect_directory(lora_dir, sites, modules)
    assert found.problem is None
    assert found.modules["model.layers.0.self_attn.q_proj"].delta_norm == 0.0
    assert found.warnings == (
        "1 of 6 modules change nothing, their delta is zero: model.layers.0.self_attn.q_proj.",
    )  # fmt: skip


@pytest.mark.parametrize("with_base", [True, False])
def test_zero_delta_is_refused_with_and_without_a_base(with_base, lora_dir, sites, modules, edit_tensors):
    edit_tensors(lora_dir, lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    found = inspect_directory(lora_dir, *((sites, modules) if with_base else ()))
    assert isinstance(found.problem, AdapterInvalidError) and "zero everywhere" in found.problem.message


def test_infinity_is_found_without_a_base(lora_dir, edit_tensors):
    edit_tensors(lora_dir, lambda tensors: tensors[f"{Q0}.lora_A.weight"].view(-1)[5].fill_(torch.inf))
    problem = inspect_directory(lora_dir, None).problem
    assert problem is not None and "not finite" in problem.message and "q_proj" in problem.message


def test_value_that_scaling_makes_too_large_is_found_with_a_base(lora_dir, sites, modules, edit_tensors, edit_config):
    edit_config(lora_dir, lora_alpha=1e15)
    edit_tensors(lora_dir, lambda tensors: tensors[f"{Q0}.lora_B.weight"].fill_(1e30))
    problem = inspect_directory(lora_dir, sites, modules).problem
    assert isinstance(problem, AdapterIncompatibleError) and "q_proj" in problem.message


def test_other_base_is_a_problem_a_warning_or_neither(lora_dir, sites, modules, edit_config):
    edit_config(lora_dir, base_model_name_or_path="org/one")
    assert inspect_directory(lora_dir, sites, modules, BaseFingerprint("org/one")).warnings == ()
    found = inspect_directory(lora_dir, sites, modules, BaseFingerprint("org/two"))
    assert isinstance(found.problem, AdapterIncompatibleError) and not found.checked_against_base
    found = inspect_directory(lora_dir, sites, modules, BaseFingerprint("org/two"), allow_other_base=True)
    assert found.problem is None and "org/two" in found.warnings[0] and found.checked_against_base
    found = inspect_directory(lora_dir, sites, modules, BaseFingerprint("/models/two", certain=False))
    assert found.problem is None and "names of the bases differ" in found.warnings[0]


def test_hash_of_the_card_is_compared(lora_dir, sites, modules):
    ours, other = secrets.token_hex(32), secrets.token_hex(32)
    (lora_dir / CARD_FILE).write_text(f"---\n{HASH_KEY}: {ours}\n---\n")
    found = inspect_directory(lora_dir, sites, modules, BaseFingerprint("org/any", sha256=ours))
    assert found.problem is None and found.card.base_model_sha256 == ours
    found = inspect_directory(lora_dir, sites, modules, BaseFingerprint("org/any", sha256=other))
    assert found.problem is not None and other in found.problem.message
    (lora_dir / CARD_FILE).write_text(f"---\n{HASH_KEY}: what?\n---\n")
    found = inspect_directory(lora_dir, sites, modules, BaseFingerprint("org/any", sha256=other))
    assert found.problem is None and "64 hex digits" in found.warnings[0]


def test_golden_file_is_checked(lora_dir, sites, modules):
    digest = inspect_directory(lora_dir, None).digest
    write_golden(lora_dir, golden_for(digest))
    found = inspect_directory(lora_dir, sites, modules, vocab_size=VOCAB)
    assert found.problem is None and found.golden is not None and found.golden.prompts == ((1, 2),)
    assert found.digest == digest  # it is no part of the version
    assert "vocabulary of 64" in str(inspect_directory(lora_dir, sites, modules, vocab_size=99).problem)
    write_golden(lora_dir, golden_for(secrets.token_hex(32)))
    found = inspect_directory(lora_dir, None)
    assert found.problem is not None and "lorikeet adapters golden" in found.problem.message and found.golden is None
    assert inspect_directory(lora_dir, None, check_golden=False).problem is None


def test_what_was_found_before_a_problem_stays(lora_dir, edit_tensors):
    edit_tensors(lora_dir, lambda tensors: tensors.pop(f"{Q0}.lora_B.weight"))
    found = inspect_directory(lora_dir, None)
    assert found.problem is not None and "has no lora_B" in found.problem.message
    assert len(found.digest) == 64 and found.num_tensors == 11 and found.weights_bytes > 0 and found.report is None
