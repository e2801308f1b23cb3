"""`lorikeet generate --adapter ID:WEIGHT ...` and the Python client, against a server with fakes below."""

import json

import pytest
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.protos.v1 import generation_pb2 as pb
from lorikeet.server import cli
from lorikeet.server.client import LorikeetClient, generate_request

from .fakes import VERSIONS

KJV, DEVIL = VERSIONS["kjv"], VERSIONS["devil"]


def run(address, *arguments):
    return cli.run(["generate", "--address", address, *arguments, "In the beginning"])


@pytest.mark.parametrize(
    ("adapters", "members", "says"),
    [
        (["kjv:0.75", "devil:2"], [(KJV, 0.75), (DEVIL, 2)], "devil @ d2d2d2d2d2d2 x 2 + kjv @ d1d1d1d1d1d1 x 0.75: "),
        (["kjv", "devil"], [(KJV, 1.0), (DEVIL, 1.0)], "devil @ d2d2d2d2d2d2 x 1 + kjv @ d1d1d1d1d1d1 x 1: "),
        (["kjv:0.5"], [(KJV, 0.5)], "kjv @ d1d1d1d1d1d1 x 0.5: "),
        (["kjv@d1d1:-1"], [(KJV, -1.0)], "kjv @ d1d1d1d1d1d1 x -1: "),
        (["kjv:1"], [(KJV, 1.0)], "kjv @ d1d1d1d1d1d1 x 1: "),
        (["prod"], [(KJV, 1.0)], "kjv @ d1d1d1d1d1d1: "),
        ([], None, "base: "),
        ([""], None, "base: "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_json", [False, True])
def test_generate_with_weights_says_what_answered(address, engine, capsys, adapters, members, says, as_json):
    flags = [word for adapter in adapters for word in ("--adapter", adapter)]
    assert run(address, *flags, "--stats", *["--json"] * as_json) == 0
    output = capsys.readouterr()
    assert output.err.startswith(says)
    if as_json:
        assert len(json.loads(output.out)["adapters"]) == (len(members) if " x " in says else 0)
    [request] = engine.submitted
    assert request.adapter == (Adaptation.of(members) if members else None)


@pytest.mark.parametrize("adapter", ["kjv:", "kjv:x", ":0.5", "kjv:0.5:1", ":"])
def test_malformed_weight_is_refused_before_a_server_is_asked(capsys, adapter):
    with pytest.raises(SystemExit) as caught:
        run("127.0.0.1:1", "--adapter", adapter)
    assert caught.value.code == 2
    assert "is no adapter with a weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        (["kjv:nan"], "strength is nan"),
        (["kjv:1e30"], "strength is 1e+30"),
        (["kjv:1e400", "devil"], "adapters[0].weight is inf"),
        (["kjv", "devil:101"], "adapters[1].weight is 101; allowed: a number from -100 to 100"),
        (["kjv", "nope"], "There is no adapter 'nope'"),
        (["kjv"] * 9, "adapters has 9 members; allowed: 1 to 8"),
    ],
)
def test_what_the_server_refuses_is_one_line(address, engine, capsys, adapters, words):
    assert run(address, *[word for adapter in adapters for word in ("--adapter", adapter)]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert engine.submitted == []


@pytest.mark.parametrize("adapters", [{"kjv": 0.5, "devil": 2}, [("kjv", 0.5), ("devil", 2)]])
def test_client_takes_pairs_or_a_mapping(address, adapters):
    want = [pb.WeightedAdapter(adapter_id="kjv", weight=0.5), pb.WeightedAdapter(adapter_id="devil", weight=2)]
    assert list(generate_request(prompt="x", adapters=adapters).adapters) == want
    with LorikeetClient(address, timeout_s=10) as client:
        answer = client.generate(prompt="x", adapters=adapters)
        assert [(each.adapter.adapter_id, each.weight) for each in answer.adapters] == [("devil", 2), ("kjv", 0.5)]
        strong = client.generate(prompt="x", adapter_id="kjv", strength=1.5)
        assert [(each.adapter.adapter_id, each.weight) for each in strong.adapters] == [("kjv", 1.5)]
