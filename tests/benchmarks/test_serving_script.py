"""`make bench-serving` on a tiny model: the real script, server and client, and what they say of each other."""

import json
from pathlib import Path

import pytest

from .scripts import BENCHMARKS, run_script

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("bench-serving")
    options = (
        "--quick",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--kv-cache-bytes",
        "8MiB",
        "--calibrate",
        "0.2",
        "--adapters",
        "6",
    )
    return run_script("serving.py", "--model", tiny_model, "--out", out, *options), out


def test_serving_prints_ratios_before_the_table(finished):
    text, _ = finished
    assert 0 < text.index("output tokens/s, relative") < text.index("requests/s  ") < text.index("client late")


def test_serving_client_and_server_agree(finished):
    _, out = finished
    result = json.loads((out / "serving.json").read_text())
    (run,) = result["rounds"]["6"]
    assert run["codes"] == {"OK": result["settings"]["requests"]}
    assert run["output_tokens"] == run["server"]["generated_tokens"] > 0
    assert 4 < run["distinct_adapters"] <= 6
    assert run["loads"] > 0  # of six adapters only four fit
    # The server cannot have had a token later than its client, nor their distance another mean.
    assert 0 < run["server"]["mean_ttft_s"] <= run["client: time to first token, mean, s"] + 1e-3
    assert run["server"]["mean_itl_s"] == pytest.approx(run["mean_itl_s"], rel=0.5, abs=0.02)
    assert 0 <= run["good"] <= run["requests"]
    assert result["settings"]["rate_requests_per_s"] == pytest.approx(
        result["settings"]["load"] * result["settings"]["capacity_requests_per_s"]
    )
    assert (out / "serving.png").stat().st_size > 5000


def test_serving_result_names_no_path_of_the_machine(finished, tiny_model):
    _, out = finished
    text = (out / "serving.json").read_text()
    assert str(tiny_model) not in text
    assert str(out) not in text


def test_a_run_is_summed_up_as_the_client_saw_it(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from server_process import Scrape
    from serving_client import Seen
    from serving_run import Slo, evaluate

    seen = [
        Seen(due=1.0, sent=1.25, message_at=[2.0, 3.0], tokens=[1, 3], ended=3.5),
        Seen(due=2.0, sent=2.0, message_at=[9.0], tokens=[2], ended=9.0),
        Seen(due=2.0, sent=2.0, ended=5.0, code="RESOURCE_EXHAUSTED"),
    ]
    metrics = Scrape(
        {
            ("lorikeet_rpcs_total", frozenset({("code", "OK"), ("method", "GenerateStream")})): 2.0,
            ("lorikeet_rpcs_total", frozenset({("code", "RESOURCE_EXHAUSTED")})): 1.0,
            ("lorikeet_generated_tokens_total", frozenset({("adapter", "a")})): 6.0,
            ("lorikeet_adapter_loads_total", frozenset({("outcome", "ok")})): 1.0,
        }
    )
    requests = [{"adapter_id": name} for name in ("a", "b", "a")]
    run = evaluate(seen, requests, metrics, Slo(ttft_s=6.0, itl_s=0.4))
    assert (run.sent, run.requests, run.good, run.output_tokens) == (3, 2, 1, 6)
    assert run.ttft_s == [1.0, 7.0] and run.itl_s == [1.0] and run.late_s == [0.25, 0.0, 0.0]
    assert run.mean_itl_s == pytest.approx(1 / 4)  # three tokens after the first one, one beside another
    assert run.wall_s == 8.0 and run.distinct_adapters == 2 and run.loads == 1
    assert run.tokens_per_message == 2.0
    with pytest.raises(RuntimeError, match="the server with"):
        evaluate(seen[:2], requests[:2], metrics, Slo(6.0, 0.4))
