"""`lorikeet eval`: against a server with fakes below, and with an engine in this process."""

import json
import math
from pathlib import Path

import pytest
from lorikeet.server import cli
from lorikeet.server.cli_eval import Evaluated, evaluated

from .test_score_service import scores


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh\n\nxy", encoding="utf-8")
    return path


def test_adapters_and_base_through_a_server(address, engine, text, capsys):
    engine.script = scores
    arguments = ["eval", "--address", address, "--text", str(text), "--adapter", "prod:0.5", "--adapter", "kjv+devil:2"]
    assert cli.run([*arguments, "--context", "6", "--stride", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["ADAPTER", "PERPLEXITY"]
    assert [line.split()[0] for line in lines[1:-1]] == ["base", "prod:0.5", "kjv+devil:2"]
    assert lines[-1].startswith("windows of 6 tokens, 2 apart")
    # 13 tokens with that of the beginning: 1 to 5, then 2 at a time behind 4, the last window moved back.
    asked = [(r.scored.token_ids, r.scored.next) for r in engine.submitted if r.adapter is None]
    assert sorted((len(tokens), first) for tokens, first in asked) == [(6, 1), (6, 4), (6, 4), (6, 4), (6, 5)]
    members = [{m.version.adapter_id: m.weight for m in r.adapter.members} for r in engine.submitted if r.adapter]
    assert members.count({"kjv": 0.5}) == members.count({"kjv": 1.0, "devil": 2.0}) == len(members) / 2 == 5


def test_paragraphs_json_and_no_base(address, engine, text, capsys):
    engine.script = scores
    arguments = ["eval", "--address", address, "--text", str(text), "--adapter", "kjv", "--no-base", "--json"]
    assert cli.run([*arguments, "--by-paragraph"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["context"], found["stride"]) == (64, 32)
    # Log probabilities are the negative index: 1 to 8, and 1 to 2.
    assert found["results"] == [
        {
            "adapter": "kjv",
            "perplexity": pytest.approx(math.exp(39 / 10)),
            "loss": pytest.approx(3.9),
            "standard_error": pytest.approx(found["results"][0]["standard_error"]),
            "tokens": 10,
        }
    ]


@pytest.mark.parametrize(
    ("extra", "status", "words"),
    [
        (["--adapter", "nope"], 1, "There is no adapter"),
        (["--stride", "40"], 2, "allowed: 1 to 32"),
        (["--context", "65"], 2, "takes at most 64"),
        (["--text", "gone.txt"], 2, "cannot be read"),
        (["--model", "gone/gone/gone"], 2, "neither an existing directory nor a hub id"),
    ],
    ids=["adapter", "stride", "context", "text", "model"],
)
def test_errors_are_one_line(address, engine, text, capsys, extra, status, words):
    engine.script = scores
    assert cli.run(["eval", "--address", address, "--text", str(text), *extra]) == status
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_members_are_joined_with_plus():
    assert evaluated("a:0.5+b") == Evaluated("a:0.5+b", (("a", 0.5), ("b", None)))
