"""`make bench ARGS="--only formats"` on a tiny model: adapters of every format, made by PEFT, mixed and timed."""

import json
from pathlib import Path

import pytest

from .scripts import run_script

pytest.importorskip("peft")
SIZE = ("--streams", "6", "--prompt", "5", "--tokens", "24", "--adapters", "2", "--rounds", "1", "--threads", "1")
NAMES = (
    "rsLoRA",
    "DoRA",
    "lora_bias",
    "head and embedding",
    "modules_to_save head",
    "trained tokens",
    "AdaLoRA",
    "strength 0.5",
    "two adapters",
)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("formats")
    return run_script("bench.py", "--only", "formats", "--rank", "3", "--model", tiny_model, "--out", out, *SIZE), out


def test_every_format_has_a_row(finished):
    text, out = finished
    assert "PEFT mixed" not in text and {path.name for path in out.iterdir()} == {"format_cost.json", "format_cost.png"}
    for name in NAMES:
        assert f"{name} / LoRA, step time" in text and f"{name} / LoRA, added to base only" in text
    assert "two adapters / LoRA of twice the rank, step time" in text
    assert "DoRA / LoRA at most 1.2" in text


def test_result_holds_every_round_of_every_side(finished):
    _, out = finished
    result = json.loads((out / "format_cost.json").read_text())
    sides = {s["side"] for s in result["series"]}
    assert sides == {*NAMES, "base only", "LoRA", "LoRA of twice the rank"}
    for series in result["series"]:
        assert [r["output_tokens"] for r in series["rounds"]] == [24 * 6]
        assert all(r["step_ms"] > 0 for r in series["rounds"])
    ratio = result["ratios"]["DoRA / LoRA, step time"]["6"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert (out / "format_cost.png").stat().st_size > 5000
    assert str(out) not in json.dumps(result)
