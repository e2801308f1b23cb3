"""`make bench-loading` on a tiny model: the real script, and what it leaves behind."""

import json
from pathlib import Path

import pytest
from lorikeet.kernels.native.functions import multiplies_bf16

from .scripts import run_script

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("bench-loading")
    # Rank 27 of the tiny base; the files are smaller than --quick alone would make them.
    options = ("--quick", "--adapter-mb", "0.2", "--seconds", "0.5", "--threads", "1", "--device", "cpu")
    return run_script("adapter_loading.py", "--model", tiny_model, "--out", out, *options), out


def test_loading_prints_ratios_before_the_tables(finished):
    text, _ = finished
    assert 0 < text.index("p99 between tokens, loading / quiet") < text.index("window") < text.index("without streams")


def test_loading_writes_both_sides_and_every_part_of_a_load(finished):
    _, out = finished
    result = json.loads((out / "adapter_loading.json").read_text())
    assert result["ratios"].keys() >= result["goals"].keys()
    assert all(of["median"] > 0 for of in result["ratios"].values())
    for side in ("quiet", "loading"):
        gaps = result["gaps_ms"][side]
        assert 0 < gaps["p50"]["median"] <= gaps["p99"]["median"] <= gaps["p100"]["median"]
        assert all(number > 0 for number in result["gaps_in_each_window"][side])
    assert result["loads_in_a_window"]["median"] > 0
    # Two adapters are loaded in turn; each time the other one is read again.
    assert {part: len(times) for part, times in result["load_ms"].items()} == dict.fromkeys(
        ("bare_read", "load", "read_again", "plain_copy", "activate"), 2
    )
    assert result["settings"]["packed_bytes"] == pytest.approx(
        200_000 * (1 if multiplies_bf16() else 2), rel=0.1
    )  # as the server computes, of a bfloat16 file
    assert result["machine"]["cores"] >= 1
    assert (out / "adapter_loading.png").stat().st_size > 5000


def test_loading_result_names_no_path_of_the_machine(finished, tiny_model):
    _, out = finished
    text = (out / "adapter_loading.json").read_text()
    assert str(tiny_model) not in text
    assert str(out) not in text
