"""Every metric of a real server moves when what it counts is caused, and a real Prometheus can scrape them."""

import json
import shutil
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from lorikeet.server.client import LorikeetClient
from lorikeet.server.status import RemoteError

from ..conftest import TINY_ADAPTERS
from ..tiny import TEXT
from .process import eventually, running_server

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(server_arguments, tiny_adapters, tmp_path_factory):
    """So small that adapters evict each other and running requests are preempted.

    All four adapters take about 285 KiB, the KV cache has 40 blocks of 16 tokens.
    """
    arguments = [
        "--adapters", str(tiny_adapters), "--adapter-device-bytes", "160KiB", "--adapter-host-bytes", "200KiB",
        "--kv-cache-bytes", "640KiB", "--max-running", "8",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("small") / "log"
    with running_server(log, *server_arguments, *arguments) as server:
        yield server


@pytest.fixture
def client(server):
    with LorikeetClient(server.address, timeout_s=120) as client:
        yield client


@contextmanager
def asking(server, count, **options):
    """Ask this again and again, so many at a time, until the block ends; the answers, when it has ended."""
    done, answers = threading.Event(), []

    def ask(number):
        with LorikeetClient(server.address, timeout_s=120) as client:
            while not done.is_set():
                answers.append(client.generate(prompt=f"{number} {TEXT[1]}", **options, **GREEDY))

    with ThreadPoolExecutor(count) as pool:
        calls = [pool.submit(ask, number) for number in range(count)]
        try:
            yield answers
        finally:
            done.set()
    for call in calls:
        call.result()


def test_one_request_moves_the_metrics_of_a_request(server, client):
    prompt = " ".join(TEXT)
    client.generate(prompt=prompt, adapter_id="amber", max_tokens=1)
    moved = {
        ("lorikeet_requests_total", "length"): 1,
        ("lorikeet_queue_wait_seconds_count", ""): 1,
        ("lorikeet_time_to_first_token_seconds_count", ""): 1,
        ("lorikeet_inter_token_latency_seconds_count", ""): 7,
        ("lorikeet_request_duration_seconds_count", ""): 1,
        ("lorikeet_generated_tokens_total", ""): 8,
    }

    def read():
        return {key: server.metric(key[0], adapter="amber", **({"outcome": key[1]} if key[1] else {})) for key in moved}

    before, prompt_before = read(), server.metric("lorikeet_prompt_tokens_total", adapter="amber")
    hits_before = server.metric("lorikeet_prefix_cache_hit_tokens_total")
    response = client.generate(prompt=prompt, adapter_id="amber", max_tokens=8, **GREEDY)
    eventually(lambda: read() == {key: before[key] + moved[key] for key in moved})
    usage = response.usage
    assert server.metric("lorikeet_prompt_tokens_total", adapter="amber") == prompt_before + usage.prompt_tokens
    assert usage.cached_tokens > 0
    assert server.metric("lorikeet_prefix_cached_tokens_total", adapter="amber") >= usage.cached_tokens
    eventually(lambda: server.metric("lorikeet_prefix_cache_hit_tokens_total") == hits_before + usage.cached_tokens)
    assert server.metric("lorikeet_prefix_cache_queried_tokens_total") > 0
    assert server.metric("lorikeet_rpcs_total", method="Generate", code="OK") >= 2


def test_step_metrics_count_steps_with_their_tokens_requests_and_adapters(server, client):
    names = ("seconds_count", "seconds_sum", "tokens_sum", "requests_sum", "adapters_sum")
    before = {name: server.metric(f"lorikeet_step_{name}") for name in names}
    usage = client.generate(prompt=TEXT[0], adapter_id="amber", max_tokens=5, **GREEDY).usage

    def moved():
        return {name: server.metric(f"lorikeet_step_{name}") - before[name] for name in names}

    eventually(lambda: moved()["requests_sum"] == 5)
    assert moved()["seconds_count"] == moved()["adapters_sum"] == 5
    assert moved()["tokens_sum"] == usage.prompt_tokens - usage.cached_tokens + 4
    assert moved()["seconds_sum"] > 0


def test_running_waiting_and_kv_blocks_show_load_and_preemption_is_counted(server):
    preempted = server.metric("lorikeet_preemptions_total")
    with asking(server, 12, max_tokens=300) as answers:
        eventually(lambda: server.metric("lorikeet_requests_running") > 0)
        eventually(lambda: server.metric("lorikeet_requests_waiting") > 0)
        eventually(lambda: server.metric("lorikeet_kv_blocks", state="used") > 0)
        # Twelve requests of 20 blocks each in 40 blocks: some grow at the cost of others.
        eventually(lambda: server.metric("lorikeet_preemptions_total", adapter="base") > preempted)
    assert len(answers) >= 12 and {answer.usage.generated_tokens for answer in answers} == {300}
    eventually(server.is_idle)
    assert server.metric("lorikeet_kv_blocks") == 40


def test_adapters_by_tier_bytes_evictions_and_loads(server, client):
    evicted = server.metric("lorikeet_adapter_evictions_total", tier="device")
    for _ in range(2):
        for adapter in TINY_ADAPTERS:
            assert client.generate(prompt=TEXT[2], adapter_id=adapter, max_tokens=2, **GREEDY).adapter.adapter_id
    assert server.metric("lorikeet_adapter_evictions_total", tier="device") > evicted
    assert server.metric("lorikeet_adapter_evictions_total", tier="host") > 0
    assert server.metric("lorikeet_adapters") == 4
    assert 0 < server.metric("lorikeet_adapters", tier="device") < 4
    for tier, budget in (("device", 160 * 1024), ("host", 200 * 1024)):
        assert 0 < server.metric("lorikeet_adapter_resident_bytes", tier=tier) <= budget
        assert 0 < server.metric("lorikeet_adapter_budget_bytes", tier=tier) <= budget
    assert server.metric("lorikeet_adapter_loads_total", outcome="ok") >= 4
    assert server.metric("lorikeet_adapter_load_seconds_count") >= 4


def test_gateway_metrics_name_adapters_that_run_and_that_are_loaded(server):
    eventually(lambda: 'running_lora_adapters=""' in server.scrape())
    with asking(server, 1, adapter_id="cedar", max_tokens=500):
        labels = {"running_lora_adapters": "cedar", "max_lora": "1024"}
        eventually(lambda: server.metric("vllm:lora_requests_info", **labels) > 1e9)
    assert server.metric("vllm:lora_adapter_loaded", adapter_name="cedar", level="gpu", pinned="false", rank="8") == 1
    assert server.metric("vllm:num_gpu_loaded_lora_adapters") == server.metric("lorikeet_adapters", tier="device")
    assert server.metric("vllm:num_cpu_loaded_lora_adapters") == server.metric("lorikeet_adapters", tier="host")
    assert server.metric("vllm:max_gpu_lora_adapters") == 1024
    assert server.metric("vllm:lora_adapter_load_seconds_count") >= 4
    eventually(server.is_idle)


def test_unknown_adapters_make_no_series(server, client):
    client.generate(prompt="x", max_tokens=1)
    before = len(server.scrape().splitlines())
    for number in range(20):
        with pytest.raises(RemoteError):
            client.generate(prompt="x", adapter_id=f"made-up-{number}")
        with pytest.raises(RemoteError):
            client.load_adapter(f"made-up-{number}")
    assert "made-up" not in server.scrape()
    assert len(server.scrape().splitlines()) <= before + 12  # NOT_FOUND of two methods, and one load outcome


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no `prometheus` here (Debian's package prometheus)")
def test_prometheus_scrapes_and_answers_queries(server, client, tmp_path):
    client.generate(prompt="x", adapter_id="amber", max_tokens=1)
    target = server.ready["metrics"].removeprefix("http://").removesuffix("/metrics")
    config = tmp_path / "prometheus.yml"
    config.write_text(
        json.dumps(
            {
                "scrape_configs": [
                    {"job_name": "lorikeet", "scrape_interval": "1s", "static_configs": [{"targets": [target]}]}
                ]
            }
        )
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    prometheus = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "prometheus.log").open("wb"),
    )

    def query(expression):
        url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return [float(item["value"][1]) for item in json.load(response)["data"]["result"]]

    try:
        eventually(lambda: query('up{job="lorikeet"}') == [1.0])
        assert query('sum(lorikeet_requests_total{adapter="amber"})')[0] >= 1
        assert query('histogram_quantile(0.5, lorikeet_time_to_first_token_seconds_bucket{adapter="amber"})')
        assert query("vllm:num_gpu_loaded_lora_adapters")[0] >= 1
    finally:
        prometheus.terminate()
        prometheus.wait(30)
