"""What `make fidelity` says of its results: the order, why it is so, and step times side by side."""

import importlib
import math
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from lorikeet.server.evaluation.divergence_result import Divergence
from lorikeet.server.evaluation.measured import StepTimes, Way
from lorikeet.server.evaluation.perplexity import Perplexity
from lorikeet.server.evaluation.report import PathResult

from .scripts import BENCHMARKS

AS_PUBLISHED = {
    Way.BASE_16BIT: 4.30,
    Way.BASE_NF4: 4.35,
    Way.UNMERGED: 3.55,
    Way.MERGED_ONTO_ORIGINAL: 3.58,
    Way.MERGED_ONTO_NF4: 3.56,
    Way.MERGED_AUTOROUND: 3.80,
    Way.MERGED_AWQ: 3.88,
    Way.MERGED_NF4: 4.33,
}


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"fidelity_{name}") for name in ("findings", "page")})
    finally:
        sys.path.remove(str(BENCHMARKS))


def results(changes: dict[Way, float] | None = None) -> dict[Way, PathResult]:
    return {
        way: PathResult(way.value, Perplexity(500, math.log(value), 0.01), Divergence(500, 0.1, 2.0, 0.9), 2**20, 2**20)
        for way, value in (AS_PUBLISHED | (changes or {})).items()
    }


def test_the_published_order_is_known_when_it_is_there(bench: SimpleNamespace) -> None:
    order, onto_nf4, original, twice, nf4 = bench.findings.findings(results(), 0.9987)
    assert order == "The order is as published."
    assert "3.55 and 3.56, mean KL 0.1000" in onto_nf4
    assert "0.05 of perplexity (4.30 in 16 bit, 4.35 in NF4)" in original
    assert "merged AutoRound +0.24 and merged AWQ +0.32" in twice
    assert "it has 4.33, 2% of the gain" in nf4 and "99.87% are those of the base" in nf4


def test_what_comes_elsewhere_is_named_with_its_share(bench: SimpleNamespace) -> None:
    order = bench.findings.findings(results({Way.MERGED_NF4: 3.60, Way.MERGED_ONTO_ORIGINAL: 3.15}), None)[0]
    assert order.startswith("The order is not as published: ")
    assert "merged NF4 (94% of the gain) comes before merged AWQ (59%)" in order
    assert "merged 16-bit onto original (150%) is better than unmerged" in order
    worse = bench.findings.findings(results({Way.MERGED_ONTO_NF4: 3.75}), None)[0]
    assert "merged 16-bit onto NF4 (75%) is worse than unmerged" in worse


def test_little_measured_and_no_gain(bench: SimpleNamespace) -> None:
    assert bench.findings.findings({Way.UNMERGED: results()[Way.UNMERGED]}, None) == []
    assert bench.findings.findings(results({Way.UNMERGED: 4.4}), None) == [
        "The adapter does not lower the perplexity of this text."
    ]


def test_the_page_has_every_way_and_step_times_in_turns(bench: SimpleNamespace) -> None:
    seconds = {Way.UNMERGED: [0.01, 0.02, 0.04], Way.MERGED_NF4: [0.03, 0.04, 0.04]}
    steps = {"ours": StepTimes("a machine; today", 4, seconds)}
    missing = {"ours": {Way.MERGED_GPTQ: "no package"}}
    settings = {"command": "make fidelity"}
    page = bench.page.page({"ours": results()}, missing, steps, {"ours": 0.5}, settings, "machine", "plot.png")
    assert "| PATH | PERPLEXITY | MEAN KL | MAX KL | SAME TOP | DISK | MEMORY |" in page
    assert "| merged NF4 | 2% | 4.33 |" in page and "Not measured: merged GPTQ: no package" in page
    assert "| merged NF4 | 40.0 (30.0..40.0) | 2.00 (1.00..3.00) |" in page and "a machine; today" in page
    assert "ours: decode step in ms" in bench.page.text_table({"ours": results()}, missing, steps, {})
