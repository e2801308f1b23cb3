"""`make bench-trace` on a tiny model: the trace itself, the real script, and what it leaves behind."""

import json
from pathlib import Path

import numpy as np
import pytest

from .scripts import BENCHMARKS, run_script

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("bench-trace")
    options = ("--quick", "--threads", "1", "--device", "cpu", "--kv-cache-bytes", "8MiB")
    return run_script("adapter_trace.py", "--model", tiny_model, "--out", out, *options), out


def test_trace_is_the_one_of_s_lora(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from synthetic_trace import TraceShape, synthetic_trace

    shape = TraceShape(num_requests=40, alpha=0.3, rate=2.0, cv=2.0, prompt=(8, 512), output=(4, 100))
    trace = synthetic_trace(200, shape)
    # The draws of benchmarks/trace.py of S-LoRA, in its order.
    np.random.seed(42)
    adapters = (np.random.power(0.3, 40) * 200).astype(int)
    prompts = np.random.randint(8, 512, 40)
    outputs = np.random.randint(4, 100, 40)
    arrivals = np.cumsum(np.random.gamma(1 / 4, 4 / 2.0, 40))
    assert [r.adapter for r in trace] == adapters.tolist()
    assert [r.prompt_tokens for r in trace] == prompts.tolist()
    assert [r.output_tokens for r in trace] == outputs.tolist()
    assert [r.arrival_s for r in trace] == pytest.approx(arrivals.tolist())


def test_trace_of_another_number_of_adapters_has_the_same_requests(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from synthetic_trace import TraceShape, synthetic_trace

    shape = TraceShape(num_requests=50, alpha=1.0, rate=1.0, cv=1.0, prompt=(1, 9), output=(1, 9))
    few, many = synthetic_trace(5, shape), synthetic_trace(2000, shape)
    assert [(r.prompt_tokens, r.output_tokens, r.arrival_s) for r in few] == [
        (r.prompt_tokens, r.output_tokens, r.arrival_s) for r in many
    ]
    assert max(r.adapter for r in few) < 5 <= max(r.adapter for r in many) < 2000


def test_trace_script_prints_ratios_before_the_table(finished):
    text, _ = finished
    assert 0 < text.index("output tokens/s, relative") < text.index("requests/s  ") < text.index("evictions from")


def test_trace_script_counts_what_too_little_memory_costs(finished):
    _, out = finished
    result = json.loads((out / "adapter_trace.json").read_text())
    (few,), (many,) = result["rounds"]["2"], result["rounds"]["12"]
    for run in (few, many):
        assert run["num_requests"] == sum(run["found"].values()) == 12
        assert run["output_tokens"] > 0
        assert 0 <= run["stalled_s"] < run["wall_s"]
        assert 0 <= run["full_steps"] <= run["num_steps"]
    # Two adapters fit and were warm; of twelve only four fit.
    assert few["adapters read from disk"] == 0 and few["found"]["device"] == 12
    assert many["adapters read from disk"] > 0 and many["evictions"]["device"] > 0
    assert few["output_tokens"] == many["output_tokens"]
    assert result["settings"]["adapter_bytes_on_disk"] > 0
    assert (out / "adapter_trace.png").stat().st_size > 5000


def test_trace_script_lets_requests_arrive_at_a_rate(tiny_model, tmp_path):
    options = ("--quick", "--adapters", "3", "--rate", "50", "--threads", "1", "--device", "cpu")
    text = run_script(
        "adapter_trace.py", "--model", tiny_model, "--out", tmp_path, *options, "--kv-cache-bytes", "8MiB"
    )
    assert "first token within 6 s, %" in text


def test_trace_result_names_no_path_of_the_machine(finished, tiny_model):
    _, out = finished
    text = (out / "adapter_trace.json").read_text()
    assert str(tiny_model) not in text
    assert str(out) not in text
