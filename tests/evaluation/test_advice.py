"""Advice from measured tables: kept ones and reports of merges."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from lorikeet.adapters.inspection import inspect_directory
from lorikeet.server import cli
from lorikeet.server.evaluation.advice import advise
from lorikeet.server.evaluation.divergence_result import Divergence
from lorikeet.server.evaluation.measured import MeasuredTable, StepTimes, Way
from lorikeet.server.evaluation.perplexity import Perplexity
from lorikeet.server.evaluation.report import PathResult

ADAPTER = Path(__file__).resolve().parents[2] / "examples" / "adapters" / "kjv"


def result(way: Way, perplexity: float, mib: float = 100.0, step_s: float | None = 0.02) -> PathResult:
    size = int(mib * 2**20)
    return PathResult(
        way.value, Perplexity(500, math.log(perplexity), 0.01), Divergence(500, 0.1, 2.0, 0.9), size, size, step_s
    )


TABLE = {
    Way.BASE_NF4: result(Way.BASE_NF4, 40, 100),
    Way.UNMERGED: result(Way.UNMERGED, 20, 105),
    Way.MERGED_ONTO_ORIGINAL: result(Way.MERGED_ONTO_ORIGINAL, 22, 250),
    Way.MERGED_ONTO_NF4: result(Way.MERGED_ONTO_NF4, 20.2, 250),
    Way.MERGED_AUTOROUND: result(Way.MERGED_AUTOROUND, 23, 120),
    Way.MERGED_NF4: result(Way.MERGED_NF4, 36, 100),
}


def test_every_way_has_its_line_with_numbers():
    unmerged, one_file, never = advise(TABLE)
    assert "serve it unmerged" in unmerged and "20.00" in unmerged and "5.0 MiB" in unmerged and "20.0 ms" in unmerged
    assert "merged 16-bit onto NF4: perplexity 20.20, keeps 99% of the gain" in one_file
    assert "where size counts, merged AutoRound: perplexity 23.00, keeps 85%" in one_file
    assert never.startswith("Never merged and quantized to NF4 again: perplexity 36.00, keeps 20%")


def test_a_four_bit_way_that_loses_most_is_advised_against():
    one_file = advise({**TABLE, Way.MERGED_AUTOROUND: result(Way.MERGED_AUTOROUND, 35)})[1]
    assert "not merged AutoRound" in one_file
    # The 16-bit base can be so much better than the NF4 one that merging gains.
    better = advise({**TABLE, Way.MERGED_ONTO_ORIGINAL: result(Way.MERGED_ONTO_ORIGINAL, 15)})[1]
    assert "merged 16-bit onto original: perplexity 15.00, keeps 125% of the gain" in better


def test_little_measured_and_no_gain():
    few = {way: TABLE[way] for way in (Way.BASE_NF4, Way.UNMERGED)}
    assert "no merged way was measured" in advise(few)[1]
    assert "not measured here" in advise(few)[2]
    assert "does not lower" in advise({**few, Way.UNMERGED: result(Way.UNMERGED, 41)})[-1]
    without = advise({**TABLE, Way.UNMERGED: result(Way.UNMERGED, 41)})
    assert "not merged AutoRound: perplexity 23.00, mean" in without[1] and "does not lower" in without[-1]


def test_a_table_keeps_what_was_measured_with_the_same_settings(tmp_path):
    table = MeasuredTable(tmp_path, "d" * 64)
    assert table.all() == {}
    settings = {"text": "t", "context": 64}
    for way, found in TABLE.items():
        table.put(way, settings, found)
    untimed = {way: replace(found, step_s=None) for way, found in TABLE.items()}
    assert MeasuredTable(tmp_path, "d" * 64).all() == untimed
    assert table.get(Way.UNMERGED, settings) == TABLE[Way.UNMERGED]
    assert table.get(Way.UNMERGED, {**settings, "context": 32}) is None
    # Of another text: no longer comparable with the unmerged adapter's.
    table.put(Way.MERGED_NF4, {**settings, "text": "other"}, TABLE[Way.MERGED_NF4])
    assert Way.MERGED_NF4 not in table.all()
    path = next(tmp_path.rglob("merged_autoround.json"))
    path.write_text(path.read_text()[:50])
    assert Way.MERGED_AUTOROUND not in table.all()


def test_step_times_are_those_that_were_taken_side_by_side(tmp_path):
    table = MeasuredTable(tmp_path, "d" * 64)
    for way, found in TABLE.items():
        table.put(way, {"text": "t"}, found)
    assert table.steps() is None
    times = StepTimes("here, today", 4, {Way.UNMERGED: [0.03, 0.01, 0.02], Way.MERGED_NF4: [0.5, 0.7, 0.6]})
    table.put_steps(times)
    assert MeasuredTable(tmp_path, "d" * 64).steps() == times
    seconds = {way: found.step_s for way, found in table.all().items()}
    assert seconds == {**dict.fromkeys(TABLE), Way.UNMERGED: 0.02, Way.MERGED_NF4: 0.6}
    next(tmp_path.rglob("steps.json")).write_text('{"seconds": {"no way": [1]}}')
    assert table.steps() is None


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A folder with the report of a merge of the demo's adapter."""
    digest = inspect_directory(ADAPTER).digest
    ways = {"base": Way.BASE_NF4, "unmerged": Way.UNMERGED, "merged": Way.MERGED_ONTO_NF4}
    report = {
        "adapters": [{"id": "kjv", "version": digest, "weight": 1.0}],
        "onto": "nf4",
        "to": "bf16",
        "comparison": {name: TABLE[way].to_json() for name, way in ways.items()},
    }
    (tmp_path / "merge_report.json").write_text(json.dumps(report))
    return tmp_path


def test_the_command_reads_reports(merged, capsys):
    assert cli.run(["advise", "--adapter", str(ADAPTER), "--merged", str(merged)]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[0].startswith("PATH")
    assert "- One adapter and one file: merged 16-bit onto NF4" in output
    assert cli.run(["advise", "--adapter", str(ADAPTER), "--merged", str(merged), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["measured"]) == {"NF4 base", "unmerged on NF4", "merged 16-bit onto NF4"}
    assert len(found["advice"]) == 3


@pytest.mark.parametrize(
    ("onto", "to", "said"),
    [("nf4", "gptq", "where size counts, merged GPTQ"), ("original", "fp32", "merged 32-bit onto original")],
)
def test_the_command_knows_every_form(onto, to, said, merged, capsys):
    report = json.loads((merged / "merge_report.json").read_text()) | {"onto": onto, "to": to}
    (merged / "merge_report.json").write_text(json.dumps(report))
    assert cli.run(["advise", "--adapter", str(ADAPTER), "--merged", str(merged)]) == 0
    assert f"- One adapter and one file: {said}" in capsys.readouterr().out


def test_the_command_says_what_to_run_and_what_is_wrong(merged, tmp_path, capsys):
    assert cli.run(["advise", "--adapter", str(ADAPTER), "--cache-dir", str(tmp_path / "empty")]) == 2
    assert "lorikeet merge --model BASE" in capsys.readouterr().err
    assert cli.run(["advise", "--adapter", str(tmp_path / "gone")]) == 2
    assert "is no directory" in capsys.readouterr().err
    other = ADAPTER.parent / "devil"
    assert cli.run(["advise", "--adapter", str(other), "--merged", str(merged)]) == 2
    assert "merged from another adapter" in capsys.readouterr().err
    report = json.loads((merged / "merge_report.json").read_text())
    (merged / "merge_report.json").write_text(json.dumps(report | {"to": "int3"}))
    assert cli.run(["advise", "--adapter", str(ADAPTER), "--merged", str(merged)]) == 2
    known = "autoround, awq, bf16, fp32, gptq, nf4"
    assert f"written as int3, and only these are advised on: {known}" in capsys.readouterr().err
    (merged / "merge_report.json").write_text("{}")
    assert cli.run(["advise", "--adapter", str(ADAPTER), "--merged", str(merged)]) == 2
    assert "no merge_report.json that can be read" in capsys.readouterr().err
