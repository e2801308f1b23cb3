"""`make bench-gpu` without a GPU: its byte model, its sections over a tiny model on the CPU, its budget and report."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from .scripts import BENCHMARKS

TINY = {
    "vocab_size": 199,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


MODULES = (
    "bar_panels",
    "bench_gpu",
    "gpu_decode",
    "gpu_launches",
    "gpu_limits",
    "gpu_model",
    "gpu_report",
    "gpu_sections",
    "gpu_step",
    "gpu_timing",
)


@pytest.fixture(scope="module")
def bench():
    """The script's modules, found as `python benchmarks/bench_gpu.py` finds them."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def served(bench):
    room = bench.gpu_model.Room(adapters=4, rank=8, step_tokens=128, requests=8, blocks=100, block_size=8, context=256)
    return bench.gpu_model.serve_random(LlamaConfig(**TINY), room, torch.device("cpu"), torch.float32, seed=1)


@pytest.fixture
def measured(bench, served, monkeypatch):
    """What the sections are given; steps run once and their times are made up."""

    def time_runs(runs, *, rounds, repeats):
        timings = {}
        for i, (name, run) in enumerate(runs.items()):
            run()
            timings[name] = bench.gpu_timing.Timing.of([100.0 + 10 * i, 101.0 + 10 * i, 99.0 + 10 * i])
        return timings, timings

    monkeypatch.setattr(bench.gpu_decode, "time_runs", time_runs)
    return bench.gpu_decode.Measured(served, 3e12, batches=(1, 4), context=40, rounds=1, repeats=1)


def test_byte_model_gives_the_published_numbers(bench):
    limits = bench.gpu_limits
    shapes = limits.LLAMA_3_8B
    assert shapes.linear_weights == 6_979_321_856
    assert shapes.nf4_bytes() == pytest.approx(3.600e9, rel=2e-4)
    assert shapes.nf4_bytes(nested=False) == pytest.approx(3.926e9, rel=2e-4)
    assert shapes.adapter_bytes(16) == 83_886_080
    assert shapes.kv_bytes == 131_072
    assert shapes.head_bytes == pytest.approx(1.051e9, rel=1e-3)
    # Tokens a second at the datasheet's bandwidth and context 1,024: no adapter, one shared, all distinct.
    for batch, expected in ((1, (700, 688, 688)), (16, (7884, 7788, 6584)), (64, (16192, 16090, 11521))):
        for adapters, rate in zip((0, 1, batch), expected, strict=True):
            step = limits.DecodeStep(shapes, batch, 1024, 16, adapters)
            assert round(step.tokens_per_s(limits.H100_BANDWIDTH)) == rate
    assert limits.DecodeStep(shapes, 16, 1024, 16, 16).overhead == pytest.approx(0.20, abs=0.005)
    assert limits.DecodeStep(shapes, 64, 1024, 16, 64).overhead == pytest.approx(0.40, abs=0.006)
    assert limits.DecodeStep(shapes, 1, 1024, 16, 1).overhead == pytest.approx(0.018, abs=0.001)


def test_byte_model_reads_the_config_of_the_benchmark(bench):
    assert bench.gpu_limits.ModelShapes.of(bench.gpu_model.llama_3_8b()) == bench.gpu_limits.LLAMA_3_8B


def test_adapters_have_the_size_of_the_byte_model(bench, served):
    shapes = bench.gpu_limits.ModelShapes.of(served.base.config)
    assert 2 * bench.gpu_model.adapter_elements(served.base.site_table, 8) == shapes.adapter_bytes(8)


def test_decode_step_continues_its_own_prompt(bench, served):
    prompt = bench.gpu_step.prompt_step(served, 4, 19, 3, seed=5)
    decode = bench.gpu_step.decode_step(served, 4, 19, 3, seed=5)
    from_prompt = served.runner.forward(prompt).clone()
    assert decode.num_tokens == 4
    torch.testing.assert_close(served.runner.forward(decode), from_prompt, atol=1e-5, rtol=1e-5)
    base = bench.gpu_step.decode_step(served, 4, 19, 0, seed=5)
    assert not torch.allclose(served.runner.forward(base), from_prompt, atol=1e-3)


def test_sections_run_the_served_code_and_report_it(bench, measured, monkeypatch, tmp_path):
    decode = bench.gpu_decode
    monkeypatch.setattr(decode, "count_launches", lambda run: bench.gpu_launches.summarize([("k", 1.0)], []))
    monkeypatch.setattr(decode, "PROMPT_TOKENS", 32)
    monkeypatch.setattr(decode, "PROMPT_ADAPTERS", 4)
    sections = {
        "bandwidth": {"copy": 3e12, "read": 3.1e12, "shortest_us": 2.0},
        "capture": decode.run_capture(measured),
        "decode": decode.run_decode(measured),
        "engine": decode.run_engine(measured, seconds=0.0, new_tokens=40),
        "prefill": decode.run_prefill(measured),
        "chunks": decode.run_chunks(
            measured, budgets=[(48, 2.0)], streams=4, new_tokens=60, arriving=2, arriving_tokens=30
        ),
        "switches": decode.run_switches(
            measured, [(1, 1, ("lora_in_matmul",)), (4, 4, ("lora_side_stream", "dependent_launch"))]
        ),
        "launches": decode.run_launches(measured, batch=4, mixed_rows=20),
    }
    assert [(row["batch"], row["side"]) for row in sections["decode"]] == [
        (1, "base"), (1, "one shared"), (4, "base"), (4, "one shared"), (4, "all distinct"),
    ]  # fmt: skip
    assert sections["decode"][4]["overhead"] == pytest.approx(0.2)
    assert all(row["tokens_per_s"] > 0 for row in sections["engine"])
    assert sections["chunks"][0]["steps"] > 5 and sections["chunks"][0]["replayed"] == 0  # on a CPU nothing is captured
    assert [list(row["device_us"]) for row in sections["switches"]] == [
        ["as served", "lora_in_matmul off", "no graphs"],
        ["as served", "lora_side_stream off", "dependent_launch off", "no graphs"],
    ]
    assert "all distinct, 16 tokens of a prompt, no graphs" in sections["launches"]["sides"]
    result = json.loads(json.dumps({"sections": sections, "skipped": {"kernels": "failed: it broke"}}))
    text = bench.gpu_report.as_text(result)
    for words in ("1 one shared", "4 all distinct", "limit at 3.35 TB/s", "kernels: skipped, failed: it broke"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120
    bench.bar_panels.draw(tmp_path / "plot.png", bench.gpu_report.panels(result["sections"]), "title")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_goals_are_judged_on_the_right_side_of_their_bounds(bench):
    def row(batch, side, overhead=0.0, of_limit=1.0):
        return {"batch": batch, "side": side, "overhead": overhead, "of_limit": of_limit}

    def matmul(site, rows, faster, fraction):
        each = {"bitsandbytes": {"median_us": 10.0 * faster}}
        return {"site": site, "rows": rows, "us": {"median_us": 10.0}, "each": each, "fraction_of_copy": fraction}

    distinct = "all distinct"

    sections = {
        "decode": [row(16, "base"), row(16, "one shared", 0.05), row(16, distinct, 0.24), row(2, distinct, 9.0)],
        "engine": [row(16, "base", of_limit=0.6), row(16, "one shared", of_limit=0.1)],
        "prefill": {"tokens": 4096, "ratio": 1.2},
        "chunks": [
            {"step_tokens": 512, "max_slowdown": 0.0, "p99_of_p50": 2.5},
            {"step_tokens": 512, "max_slowdown": 2.0, "p99_of_p50": 1.5},
            {"step_tokens": 128, "max_slowdown": 0.0, "p99_of_p50": 9.0},
        ],
        "nf4": {"rows": [matmul("qkv", 16, 1.1, 0.3), matmul("o", 8, 1.4, 0.2), matmul("down", 1, 2.0, 0.6)]},
    }
    found = {goal.what: goal.reached for goal in bench.gpu_report.goals(sections)}
    assert found == {
        "step time over base, batch 16, one shared": False,
        "step time over base, batch 16, all distinct": True,
        "end to end, base, batch 16, of the limit": True,
        "prefill of 4096 tokens, 16 adapters / base": False,
        "p99 / p50 between tokens, 512 tokens a step": False,
        "p99 / p50 between tokens, 512 tokens a step, --max-slowdown 2": True,
        "bitsandbytes / ours, worst (qkv, M 16)": True,
        "bitsandbytes / ours where it falls back, worst (o, M 8)": False,
        "NF4 matmul, of copy bandwidth, worst (down, M 1)": True,
    }


def test_failed_section_keeps_what_others_found_and_says_why(bench, tmp_path):
    sections = bench.gpu_sections

    def fail(_):
        raise ValueError("no such kernel")

    results = sections.Results(tmp_path / "out" / "r.json", {"machine": {"gpu": "X"}})
    plan = [
        sections.Section("first", 1, lambda left: {"left": left > 1}),
        sections.Section("second", 1, fail),
        sections.Section("long", 1000, lambda left: 1),
        sections.Section("last", 1, lambda left: [1, 2]),
    ]
    assert not sections.run_sections(plan, sections.Budget(100), results)
    kept = json.loads((tmp_path / "out" / "r.json").read_text())
    assert kept["sections"] == {"first": {"left": True}, "last": [1, 2]}
    assert kept["skipped"]["second"] == "failed: ValueError: no such kernel"
    assert "needs about 1000" in kept["skipped"]["long"]
    assert kept["machine"] == {"gpu": "X"}


def test_timing_takes_median_and_percentiles_of_rotating_turns(bench):
    asked = []

    def sampler(name, value):
        return lambda: asked.append(name) or [value, value + 1.0]

    found = bench.gpu_timing.in_turns({"a": sampler("a", 1.0), "b": sampler("b", 5.0)}, rounds=2)
    assert asked == ["a", "b", "b", "a"]
    assert (found["b"].median_us, found["b"].low_us, found["b"].high_us) == (5.5, 5.0, 6.0)
    assert found["a"].bytes_per_s(1.5) == pytest.approx(1e6)


def test_launches_are_counted_by_kind(bench):
    on_device = [("gemm", 5.0), ("norm", 1.0), ("gemm", 6.0), ("Memcpy HtoD", 1.0), ("Memset (Device)", 0.5)]
    on_host = ["cudaLaunchKernel", "cudaGraphLaunch", "cuLaunchKernelEx", "aten::mm", "cudaMemcpyAsync"]
    found = bench.gpu_launches.summarize(on_device, on_host)
    assert (found["kernels"], found["copies_and_fills"], found["host_launches"]) == (3, 2, 3)
    assert found["kinds"][0] == {"name": "gemm", "count": 2, "us": 11.0}


def test_matmuls_of_captured_steps_are_compiled_before(bench, monkeypatch):
    nf4_compile = pytest.importorskip("nf4_compile")
    card = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    compiled = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(nf4_compile, "compile_tiles", lambda *args: compiled.append(args))
    found = bench.bench_gpu.compile_nf4(80, 16)
    ((tiles, _, _, lora),) = compiled
    assert found == {"tiles": len(tiles), "with LoRA": len(lora)}
    assert {tile.rows for tile in tiles} >= {8, 16, 32, 64}
    assert [job.rows for _, job in lora if not job.one_slot] == [1, 2, 4] * 4  # sites
    assert [job.rows for _, job in lora if job.one_slot] == list(range(8, 65, 8)) * 4
    assert {job.widths for _, job in lora} == {(4096, 1024, 1024), (4096,), (14336, 14336)}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_matmuls_with_lora_compile_without_a_device(bench, tmp_path):
    """What `compile_tiles` starts, in one process, whose errors it would not show."""
    nf4_compile = pytest.importorskip("nf4_compile")
    job = nf4_compile.LoraJob(2, 512, (128, 64), 16, 3, False)
    run = subprocess.run(
        [sys.executable, nf4_compile.__file__, "9", "0", "1"],
        input=json.dumps([[(8, 64, 2, 4, 3), job]]),
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert list(tmp_path.rglob("lora_gemm_kernel.cubin"))


def test_result_is_named_by_card_and_date(bench):
    machine = {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-11-22T10:00:00+00:00"}
    assert bench.bench_gpu.file_name(machine) == "h100-80gb-hbm3-2026-11-22-bench"


def test_script_runs_its_plan_and_prints_the_goals_last(bench, monkeypatch, capsys, tmp_path):
    script, section = bench.bench_gpu, bench.gpu_sections.Section
    row = {"batch": 16, "side": "base", "of_limit": 0.7, "tokens_per_s": 7.0, "limit_tokens_per_s": 10.0}
    row |= {"limit_tokens_per_s_datasheet": 11.0, "step_ms": {"median": 2.0, "low": 1.9, "high": 2.1}}
    machine = {"gpu": "NVIDIA H200", "date": "2026-11-22T10:00:00+00:00", "commit": "unknown", "versions": {}}
    plan = [section("engine", 1, lambda _: [row]), section("x", 1, lambda _: 1 / 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * 10**9, 80 * 10**9))
    monkeypatch.setattr(script, "describe_machine", lambda: machine)
    monkeypatch.setattr(script, "configure_logs", lambda *_: None)
    monkeypatch.setattr(script, "plan", lambda options, results: plan)
    monkeypatch.setattr(script.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--out", str(tmp_path), "--only", "engine", "--commit", "abc"])
    assert script.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "commit abc" in lines[1] and lines[-1].endswith("reached") and "70.0 %" in lines[-1]
    kept = json.loads((tmp_path / "h200-2026-11-22-bench.json").read_text())
    assert kept["sections"].keys() == {"engine", "plot"} and kept["goals"][0]["reached"]
    assert (tmp_path / "h200-2026-11-22-bench.png").stat().st_size > 5000


def test_without_a_device_it_says_so_and_ends_well(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    assert bench.bench_gpu.main() == 0
    assert capsys.readouterr().out == "bench-gpu: skipped, torch finds no CUDA device here.\n"
