"""`make bench-engine`, `bench-prefix` and `profile` on a tiny model: the real scripts, and what they leave behind."""

import json
from pathlib import Path

import pytest
from lorikeet.kernels.native.functions import library_name

from .scripts import BENCHMARKS, run_script

pytest.importorskip("peft")


def test_engine_costs_fits_an_exponent_to_every_curve(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--quick", "--steps", "4", "--rounds", "1", "--model", tiny_model, "--out", tmp_path)
    text = run_script("engine_costs.py", *options)
    result = json.loads((tmp_path / "engine_costs.json").read_text())
    assert list(result["curves"]) == ["running", "waiting", "contexts", "prompts", "preempted", "cached"]
    for name, curve in result["curves"].items():
        assert f"{name}: grows with exponent {curve['exponent']:.2f}" in text
        for point in curve["points"]:
            assert point["step_us"]["median"] > 0 and point["us_a_unit"] > 0
            assert set(point["parts_us"]) >= {"schedule", "inputs", "sampling", "metrics"}
    assert (tmp_path / "engine_costs.png").stat().st_size > 5000


def test_exponent_is_that_of_the_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from growth import Curve, Point

    points = [Point(size, [3.0 * size**1.5]) for size in (1, 10, 100)]
    curve = Curve("x", "sizes", "thing", points)
    assert curve.exponent == pytest.approx(1.5) and curve.last_exponent == pytest.approx(1.5)


def test_prefix_cache_is_hit_with_it_and_never_without(tiny_model: Path, tmp_path: Path) -> None:
    text = run_script("prefix_cache.py", "--quick", "--threads", "1", "--model", tiny_model, "--out", tmp_path)
    assert "with / without the cache" in text
    workloads = json.loads((tmp_path / "prefix_cache.json").read_text())["workloads"]
    # 4 requests of 2 adapters: the second of each finds the 48 tokens of its system prompt, of 144 in all.
    assert workloads["shared"]["hit_rate"]["with"]["median"] == pytest.approx(48 / 288)
    assert workloads["chat"]["hit_rate"]["with"]["median"] > 0.3
    assert workloads["shared"]["hit_rate"]["without"]["high"] == workloads["chat"]["hit_rate"]["without"]["high"] == 0
    assert (tmp_path / "prefix_cache.png").stat().st_size > 5000


def test_profile_accounts_for_the_whole_step(tiny_model: Path, tmp_path: Path) -> None:
    text = run_script("step_profile.py", "--quick", "--threads", "1", "--model", tiny_model, "--out", tmp_path)
    assert "Python overhead" in text
    results = json.loads((tmp_path / "step_profile.json").read_text())
    for way in ("profiles", "one_by_one"):
        assert list(results[way]) == ["1 base", "1 mixed", "2 base", "2 mixed"]
        for name, profile in results[way].items():
            parts = {part: times["median"] for part, times in profile["parts_ms"].items()}
            assert sum(parts.values()) == pytest.approx(profile["clocked_step_ms"]["median"])
            assert all(parts[part] > 0 for part in ("head", "norms, rotation, activation", "sampling"))
            in_one_call = parts["all layers in one call"] > 0
            assert in_one_call == (way == "profiles" and library_name() is not None)
            assert all((parts[part] == 0) == in_one_call for part in ("linears", "attention"))
            if not in_one_call:
                assert (parts["LoRA"] > 0) == name.endswith("mixed")
    assert (tmp_path / "step_profile.png").stat().st_size > 5000
