"""What `make bench` says about its runs: ratios, goals, and sides that are missing."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from .scripts import BENCHMARKS

MODULES = ("beside_peers", "comparison", "effect", "measurement", "report", "workload")


@pytest.fixture(scope="module")
def bench():
    pytest.importorskip("gguf")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(BENCHMARKS))


def series(bench, side: str, streams: int, steps_ms: list[float], prefill_s: float = 1.0, tokens: int = 11):
    """One run for each step time, all of whose steps take it."""
    runs = []
    for step_ms in steps_ms:
        steps = [step_ms / 1000] * (tokens - 1)
        runs.append(
            bench.measurement.Run(
                wall_s=prefill_s + sum(steps),
                cpu_s=1.0,
                output_tokens=streams * tokens,
                steps_s=steps,
                tokens=[[1] * tokens] * streams,
            )
        )
    return bench.measurement.Series(side, streams, runs)


def test_ratios_are_taken_round_by_round_in_each_measure(bench):
    both = [series(bench, "one", 4, [10, 20, 40]), series(bench, "other", 4, [20, 60, 80], prefill_s=2.0)]
    ratio, measure = bench.report.Ratio, bench.report.Measure
    assert ratio("one", "other", measure.STEP).at(both, 4).median == pytest.approx(0.5)
    decode = ratio("one", "other", measure.DECODE).at(both, 4)
    assert (decode.low, decode.median, decode.high) == pytest.approx((2, 2, 3))
    whole = ratio("one", "other").at(both, 4)
    assert whole.low == pytest.approx(2.2 / 1.1)
    assert both[0].runs[0].decode_tokens_per_s == pytest.approx(400)


@pytest.mark.parametrize(
    ("measure", "median", "reached"),
    [("DECODE", 2, True), ("DECODE", 2.1, False), ("STEP", 0.5, True), ("STEP", 0.4, False)],
)
def test_a_goal_is_a_least_for_rates_and_a_most_for_step_times(bench, measure, median, reached):
    both = [series(bench, "one", 4, [10, 9, 11]), series(bench, "other", 4, [20, 18, 22])]
    ratio = bench.report.Ratio("one", "other", bench.report.Measure[measure])
    headline = bench.report.Headline(ratio, 4, median)
    assert headline.reached(both) is reached
    text = bench.report.as_text(bench.report.Report(both, [ratio], [headline]))
    bound = f"at {'least' if measure == 'DECODE' else 'most'} {median:g}"
    assert f"goal {bound}: {'reached' if reached else 'not reached'}" in text
    assert text.index("goal") < text.index("ms/step")


def test_a_missing_side_is_named_and_the_others_are_reported(bench, tmp_path):
    ratio = bench.report.Ratio("one", "gone", bench.report.Measure.DECODE)
    there = bench.report.Ratio("one", "other", bench.report.Measure.STEP)
    report = bench.report.Report(
        [series(bench, "one", 2, [10]), series(bench, "other", 2, [20]), series(bench, "one", 4, [10])],
        [ratio, there],
        [bench.report.Headline(ratio, 2, 5.0), bench.report.Headline(there, 2), bench.report.Headline(ratio, 99, 5.0)],
        {"gone": "gone is not installed"},
    )
    text = bench.report.as_text(report)
    assert "goal at least 5: not measured" in text
    assert "gone  missing: gone is not installed" in text
    assert "99" not in text
    result = json.loads(json.dumps(bench.report.as_json(report, {}, {})))
    assert result["missing"] == {"gone": "gone is not installed"}
    assert result["ratios"][ratio.title] == {}
    assert result["ratios"][there.title] == {"2": {"median": 0.5, "low": 0.5, "high": 0.5}}
    assert [h["reached"] for h in result["headlines"]] == [None, None, None]
    # The plot has bars where there are runs.
    _, plot = bench.report.write(tmp_path, "partly", result, report.series, "title")
    assert plot.stat().st_size > 5000


def test_sides_that_run_at_some_stream_counts_only_take_no_turn_elsewhere(bench):
    turns = []

    def run(name):
        def generate(prompts, new_tokens):
            turns.append((name, len(prompts)))
            return series(bench, name, len(prompts), [1]).runs[0]

        return generate

    sides = [bench.comparison.Side("a", run("a")), bench.comparison.Side("b", run("b"), only=[3])]
    workloads = [bench.workload.Workload(n, 4, 2) for n in (1, 3)]
    found = bench.comparison.compare(sides, workloads, rounds=2, vocab_size=100)
    assert [(s.side, s.streams, len(s.runs)) for s in found] == [("a", 1, 2), ("a", 3, 2), ("b", 3, 2)]
    # A warm-up and two rounds each, in an order that changes.
    assert turns == [("a", 1)] * 3 + [("b", 3), ("a", 3), ("a", 3), ("b", 3), ("b", 3), ("a", 3)]


def test_headlines_are_the_goals_that_were_set(bench):
    goals = {(h.ratio.title, h.streams): h.goal_text for h in bench.beside_peers.HEADLINES if h.goal is not None}
    assert goals == {
        ("Lorikeet mixed / PEFT mixed, decode tokens/s", 32): "at least 5",
        ("Lorikeet mixed / llama.cpp mixed, decode tokens/s", 32): "at least 5",
        ("Lorikeet mixed / llama.cpp base, decode tokens/s", 32): "at least 1.5",
        ("Lorikeet mixed / PEFT mixed, tokens/s of the whole run", 32): "at least 5",
        ("Lorikeet mixed / llama.cpp mixed, tokens/s of the whole run", 32): "at least 5",
        ("Lorikeet mixed / llama.cpp base, tokens/s of the whole run", 32): "at least 1.5",
        ("Lorikeet mixed / Lorikeet base, step time", 32): "at most 1.25",
        ("Lorikeet base / llama.cpp base, step time", 1): "at most 2",
        ("Lorikeet one adapter / llama.cpp one adapter, step time", 1): "at most 2",
    }


def test_effects_of_the_same_adapters_are_told_from_those_of_others(bench):
    generator = torch.Generator().manual_seed(4)
    one = torch.randn(4, 300, generator=generator)
    effect = bench.effect.Effect.of(one, 3 * one + 0.3 * torch.randn(4, 300, generator=generator))
    assert effect.same.low > 0.98
    assert effect.others.high < 0.3
    with pytest.raises(RuntimeError, match="does not apply the adapters"):
        bench.effect.Effect.of(one, one.roll(1, 0))
    with pytest.raises(RuntimeError, match="does not apply the adapters"):
        bench.effect.Effect.of(one, torch.randn(4, 300, generator=generator))
