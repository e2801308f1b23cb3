"""`make bench` on a tiny model: the real script, every side that is installed, and what it leaves behind."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from .gguf_models import save_gguf_model
from .scripts import run_script

pytest.importorskip("peft")
SIZE = ("--streams", "1", "3", "--prompt", "8", "--tokens", "24", "--adapters", "2", "--rounds", "1", "--threads", "1")
LORIKEET = ("Lorikeet base", "Lorikeet one adapter", "Lorikeet mixed", "Lorikeet all distinct")
LLAMA = ("llama.cpp base", "llama.cpp one adapter", "llama.cpp mixed")
HAS_LLAMA = importlib.util.find_spec("llama_cpp") is not None


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("bench")
    save_gguf_model(tiny_model, out / "tiny.gguf")
    given = ("--model", tiny_model, "--gguf", out / "tiny.gguf", "--out", out)
    return run_script("bench.py", "--only", "peers", *given, *SIZE), out


def test_bench_prints_ratios_before_the_table(finished):
    text, _ = finished
    assert "at 1 stream\n  Lorikeet base / llama.cpp base, step time" in text
    assert 0 < text.index("Lorikeet mixed / PEFT mixed, decode tokens/s") < text.index("tokens/s (min..max)")


def test_bench_sides_generate_the_same_tokens(finished):
    text, _ = finished
    assert "tokens the same in Lorikeet mixed and PEFT mixed: " in text
    assert float(text.split("PEFT mixed: ")[1].split(" %")[0]) >= 50  # PEFT may be in bf16, and the model is random


def test_bench_writes_every_round_of_every_side_as_json(finished):
    _, out = finished
    result = json.loads((out / "bench_cpu.json").read_text())
    peers = ("PEFT mixed", *(LLAMA if HAS_LLAMA else ()))
    assert [(s["side"], s["streams"]) for s in result["series"]] == [
        (side, n) for n in (1, 3) for side in (*LORIKEET, *peers) if n == 3 or side != "Lorikeet all distinct"
    ]
    assert set(result["missing"]) == (set() if HAS_LLAMA else set(LLAMA))
    rounds = [r for s in result["series"] for r in s["rounds"]]
    assert all(r["tokens_per_s"] > 0 and r["step_ms"] > 0 and r["decode_tokens_per_s"] > 0 for r in rounds)
    assert {r["output_tokens"] for s in result["series"] if s["streams"] == 3 for r in s["rounds"]} == {72}
    assert result["machine"]["cores"] >= 1
    assert (out / "bench_cpu.png").stat().st_size > 5000


@pytest.mark.skipif(
    not HAS_LLAMA, reason="llama-cpp-python is not installed: pip install -c constraints.txt -e '.[peers]'"
)
def test_bench_proves_that_llama_cpp_applies_the_same_adapters(finished):
    text, out = finished
    result = json.loads((out / "bench_cpu.json").read_text())
    assert result["settings"]["effect"]["same"]["low"] > 0.99
    assert result["settings"]["effect"]["others"]["high"] < 0.9
    assert set(result["settings"]["chosen"]["llama.cpp"]) == {"flash_attention", "adapters", "compiled_for"}
    assert "cosine between llama.cpp and PEFT" in text


def test_bench_result_names_no_path_of_the_machine(finished, tiny_model):
    _, out = finished
    text = (out / "bench_cpu.json").read_text()
    assert str(tiny_model) not in text
    assert str(out) not in text


def test_bench_runs_without_any_peer_and_names_both(tiny_model, tmp_path):
    size = (*SIZE[:1], "2", *SIZE[3:])
    given = ("--only", "peers", "--model", tiny_model, "--out", tmp_path)
    text = run_script("bench.py", *given, *size, hidden=("peft", "llama_cpp"))
    assert re.search(r"PEFT mixed +missing: peft is not installed", text)
    result = json.loads((tmp_path / "bench_cpu.json").read_text())
    assert set(result["missing"]) == {"PEFT mixed", *LLAMA}
    assert "llama-cpp-python is not installed" in result["missing"]["llama.cpp base"]
    assert {s["side"] for s in result["series"]} == set(LORIKEET) - {"Lorikeet all distinct"}
