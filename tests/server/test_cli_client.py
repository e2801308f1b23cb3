"""`lorikeet generate` and `lorikeet health` against a server with fakes below, on a thread of its own."""

import io
import json
import shlex

import pytest
from lorikeet.server import cli
from lorikeet.server.engine.sampling_params import SamplingParams


def test_generate_prints_the_text(address, capsys):
    assert cli.run(["generate", "--address", address, "--adapter", "kjv", "--stats", "In the beginning"]) == 0
    output = capsys.readouterr()
    assert output.out == "Hello world\n"
    assert output.err.startswith("kjv @ d1d1d1d1d1d1: 3 prompt tokens (1 cached), 2 generated in ")


@pytest.mark.parametrize("reference", ["prod", "kjv@d1d1"])
def test_generate_says_which_version_answered_for_a_reference(address, capsys, reference):
    arguments = ["generate", "--address", address, "--adapter", reference, "--routing-key", "user 7", "--stats", "x"]
    assert cli.run(arguments) == 0
    assert capsys.readouterr().err.startswith("kjv @ d1d1d1d1d1d1: ")


def test_generate_passes_every_option(address, engine, capsys):
    arguments = shlex.split(
        "--max-tokens 9 --temperature 0.5 --top-k 3 --top-p 0.25 --min-p 0.125 --repetition-penalty 1.5 "
        "--presence-penalty -0.5 --frequency-penalty 0.75 --seed 7 --stop a --stop b --stop-token-ids 5 6 "
        "--include-stop --ignore-eos --min-tokens 2"
    )
    assert cli.run(["generate", "--address", address, "x", *arguments]) == 0
    assert engine.submitted[0].params == SamplingParams(
        temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, repetition_penalty=1.5, presence_penalty=-0.5,
        frequency_penalty=0.75, seed=7, max_tokens=9, min_tokens=2, stop=("a", "b"), stop_token_ids=(5, 6),
        include_stop=True, ignore_eos=True,
    )  # fmt: skip
    assert capsys.readouterr().out == "Hello world\n"


@pytest.mark.parametrize(
    ("option", "value", "most"),
    [
        ("--top-k", "2147483648", 2**31 - 1),
        ("--max-tokens", "-1", 2**31 - 1),
        ("--min-tokens", "99999999999", 2**31 - 1),
        ("--seed", str(2**64), 2**64 - 1),
        ("--stop-token-ids", "-1", 2**32 - 1),
    ],
)
def test_numbers_that_a_request_has_no_room_for(capsys, option, value, most):
    with pytest.raises(SystemExit) as caught:
        cli.run(["generate", option, value, "--", "x"])
    assert caught.value.code == 2
    assert f"argument {option}: {value} is out of range; give 0 to {most}" in capsys.readouterr().err


def test_largest_numbers_are_passed(address, engine):
    arguments = ["--top-k", str(2**31 - 1), "--seed", str(2**64 - 1)]
    assert cli.run(["generate", "--address", address, *arguments, "x"]) == 0
    assert (engine.submitted[0].params.top_k, engine.submitted[0].params.seed) == (2**31 - 1, 2**64 - 1)


@pytest.mark.parametrize("option", ["--temperature", "--top-p", "--repetition-penalty"])
def test_numbers_that_are_none_are_the_servers_to_refuse(address, capsys, option):
    for value in ("1e40", "nan"):
        assert cli.run(["generate", "--address", address, option, value, "x"]) == 1
        assert f"{option[2:].replace('-', '_')} is" in capsys.readouterr().err


def test_generate_passes_the_routing_key(address, capsys):
    assert cli.run(["generate", "--address", address, "--adapter", "kjv", "--routing-key", "a\nb", "x"]) == 1
    assert "routing_key has 3 characters" in capsys.readouterr().err


def test_generate_reads_standard_input(address, engine, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab"))
    assert cli.run(["generate", "--address", address]) == 0
    assert engine.submitted[0].prompt_token_ids == [1, ord("a"), ord("b")]


def test_generate_chat(address, engine):
    assert cli.run(["generate", "--address", address, "--system", "S", "U"]) == 0
    assert engine.submitted[0].prompt_token_ids == [ord(c) % 100 for c in "s:S|u:U|"]


def test_generate_json(address, capsys):
    assert cli.run(["generate", "--address", address, "--json", "x"]) == 0
    response = json.loads(capsys.readouterr().out)
    assert (response["text"], response["token_ids"], response["finish_reason"]) == (
        "Hello world",
        [0, 1],
        "FINISH_REASON_STOP",
    )


def test_health(address, capsys):
    assert cli.run(["health", "--address", address]) == 0
    assert capsys.readouterr().out == "SERVING\n"


def test_server_errors_are_one_line_and_status_1(address, capsys):
    assert cli.run(["generate", "--address", address, "--adapter", "nope", "x"]) == 1
    output = capsys.readouterr()
    assert output.err == "lorikeet: NOT_FOUND (ADAPTER_NOT_FOUND): There is no adapter 'nope'.\n"


def test_no_answer_in_time_names_the_flag(address, engine, capsys):
    engine.script = lambda request: []
    assert cli.run(["generate", "--address", address, "--timeout", "0.2", "x"]) == 1
    assert capsys.readouterr().err == "lorikeet: no answer within 0.2 s. Give it longer with --timeout.\n"
