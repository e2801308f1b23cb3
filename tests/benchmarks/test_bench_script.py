"""`make bench` on a tiny model: the real script, every side, and what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZE = ("--streams", "1", "3", "--prompt", "8", "--tokens", "4", "--adapters", "2", "--rounds", "1", "--threads", "1")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("bench")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench.py", "--only", "peft", "--model", tiny_model, "--out", out, *SIZE],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, out


def test_bench_prints_ratios_before_the_table(finished):
    text, _ = finished
    assert 0 < text.index("Lorikeet mixed / PEFT mixed") < text.index("tokens/s (min..max)")


def test_bench_sides_generate_the_same_tokens(finished):
    text, _ = finished
    assert "tokens the same in Lorikeet mixed and PEFT mixed: " in text
    assert float(text.split("PEFT mixed: ")[1].split(" %")[0]) >= 50  # PEFT may be in bf16, and the model is random


def test_bench_writes_every_round_of_every_side_as_json(finished):
    _, out = finished
    result = json.loads((out / "bench_cpu.json").read_text())
    assert [(s["side"], s["streams"]) for s in result["series"]] == [
        (side, n) for n in (1, 3) for side in ("Lorikeet mixed", "Lorikeet base", "PEFT mixed")
    ]
    rounds = [r for s in result["series"] for r in s["rounds"]]
    assert len(rounds) == 2 * 3
    assert all(r["tokens_per_s"] > 0 and r["step_ms"] > 0 for r in rounds)
    assert {r["output_tokens"] for s in result["series"] if s["streams"] == 3 for r in s["rounds"]} == {12}
    assert result["machine"]["cores"] >= 1
    assert (out / "bench_cpu.png").stat().st_size > 5000


def test_bench_result_names_no_path_of_the_machine(finished, tiny_model):
    _, out = finished
    text = (out / "bench_cpu.json").read_text()
    assert str(tiny_model) not in text
    assert str(out) not in text
