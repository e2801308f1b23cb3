"""`lorikeet adapters golden`: what it writes is PEFT's answer, and what it refuses would have proven nothing."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from lorikeet.adapters.golden import DEFAULT_TOLERANCE, GOLDEN_FILE, read_golden
from lorikeet.adapters.golden_comparison import difference
from lorikeet.adapters.inspection import inspect_directory
from lorikeet.server import golden_reference
from lorikeet.server.base.base_hash import hash_checkpoint
from lorikeet.server.base.checkpoint import BaseCheckpoint
from lorikeet.server.cli_golden import DEFAULT_PROMPTS, golden
from lorikeet.server.errors import BaseModelError, ConfigError
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ..golden.peft_oracle import nf4_model

ADAPTERS = ("amber", "birch", "cedar", "dune")


@pytest.fixture
def folder(tiny_adapters, tmp_path):
    return shutil.copytree(tiny_adapters / "amber", tmp_path / "amber")


def digest_of(directory):
    return inspect_directory(directory, None, check_golden=False).digest


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_are_those_of_peft_on_the_nf4_base(name, tiny_adapters, tiny_model, tmp_path, capsys):
    folder = shutil.copytree(tiny_adapters / name, tmp_path / name)
    prompts = ["In the beginning was the word", "Größe, café 🦜"]
    assert golden(folder, str(tiny_model), prompts, None, None) == 0
    made = read_golden(folder, digest=digest_of(folder))
    assert made is not None and made.tolerance == DEFAULT_TOLERANCE
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert [list(ids) for ids in made.prompts] == [tokenizer.encode(text) for text in prompts]
    model = PeftModel.from_pretrained(nf4_model(tiny_model), str(folder)).eval()
    with torch.inference_mode():
        want = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in made.prompts])
    torch.testing.assert_close(made.logits, want, atol=1e-5, rtol=1e-5)
    assert made.base_model == "" and made.base_model_sha256 == hash_checkpoint(BaseCheckpoint(tiny_model))
    for package in ("lorikeet", "transformers", "peft", "bitsandbytes"):
        assert package in made.made_by
    text = capsys.readouterr().out
    assert str(folder / GOLDEN_FILE) in text and "without the adapter" in text


def test_default_prompts_tell_every_tiny_adapter_from_its_base(tiny_adapters, tiny_model, tmp_path):
    for name in ADAPTERS:
        folder = shutil.copytree(tiny_adapters / name, tmp_path / name)
        assert golden(folder, str(tiny_model), [], None, 0.3) == 0
        made = read_golden(folder, digest=digest_of(folder))
        assert made is not None and len(made.prompts) == len(DEFAULT_PROMPTS) and made.tolerance == 0.3


def test_checkpoint_that_is_quantized_already_is_taken_as_it_is(folder, tiny_model, tmp_path):
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "quantized")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "quantized")
    prompts = ["In the beginning"]
    assert golden(folder, str(tiny_model), prompts, None, None) == 0
    expected = read_golden(folder, digest=digest_of(folder))
    assert golden(folder, str(tmp_path / "quantized"), prompts, None, None) == 0
    made = read_golden(folder, digest=digest_of(folder))
    assert made is not None and expected is not None
    assert made.base_model_sha256 != expected.base_model_sha256
    # The same NF4 values, without a rounding to bf16 on the way.
    assert difference(expected.logits, made.logits).max() < 1e-4


def test_prompts_come_from_a_file_too(folder, tiny_model, tmp_path):
    (tmp_path / "prompts").write_text("the cat\n\n  \nthe dog\n")
    assert golden(folder, str(tiny_model), ["the fox"], tmp_path / "prompts", None) == 0
    made = read_golden(folder, digest=digest_of(folder))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert made is not None
    assert [tokenizer.decode(ids) for ids in made.prompts] == ["the fox", "the cat", "the dog"]


def test_old_file_is_replaced(folder, tiny_model):
    (folder / GOLDEN_FILE).write_bytes(b"of another version")
    assert golden(folder, str(tiny_model), ["the cat"], None, None) == 0
    assert read_golden(folder, digest=digest_of(folder)) is not None
    assert sorted(path.name for path in folder.iterdir() if "golden" in path.name) == [GOLDEN_FILE]


def test_prompts_that_prove_nothing_are_refused(folder, tiny_model):
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * 1e-3 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match=r"answers like the base.*--prompt"):
        golden(folder, str(tiny_model), ["the cat"], None, None)
    assert not (folder / GOLDEN_FILE).exists()


def test_adapter_that_a_server_would_refuse_gets_no_file(folder, tiny_model, capsys):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert golden(folder, str(tiny_model), ["the cat"], None, None) == 2
    assert "use_dora" in capsys.readouterr().err and not (folder / GOLDEN_FILE).exists()


@pytest.mark.parametrize("tolerance", [0.0, -1.0, 11.0, float("nan"), float("inf")])
def test_tolerance_out_of_range_is_refused(folder, tiny_model, tolerance):
    with pytest.raises(ConfigError, match=r"--tolerance is .*above 0 to 10"):
        golden(folder, str(tiny_model), [], None, tolerance)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [(["x"] * 65, "65 prompts"), (["the cat " * 2000], "tokens; allowed: 1 to 1024"), ([""], "0 tokens")],
)
def test_prompts_out_of_range_are_refused(folder, tiny_model, prompts, words):
    with pytest.raises(ConfigError, match=words):
        golden(folder, str(tiny_model), prompts, None, None)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_prompts_file_that_is_none_is_refused(folder, tiny_model, tmp_path, content):
    if content is not None:
        (tmp_path / "prompts").write_bytes(content)
    with pytest.raises(ConfigError, match="--prompts names"):
        golden(folder, str(tiny_model), [], tmp_path / "prompts", None)


def test_missing_package_is_named_with_the_extra_that_brings_it(folder, tiny_model, monkeypatch):
    found = golden_reference.importlib.util.find_spec
    monkeypatch.setattr(
        golden_reference.importlib.util, "find_spec", lambda name: None if name == "peft" else found(name)
    )
    with pytest.raises(BaseModelError, match=r"peft are not installed.*lorikeet-server\[train\]"):
        golden(folder, str(tiny_model), [], None, None)


def test_command_is_importable_without_peft():
    program = "import sys; sys.modules['peft'] = None; import lorikeet.server.cli_golden"
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


def test_folder_that_cannot_be_written_is_an_error(folder, tiny_model, monkeypatch):
    from lorikeet.server import cli_golden

    def fail(directory, made):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(cli_golden, "write_golden", fail)
    with pytest.raises(ConfigError, match="Read-only file system"):
        golden(folder, str(tiny_model), ["the cat"], None, None)
