"""A real server process and real clients over loopback: answers, errors, cancellation, concurrency."""

import asyncio
import json
import subprocess

import grpc
import pytest
from lorikeet.protos.v1 import generation_pb2 as pb
from lorikeet.protos.v1.generation_pb2_grpc import GenerationServiceStub
from lorikeet.server.client import LorikeetClient, generate_request
from lorikeet.server.status import RemoteError

from ..conftest import TINY_ADAPTERS
from ..tiny import MAX_CONTEXT, TEXT
from .process import eventually, lorikeet

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture
def client(server):
    with LorikeetClient(server.address, timeout_s=60) as client:
        yield client


def test_ready_line_says_where_and_what(server):
    assert server.ready["device"] == "cpu"
    assert server.ready["dtype"] == "float32"
    assert float(server.ready["nf4"]) > 0
    assert server.ready["adapters"] == "4"
    assert server.ready["metrics"].endswith("/metrics")


def test_pasted_command_answers(server):
    assert f"--address {server.address} --adapter amber" in server.command
    arguments = server.command.partition(" generate ")[2].replace('"In the beginning"', "").split()
    result = subprocess.run(
        lorikeet("generate", *arguments, "In the beginning"), capture_output=True, timeout=60, check=True
    )
    assert len(result.stdout) > 1


def test_stream_and_unary_give_the_same_output(client):
    whole = client.generate(prompt=TEXT[0], adapter_id="amber", max_tokens=24, logprobs=2, **GREEDY)
    events = list(client.stream(prompt=TEXT[0], adapter_id="amber", max_tokens=24, logprobs=2, **GREEDY))
    assert events[0].started.adapter == whole.adapter
    assert events[0].started.prompt_tokens == whole.usage.prompt_tokens
    deltas = [event.delta for event in events[1:-1]]
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == list(whole.token_ids)
    assert len(whole.token_ids) == len(whole.logprobs) == whole.usage.generated_tokens == 24
    assert all(len(entry.top) == 2 for entry in whole.logprobs)
    assert events[-1].finished.finish_reason == whole.finish_reason == pb.FINISH_REASON_LENGTH
    assert whole.adapter.adapter_id == "amber"
    assert len(whole.adapter.version) == 64


def test_every_adapter_and_the_base_answer_differently(client):
    answers = {
        adapter: tuple(client.generate(prompt=TEXT[1], adapter_id=adapter, max_tokens=16, **GREEDY).token_ids)
        for adapter in ("", *TINY_ADAPTERS)
    }
    assert len(set(answers.values())) == len(answers)


def test_the_three_forms_of_a_prompt(client):
    prompted = client.generate(prompt=TEXT[0], max_tokens=4, **GREEDY)
    chatted = client.generate(messages=[("user", TEXT[0])], max_tokens=4, **GREEDY)
    assert chatted.usage.prompt_tokens > prompted.usage.prompt_tokens
    assert client.generate(token_ids=[5, 6, 7], max_tokens=4, **GREEDY).usage.prompt_tokens == 3


def test_seed_repeats_a_sampled_output(client):
    first, second, other = (
        client.generate(prompt=TEXT[0], max_tokens=16, seed=seed, ignore_eos=True).token_ids for seed in (1, 1, 2)
    )
    assert first == second != other


def test_repeated_prompt_is_found_in_the_prefix_cache(client):
    prompt = " ".join(TEXT)
    client.generate(prompt=prompt, adapter_id="birch", max_tokens=1)
    again = client.generate(prompt=prompt, adapter_id="birch", max_tokens=1)
    assert 0 < again.usage.cached_tokens < again.usage.prompt_tokens
    other = client.generate(prompt=prompt, adapter_id="dune", max_tokens=1)
    assert other.usage.cached_tokens == 0


def test_cancel_mid_stream_frees_blocks_and_slot(server, client):
    before = server.metric("lorikeet_requests_total", adapter="cedar", outcome="cancelled")
    stream = client.stream(prompt=TEXT[0], adapter_id="cedar", max_tokens=15_000, **GREEDY)
    for event in stream:
        if event.HasField("delta"):
            break
    eventually(lambda: server.metric("lorikeet_kv_blocks", state="used") > 0)  # published ten times a second
    assert client.get_adapter("cedar").in_flight_requests == 1
    stream.close()
    eventually(server.is_idle)
    eventually(lambda: client.get_adapter("cedar").in_flight_requests == 0)
    assert server.metric("lorikeet_requests_total", adapter="cedar", outcome="cancelled") == before + 1


def test_deadline_ends_the_request_and_frees_its_memory(server):
    def exceeded():
        return server.metric("lorikeet_requests_total", outcome="deadline_exceeded")

    before, calls = exceeded(), 0
    while exceeded() == before:  # again, where the time was over before the request arrived
        with LorikeetClient(server.address, timeout_s=0.15 * 2**calls) as client:
            with pytest.raises(RemoteError) as caught:
                client.generate(prompt=TEXT[0], max_tokens=15_000, **GREEDY)
        assert caught.value.code == "DEADLINE_EXCEEDED"
        calls += 1
        eventually(server.is_idle)
    assert exceeded() <= before + calls


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        ({"prompt": "x", "adapter_id": "nobody"}, "NOT_FOUND", "ADAPTER_NOT_FOUND"),
        ({"prompt": "x", "adapter_id": "../amber"}, "INVALID_ARGUMENT", "ADAPTER_ID_INVALID"),
        ({"prompt": "x " * 4 * MAX_CONTEXT}, "INVALID_ARGUMENT", "PROMPT_TOO_LONG"),
        ({"prompt": "x", "max_tokens": MAX_CONTEXT}, "INVALID_ARGUMENT", "PROMPT_TOO_LONG"),
        ({"prompt": "x", "token_ids": [1]}, "INVALID_ARGUMENT", "BAD_REQUEST"),
        ({"prompt": "x", "temperature": -1}, "INVALID_ARGUMENT", "BAD_REQUEST"),
        ({"prompt": "x", "stop": [""]}, "INVALID_ARGUMENT", "BAD_REQUEST"),
        ({"token_ids": [10**6]}, "INVALID_ARGUMENT", "BAD_REQUEST"),
        ({"messages": [("nobody", "x")]}, "INVALID_ARGUMENT", "BAD_REQUEST"),
        ({"prompt": ""}, "INVALID_ARGUMENT", "BAD_REQUEST"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_request_is_refused_and_the_server_serves_on(server, client, options, code, reason):
    before = server.metric("lorikeet_rpcs_total", code=code, reason=reason)
    for call in (client.generate, lambda **options: list(client.stream(**options))):
        with pytest.raises(RemoteError) as caught:
            call(**options)
        assert (caught.value.code, caught.value.reason) == (code, reason)
    assert client.generate(prompt="x", max_tokens=1).usage.generated_tokens == 1
    eventually(lambda: server.metric("lorikeet_rpcs_total", code=code, reason=reason) == before + 2)
    assert "nobody" not in server.scrape()


async def test_64_streams_over_4_adapters_get_their_sequential_answers(server):
    requests = [
        generate_request(
            prompt=f"{number}: {TEXT[number % len(TEXT)]}",
            adapter_id=TINY_ADAPTERS[number % 4],
            max_tokens=12,
            **GREEDY,
        )
        for number in range(64)
    ]
    batched = server.metric("lorikeet_step_requests_sum")
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = GenerationServiceStub(channel)

        async def answer(request):
            return [
                token
                async for message in stub.GenerateStream(request, timeout=120)
                for token in message.delta.token_ids
            ]

        alone = [await answer(request) for request in requests]
        together = await asyncio.gather(*map(answer, requests))
    assert together == alone
    assert all(len(tokens) == 12 for tokens in together)
    assert server.metric("lorikeet_step_requests_sum") > batched
    eventually(server.is_idle)


def test_log_has_one_line_a_request_and_no_prompt(server, client):
    client.generate(prompt="a secret prompt", max_tokens=3, request_id="log-1", ignore_eos=True)
    with pytest.raises(RemoteError):
        client.generate(prompt="a secret prompt", adapter_id="nobody", request_id="log-2")

    def entries():
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if str(line.get("request_id")).startswith("log-")]

    eventually(lambda: len(entries()) >= 2)
    first, second = entries()
    assert (first["event"], first["code"], first["output_tokens"]) == ("request", "OK", 3)
    assert first["ttft_s"] > 0
    assert (second["event"], second["reason"]) == ("request", "ADAPTER_NOT_FOUND")
    assert "secret" not in server.log.read_text()
    assert '"compute_dtype": "float32", "threads": 1' in server.log.read_text()
