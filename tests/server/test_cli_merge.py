"""`lorikeet merge`: what it writes and says, and that nothing is left of what cannot be done."""

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lorikeet.adapters.merge import staging
from lorikeet.adapters.merge.errors import MergeCancelledError
from lorikeet.adapters.merge.targets import DENSE, Target
from lorikeet.server import merge_autoround, merge_report
from lorikeet.server.cli import run
from lorikeet.server.merge_card import notes
from lorikeet.server.merge_job import merge
from lorikeet.server.merge_plan import MergeRequest, plan_merge
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..tiny import TEXT, save_tiny_adapter, save_tiny_model


class Files(NamedTuple):
    """A base and adapters of it."""

    model: Path
    adapter: Path
    other: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("merge")
    found = Files(root / "model", root / "plain", root / "attention")
    save_tiny_model(found.model)
    save_tiny_adapter(found.model, found.adapter, seed=1, rank=4)
    save_tiny_adapter(found.model, found.other, seed=2, rank=2, attention_only=True)
    return found


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test's process keeps its own way to end."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def command(files: Files, out: Path, *more: str, adapter: Path | None = None, text: Path | None = None) -> list[str]:
    chosen = str(files.adapter if adapter is None else adapter)
    verified = ["--unverified"] if text is None else ["--text", str(text)]
    return ["merge", "--model", str(files.model), "--adapter", chosen, "--out", str(out), *verified, *more]


def copy_of(adapter: Path, to: Path) -> Path:
    shutil.copytree(adapter, to)
    return to


def test_a_merged_model_is_complete_and_says_what_it_is(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ("--adapter", str(files.other), "--weight", "1", "--weight", "0.5", "--onto", "original")
    assert run(command(files, out, *more)) == 0
    shown = capsys.readouterr()
    assert f"wrote {out}" in shown.out and "merging onto original: it was asked for" in shown.err
    card = (out / "README.md").read_text()
    for said in ("plain", "attention", "0.5", "onto | original", "as | bf16", "bitsandbytes", "not compared"):
        assert said in card
    assert "_name_or_path" not in json.loads((out / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(files.model).chat_template
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("to", list(Target))
def test_every_target_says_what_it_is_run_with(to: Target) -> None:
    [note] = notes(to)
    assert ("16 bit" if to in DENSE else "transformers needs the Python package") in note


def test_what_lost_too_much_is_refused_with_its_report_and_written_with_it_if_that_is_accepted(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXT * 4))
    measured: list[float] = []
    # What is lost of a random adapter says nothing; the rule itself is tested in test_merge_rules.
    monkeypatch.setattr(merge_report, "refuse_after", lambda *ways: measured.extend(ways) or "It lost too much")
    arguments = command(files, tmp_path / "out", text=text)
    assert run(arguments) == 2
    shown = capsys.readouterr().err
    assert "It lost too much. Nothing was written" in shown and "unmerged on NF4" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    assert run([*arguments, "--accept-loss"]) == 0
    assert "unmerged on NF4" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["onto"] == "nf4" and "do not say" in report["onto_reason"]
    assert report["accepted_loss"] == "It lost too much"
    ways = [report["comparison"][way]["perplexity"]["value"] for way in ("base", "unmerged", "merged")]
    assert ways == pytest.approx(measured[3:]) and ways[1] == pytest.approx(ways[2], rel=0.02)
    assert "unmerged on NF4" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapters_own_chat_template_goes_with_it(files: Files, tmp_path: Path) -> None:
    adapter = copy_of(files.adapter, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("{% for message in messages %}<{{ message['content'] }}>{% endfor %}")
    assert run(command(files, tmp_path / "out", adapter=adapter)) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"


def other_base(adapter: Path) -> None:
    (adapter / "README.md").write_text(f"---\nbase_model_sha256: {'ab' * 32}\n---\n")


def other_vocabulary(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    weights = {k: v for k, v in load_file(adapter / "adapter_model.safetensors").items() if "lm_head" not in k}
    weights["base_model.model.lm_head.weight"] = torch.randn(390, 128)
    save_file(weights, adapter / "adapter_model.safetensors")


def without_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_base, "trained on a base with hash abab"),
        (other_vocabulary, "rows for"),
        (without_weights, "adapter_model.safetensors is missing"),
    ],
)
def test_an_adapter_that_a_server_would_refuse_is_not_merged(
    spoil: object, said: str, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = copy_of(files.adapter, tmp_path / "adapter")
    spoil(adapter)  # type: ignore[operator]
    assert run(command(files, tmp_path / "out", adapter=adapter)) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--weight", "1", "--weight", "2"], "1 adapters and 2 weights"),
        (["--weight", "nan"], "finite"),
        (["--adapter", "/nowhere"], "no directory"),
        (["--to", "nf4"], "--accept-loss"),
        (["--to", "autoround"], "--calibration"),
        (["--to", "gptq", "--calibration", "/nowhere"], "cannot be read"),
        (["--iterations", "0"], "1 to 1000"),
        (["--model", "/nowhere"], "neither an existing directory"),
    ],
)
def test_what_cannot_be_done_is_said_before_work_starts(
    more: list[str], said: str, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(merge_autoround.importlib.util, "find_spec", lambda name: object())
    assert run(command(files, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_and_a_short_text_are_named(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXT))
    arguments = command(files, tmp_path / "out", "--to", "awq", "--calibration", str(text))
    monkeypatch.setattr(merge_autoround.importlib.util, "find_spec", lambda name: None)
    assert run(arguments) == 2
    assert "pip install 'lorikeet-server[merge]'" in capsys.readouterr().err
    monkeypatch.setattr(merge_autoround.importlib.util, "find_spec", lambda name: object())
    assert run(arguments) == 2
    assert "at least 2048 are needed" in capsys.readouterr().err


def test_the_output_must_be_new_and_writable(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(files, tmp_path)) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert run(command(files, tmp_path / "no" / "out")) == 2
    assert "missing" in capsys.readouterr().err


def test_an_nf4_checkpoint_has_no_16_bit_weights(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(files, tmp_path / "nf4", "--to", "nf4", "--accept-loss")) == 0
    again = Files(tmp_path / "nf4", files.adapter, files.other)
    assert run(command(again, tmp_path / "out", "--onto", "original")) == 2
    assert "no 16-bit weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_has_nothing_left_on_it(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        assert run(command(files, tmp_path / "out")) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "The disk is full" in capsys.readouterr().err
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    assert run(command(files, tmp_path / "out")) == 2
    assert "Free space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_cancelled_or_interrupted_merge_leaves_nothing(files: Files, tmp_path: Path) -> None:
    calls = iter(range(1000))
    plan = plan_merge(MergeRequest(str(files.model), (files.adapter,), Target.BF16, tmp_path / "out"))
    seen: list[tuple[str, int, int]] = []
    with pytest.raises(MergeCancelledError, match="nothing is left"):
        merge(plan, lambda *each: seen.append(each), lambda: next(calls) > 5)
    assert seen and all(0 < done < total for _, done, total in seen)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    plan = plan_merge(MergeRequest(str(files.model), (files.adapter,), Target.BF16, tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        merge(plan, interrupt, lambda: False)
    assert list(tmp_path.iterdir()) == []
