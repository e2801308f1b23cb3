"""The Python client and the client commands against a server with fakes below, on a thread of its own."""

import asyncio
import json
import shlex
import threading

import pytest
import structlog
from lorikeet.protos.v1 import generation_pb2 as pb
from lorikeet.server import cli
from lorikeet.server.client import GenerateOptions, LorikeetClient, generate_request
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.status import RemoteError

from .fakes import FakeEngine
from .test_grpc_server import KJV, FakeManager, serve


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def address(engine):
    """Address of a server that runs as long as the test."""
    loop = asyncio.new_event_loop()
    started = threading.Event()
    stop = asyncio.Event()
    addresses = []

    async def run():
        async with serve(FakeManager(KJV), engine) as (_, _, port):
            addresses.append(f"127.0.0.1:{port}")
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    with structlog.testing.capture_logs():  # by default they go to standard output, where the commands print
        thread.start()
        assert started.wait(10)
        yield addresses[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join()
    loop.close()


@pytest.fixture
def client(address):
    with LorikeetClient(address, timeout_s=10) as client:
        yield client


def test_options_are_the_fields_of_a_request():
    options = GenerateOptions.__annotations__.keys()
    nested = {*pb.Sampling.DESCRIPTOR.fields_by_name, *pb.Stopping.DESCRIPTOR.fields_by_name}
    assert options == {*pb.GenerateRequest.DESCRIPTOR.fields_by_name} - {"sampling", "stopping"} | nested


def test_request_has_the_options_in_their_places():
    request = generate_request(
        messages=[("user", "hi")], adapter_id="kjv", max_tokens=5, temperature=0, seed=1, stop=["END"], ignore_eos=True
    )
    assert request == pb.GenerateRequest(
        messages=[pb.Message(role="user", content="hi")],
        adapter_id="kjv",
        max_tokens=5,
        sampling=pb.Sampling(temperature=0, seed=1),
        stopping=pb.Stopping(stop=["END"], ignore_eos=True),
    )
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")


def test_generate_and_stream(client):
    assert client.generate(prompt="x", adapter_id="kjv").text == "Hello world"
    events = list(client.stream(prompt="x"))
    assert "".join(event.delta.text for event in events) == "Hello world"


def test_leaving_a_stream_cancels_it(client, engine):
    engine.script = lambda request: []
    for event in client.stream(prompt="x"):
        assert event.HasField("started")
        break
    assert engine.on_abort.wait(10)


def test_adapters_and_health(client):
    assert client.load_adapter("new").adapter_id == "new"
    assert client.get_adapter("kjv").max_rank == 8
    assert [adapter.adapter_id for adapter in client.list_adapters()] == ["kjv"]
    client.unload_adapter("kjv")
    assert client.list_adapters() == []
    assert client.is_serving()


def test_errors_are_typed(client):
    with pytest.raises(RemoteError) as caught:
        client.generate(prompt="x", adapter_id="nope")
    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    with pytest.raises(RemoteError, match="temperature is -1"):
        list(client.stream(prompt="x", temperature=-1))


def test_command_generate_prints_the_text(address, capsys):
    assert cli.run(["generate", "--address", address, "--adapter", "kjv", "--stats", "In the beginning"]) == 0
    output = capsys.readouterr()
    assert output.out == "Hello world\n"
    assert output.err.startswith("kjv @ d1d1d1d1d1d1: 3 prompt tokens (1 cached), 2 generated in ")


def test_command_generate_passes_every_option(address, engine, capsys):
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


def test_command_generate_reads_standard_input(address, engine, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("ab"))
    assert cli.run(["generate", "--address", address]) == 0
    assert engine.submitted[0].prompt_token_ids == [1, ord("a"), ord("b")]


def test_command_generate_chat(address, engine):
    assert cli.run(["generate", "--address", address, "--system", "S", "U"]) == 0
    assert engine.submitted[0].prompt_token_ids == [ord(c) % 100 for c in "s:S|u:U|"]


def test_command_generate_json(address, capsys):
    assert cli.run(["generate", "--address", address, "--json", "x"]) == 0
    response = json.loads(capsys.readouterr().out)
    assert (response["text"], response["token_ids"], response["finish_reason"]) == (
        "Hello world",
        [0, 1],
        "FINISH_REASON_STOP",
    )


def test_command_adapters(address, capsys):
    assert cli.run(["adapters", "list", "--address", address]) == 0
    header, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header[:3] == ["ADAPTER", "STATE", "TIER"]
    assert row[:4] == ["kjv", "ready", "device", "8"]
    assert cli.run(["adapters", "list", "--json", "--address", address]) == 0
    assert json.loads(capsys.readouterr().out)[0]["adapter_id"] == "kjv"
    assert cli.run(["adapters", "get", "--address", address, "kjv"]) == 0
    text = capsys.readouterr().out
    assert "method     rsLoRA" in text
    assert "q_proj" in text
    assert cli.run(["adapters", "load", "--address", address, "new"]) == 0
    assert cli.run(["adapters", "unload", "--address", address, "kjv"]) == 0
    capsys.readouterr()
    assert cli.run(["adapters", "list", "--address", address]) == 0
    assert capsys.readouterr().out == "no adapters\n"


def test_command_health(address, capsys):
    assert cli.run(["health", "--address", address]) == 0
    assert capsys.readouterr().out == "SERVING\n"


def test_server_errors_are_one_line_and_status_1(address, capsys):
    assert cli.run(["generate", "--address", address, "--adapter", "nope", "x"]) == 1
    output = capsys.readouterr()
    assert output.err == "lorikeet: NOT_FOUND (ADAPTER_NOT_FOUND): There is no adapter 'nope'.\n"
