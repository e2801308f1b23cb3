"""`make bench-front` on a tiny model: the real script and processes; benchmarks/process_costs.py without servers."""

import json
import sys
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace

import pytest

from .scripts import BENCHMARKS, run_script

pytest.importorskip("matplotlib")


def test_front_measures_costs_and_loses_no_token(tiny_model, tmp_path):
    text = run_script("front.py", "--model", tiny_model, "--out", tmp_path, "--quick")
    assert 0 < text.index("CPU us/token, front, relative to 4 streams") < text.index("tokens/s delivered")
    result = json.loads((tmp_path / "front.json").read_text())
    (run,) = result["rounds"]["this"]["4"]
    assert 1 <= run["tokens_per_message"] <= 3
    assert 0 < run["loop_share"] < 1
    assert 0 < run["loop_us_per_request"] <= run["front_us_per_request"]
    assert 0 < run["delay_p50_ms"] <= run["delay_p99_ms"]
    assert (tmp_path / "front.png").stat().st_size > 5000
    assert str(tiny_model) not in json.dumps(result)


def test_process_costs_are_printed_beside_their_goals(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import process_costs

    spent = count()  # a second of processor time between two looks
    starts = iter((9.0, 4.0, 3.0, 6.0, 8.0, 7.0))

    @contextmanager
    def fake_server(arguments, log):
        assert "--adapters" in arguments
        yield SimpleNamespace(
            start_s=next(starts), start_cpu_s=2.0, resident_bytes=3_000_000, cpu_s=lambda: float(next(spent))
        )

    monkeypatch.setattr(process_costs, "running_server", fake_server)
    options = ["--starts", "3", "--adapters", "2", "--idle", "0.02", "--settle", "0"]
    monkeypatch.setattr(sys, "argv", ["process_costs.py", "--model", str(tiny_model), "--out", str(tmp_path), *options])
    assert process_costs.main() == 0
    text = capsys.readouterr().out
    assert "< 5" in text and "< 2" in text and "first start of all took 9.0 s" in text
    result = json.loads((tmp_path / "process_costs.json").read_text())
    assert result["start_s"]["examples"] == {"median": 3.5, "low": 3.0, "high": 4.0}  # without the first of all
    assert result["start_s"]["many"] == {"median": 7.0, "low": 6.0, "high": 8.0}
    assert result["folders"]["many"]["adapters"] == 2
    assert all(0 < costs["idle"] <= 50 for costs in result["folders"].values())
    assert str(tiny_model) not in json.dumps(result)
