"""Perplexity and divergence against their definitions, and the report."""

import json
import math

import pytest
import torch
from lorikeet.server.evaluation.divergence import DivergenceMeter, logprobs_of
from lorikeet.server.evaluation.divergence_result import Divergence
from lorikeet.server.evaluation.errors import EvaluationError
from lorikeet.server.evaluation.perplexity import Perplexity, PerplexityMeter
from lorikeet.server.evaluation.report import ComparisonReport, PathResult
from torch.nn.functional import kl_div


def test_perplexity_of_known_probabilities():
    meter = PerplexityMeter()
    meter.add([math.log(0.5)])
    meter.add([math.log(0.125), math.log(0.5), math.log(0.125)])
    found = meter.result()
    assert found.tokens == meter.tokens == 4
    assert found.value == pytest.approx(4.0)
    # Losses of 1, 3, 1, 3 bits: deviation 2 / sqrt(3), over the root of 4.
    assert found.error == pytest.approx(math.log(2) / math.sqrt(3))


def test_an_impossible_token_is_infinite_and_one_token_has_no_error():
    meter = PerplexityMeter()
    meter.add([-math.inf])
    assert (meter.result().value, meter.result().error) == (math.inf, 0.0)


# (float32, 1e-5): sums of 150 terms.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_divergence_is_torchs_and_logprobs_are_log_softmax(dtype: torch.dtype):
    torch.manual_seed(3)
    p, q = torch.randn(150, 301).mul(3).to(dtype), torch.randn(150, 301).mul(3).to(dtype)
    q[:70] = p[:70]
    meter = DivergenceMeter()
    for rows in (slice(0, 1), slice(1, 140), slice(140, 150)):
        meter.add(p[rows], q[rows])
    each = kl_div(q.float().log_softmax(-1), p.float().log_softmax(-1), log_target=True, reduction="none").sum(-1)
    found = meter.result()
    assert found.tokens == 150
    assert found.mean == pytest.approx(each.mean().item(), abs=1e-5)
    assert found.largest == pytest.approx(each.max().item(), abs=1e-4)
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    targets = torch.randint(0, 301, (150,))
    wanted = p.float().log_softmax(-1)[torch.arange(150), targets]
    torch.testing.assert_close(logprobs_of(p, targets), wanted, atol=1e-6, rtol=0)


def test_masked_ids_count_nothing_and_other_vocabularies_are_refused():
    p = torch.tensor([[0.0, 1.0, -torch.inf]])
    meter = DivergenceMeter()
    meter.add(p, p)
    assert meter.result() == Divergence(1, 0.0, 0.0, 1.0)
    with pytest.raises(EvaluationError, match="3 and 4 tokens"):
        meter.add(p, torch.zeros(1, 4))


def report(base: float, unmerged: float, merged: float) -> ComparisonReport:
    def way(name: str, perplexity: float, divergence: Divergence | None = None) -> PathResult:
        return PathResult(name, Perplexity(100, math.log(perplexity), 0.1), divergence, 3 * 2**20, 2**20, 0.0123)

    far = Divergence(100, 0.01, 1.5, 0.97)
    return ComparisonReport(
        way("base in NF4", base), way("unmerged", unmerged), way("merged", merged, far), "cpu", "float32", 64, 32
    )


def test_gain_kept():
    assert report(20, 10, 12).gain_kept == pytest.approx(0.8)
    assert report(20, 10, 21).gain_kept == pytest.approx(-0.1)
    assert report(10, 10, 10).gain_kept is None


def test_a_report_reads_well_and_comes_back_from_json():
    found = report(20, 10, 12)
    value = json.loads(json.dumps(found.to_json()))
    assert value["merged"]["perplexity"]["value"] == pytest.approx(12)
    assert PathResult.from_json(value["merged"]) == found.merged
    assert PathResult.from_json(value["base"]) == found.base
    lines = found.table().splitlines()
    assert lines[0].split() == [
        "PATH",
        "PERPLEXITY",
        "MEAN",
        "KL",
        "MAX",
        "KL",
        "SAME",
        "TOP",
        "DISK",
        "MEMORY",
        "STEP",
    ]
    assert lines[3].split() == [
        "merged",
        "12.000",
        "0.0100",
        "1.500",
        "97.0%",
        "3.0",
        "MiB",
        "1.0",
        "MiB",
        "12.3",
        "ms",
    ]
    assert "keeps 80%" in lines[4]
    assert "do not lower" in report(10, 11, 12).table()
