"""Every metric of the server moves when what it counts happens, and labels stay bounded."""

import urllib.error
import urllib.request

import pytest
from lorikeet.adapters.info import AdapterInfo, AdapterState, AdapterStats, Tier
from lorikeet.adapters.scaling import Scaling
from lorikeet.server.engine.block_manager import BlockStats
from lorikeet.server.engine.stats import EngineState, EngineStats, GraphStats
from lorikeet.server.errors import ConfigError
from lorikeet.server.metrics import AdapterLabels, ServerMetrics
from lorikeet.server.metrics_server import MetricsServer
from lorikeet.server.metrics_state import StateCollector
from prometheus_client import CollectorRegistry, generate_latest


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    return ServerMetrics(registry, max_adapter_labels=2)


def adapter(adapter_id, tier, state=AdapterState.READY, **fields):
    return AdapterInfo(
        adapter_id=adapter_id, digest="d", state=state, tier=tier, bytes=10, max_rank=8,
        slices={"q_proj": Scaling(8, 2.0)}, in_flight=0, error=None, warning=None, loaded_at=0.0,
        source=adapter_id, method="LoRA", **fields,
    )  # fmt: skip


def stats(*adapters):
    sizes = {Tier.HOST: 0, Tier.DEVICE: 0}
    return AdapterStats(adapters=adapters, bytes_used=sizes, bytes_budget=sizes, wanted=0)


IDLE = EngineStats(
    state=EngineState.SERVING, running=0, waiting=0,
    blocks=BlockStats(total=0, used=0, cached=0, free=0, queried_tokens=0, hit_tokens=0),
)  # fmt: skip


@pytest.mark.parametrize(
    ("call", "arguments", "sample", "labels", "value"),
    [
        ("on_admitted", ("kjv", 0.25), "lorikeet_queue_wait_seconds_sum", {"adapter": "kjv"}, 0.25),
        ("on_first_token", ("kjv", 0.5), "lorikeet_time_to_first_token_seconds_sum", {"adapter": "kjv"}, 0.5),
        ("on_token", ("", 0.125), "lorikeet_inter_token_latency_seconds_sum", {"adapter": "base"}, 0.125),
        (
            "on_finished",
            ("kjv", "stop", 7, 3, 5, 1.5),
            "lorikeet_requests_total",
            {"adapter": "kjv", "outcome": "stop"},
            1,
        ),
        ("on_finished", ("kjv", "stop", 7, 3, 5, 1.5), "lorikeet_prompt_tokens_total", {"adapter": "kjv"}, 7),
        ("on_finished", ("kjv", "stop", 7, 3, 5, 1.5), "lorikeet_prefix_cached_tokens_total", {"adapter": "kjv"}, 3),
        ("on_finished", ("kjv", "stop", 7, 3, 5, 1.5), "lorikeet_generated_tokens_total", {"adapter": "kjv"}, 5),
        (
            "on_finished",
            ("kjv", "stop", 7, 3, 5, 1.5),
            "lorikeet_request_duration_seconds_sum",
            {"adapter": "kjv"},
            1.5,
        ),
        ("on_preempted", ("kjv",), "lorikeet_preemptions_total", {"adapter": "kjv"}, 1),
        ("on_step", (0.25, 40, 4, 3), "lorikeet_step_seconds_sum", {}, 0.25),
        ("on_step", (0.25, 40, 4, 3), "lorikeet_step_tokens_sum", {}, 40),
        ("on_step", (0.25, 40, 4, 3), "lorikeet_step_requests_sum", {}, 4),
        ("on_step", (0.25, 40, 4, 3), "lorikeet_step_adapters_sum", {}, 3),
        ("on_load", ("kjv", "ok", 0.5), "lorikeet_adapter_loads_total", {"outcome": "ok"}, 1),
        ("on_load", ("kjv", "ok", 0.5), "lorikeet_adapter_load_seconds_sum", {}, 0.5),
        ("on_load", ("kjv", "ok", 0.5), "vllm:lora_adapter_load_seconds_sum", {}, 0.5),
        ("on_load", ("x", "ADAPTER_INVALID", 0.5), "lorikeet_adapter_loads_total", {"outcome": "adapter_invalid"}, 1),
        ("on_evict", ("device",), "lorikeet_adapter_evictions_total", {"tier": "device"}, 1),
        (
            "on_call",
            ("Generate", "NOT_FOUND", "ADAPTER_NOT_FOUND"),
            "lorikeet_rpcs_total",
            {"method": "Generate", "code": "NOT_FOUND", "reason": "ADAPTER_NOT_FOUND"},
            1,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_observation_moves_its_metric(registry, metrics, call, arguments, sample, labels, value):
    assert registry.get_sample_value(sample, labels) in (None, 0)
    getattr(metrics, call)(*arguments)
    assert registry.get_sample_value(sample, labels) == value


def test_merges_are_counted_by_state_outcome_and_progress(registry, metrics):
    def value(name, **labels):
        return registry.get_sample_value(f"lorikeet_{name}", labels)

    assert [value("merges_pending", state=state) for state in ("queued", "running")] == [0, 0]
    metrics.on_merges(queued=2, running=1)
    metrics.on_merge_progress(0.25)
    assert [value("merges_pending", state=state) for state in ("queued", "running")] == [2, 1]
    assert value("merge_progress_ratio") == 0.25
    metrics.on_merge_ended("ok", 12.5)
    metrics.on_merge_ended("MERGE_DISK", 3.0)
    assert value("merge_progress_ratio") == 0
    assert [value("merges_total", outcome=outcome) for outcome in ("ok", "merge_disk")] == [1, 1]
    assert value("merge_seconds_sum") == 12.5


def test_adapters_beyond_the_cap_share_a_label(registry, metrics):
    for name in ("a", "b", "c", "d", "a", ""):
        metrics.on_preempted(name)
    counts = {
        label: registry.get_sample_value("lorikeet_preemptions_total", {"adapter": label})
        for label in ("a", "b", "c", "other", "base")
    }
    assert counts == {"a": 2, "b": 1, "c": None, "other": 2, "base": 1}


def test_adapters_named_like_our_labels_are_told_apart(registry, metrics):
    metrics.on_preempted("base")
    metrics.on_preempted("other")
    assert registry.get_sample_value("lorikeet_preemptions_total", {"adapter": "base"}) is None
    assert registry.get_sample_value("lorikeet_preemptions_total", {"adapter": "adapter/base"}) == 1
    assert registry.get_sample_value("lorikeet_preemptions_total", {"adapter": "adapter/other"}) == 1
    assert AdapterLabels(3)["composed"] == "adapter/composed"


def test_combinations_share_a_label_and_leave_adapters_theirs(registry, metrics):
    for number in range(50):
        metrics.on_finished(f"made-up-{number}+kjv", "stop", 2, 0, 1, 0.5)
    metrics.on_finished("kjv", "stop", 2, 0, 1, 0.5)
    labels = {"outcome": "stop"}
    assert registry.get_sample_value("lorikeet_requests_total", labels | {"adapter": "composed"}) == 50
    assert registry.get_sample_value("lorikeet_requests_total", labels | {"adapter": "kjv"}) == 1
    assert "made-up" not in generate_latest(registry).decode()


def test_failed_loads_make_no_label_of_a_client_s_id(registry, metrics):
    for number in range(50):
        metrics.on_load(f"made-up-{number}", "ADAPTER_NOT_FOUND", 0.01)
    assert "made-up" not in generate_latest(registry).decode()


def test_state_is_read_at_the_scrape(registry):
    engine = EngineStats(
        state=EngineState.SERVING,
        running=3,
        waiting=2,
        blocks=BlockStats(total=10, used=4, cached=1, free=5, queried_tokens=100, hit_tokens=60),
        running_by_adapter={"": 1, "kjv": 1, "devil": 1},
        waiting_by_adapter={"jargon": 2},
    )
    adapters = AdapterStats(
        adapters=(
            adapter("devil", Tier.DEVICE),
            adapter("jargon", Tier.HOST),
            adapter("kjv", Tier.DEVICE),
            adapter("kjv", Tier.DEVICE, AdapterState.DRAINING),
            adapter("old", Tier.DISK),
        ),
        bytes_used={Tier.HOST: 10, Tier.DEVICE: 30},
        bytes_budget={Tier.HOST: 100, Tier.DEVICE: 300},
        wanted=1,
    )
    graphs = GraphStats(num_graphs=38, num_replays=1000, failure="out of device memory")
    registry.register(StateCollector(lambda: engine, lambda: adapters, 16, lambda: graphs))
    value = registry.get_sample_value
    assert value("lorikeet_requests_running") == 3
    assert value("lorikeet_requests_waiting") == 2
    assert [value("lorikeet_kv_blocks", {"state": s}) for s in ("used", "cached", "free")] == [4, 1, 5]
    assert value("lorikeet_prefix_cache_queried_tokens_total") == 100
    assert value("lorikeet_prefix_cache_hit_tokens_total") == 60
    assert [value("lorikeet_adapters", {"tier": t}) for t in ("disk", "host", "device")] == [1, 1, 2]
    assert value("lorikeet_adapter_versions", {"state": "draining"}) == 1
    assert [value("lorikeet_adapter_resident_bytes", {"tier": t}) for t in ("host", "device")] == [10, 30]
    assert [value("lorikeet_adapter_budget_bytes", {"tier": t}) for t in ("host", "device")] == [100, 300]
    assert value("lorikeet_adapters_wanted") == 1
    assert value("lorikeet_cuda_graphs") == 38 and value("lorikeet_cuda_graphs_failed") == 1
    assert value("lorikeet_cuda_graph_replays_total") == 1000

    text = generate_latest(registry).decode()
    requests = 'vllm:lora_requests_info{max_lora="16",running_lora_adapters="devil,kjv",waiting_lora_adapters="jargon"}'
    assert requests in text
    loaded = {"pinned": "false", "rank": "8"}
    assert value("vllm:lora_adapter_loaded", {"adapter_name": "kjv", "level": "gpu", **loaded}) == 1
    assert value("vllm:lora_adapter_loaded", {"adapter_name": "jargon", "level": "cpu", **loaded}) == 1
    assert 'adapter_name="old"' not in text
    assert value("vllm:num_gpu_loaded_lora_adapters") == 2
    assert value("vllm:num_cpu_loaded_lora_adapters") == 1
    assert value("vllm:max_gpu_lora_adapters") == 16


def test_pinned_adapters_and_aliases_are_counted(registry):
    picture = stats(
        adapter("devil", Tier.DEVICE, pinned=Tier.DEVICE, aliases=("prod",)),
        adapter("jargon", Tier.DEVICE, pinned=Tier.HOST),
        adapter("kjv", Tier.HOST, pinned=Tier.HOST, aliases=("prod", "staging")),
        adapter("kjv", Tier.DISK, AdapterState.STORED, aliases=("old",)),
        adapter("late", Tier.DISK, AdapterState.LOADING, pinned=Tier.DEVICE),
    )
    registry.register(StateCollector(lambda: IDLE, lambda: picture, 16))
    value = registry.get_sample_value
    assert [value("lorikeet_adapters_pinned", {"tier": tier}) for tier in ("host", "device")] == [2, 2]
    assert value("lorikeet_adapter_aliases") == 3

    def loaded(name, level, pinned):
        labels = {"adapter_name": name, "level": level, "pinned": pinned, "rank": "8"}
        return value("vllm:lora_adapter_loaded", labels)

    # Gateways read it as "stays at this level": one that is kept in host memory may leave the device.
    assert loaded("devil", "gpu", "true") == loaded("jargon", "gpu", "false") == loaded("kjv", "cpu", "true") == 1
    assert loaded("jargon", "gpu", "true") is loaded("late", "gpu", "true") is None


def test_two_ready_versions_of_an_adapter_make_no_sample_twice(registry):
    """An alias keeps an older version ready; Prometheus refuses a whole scrape in which one sample comes twice."""
    picture = stats(adapter("kjv", Tier.DEVICE), adapter("kjv", Tier.DEVICE), adapter("kjv", Tier.HOST))
    registry.register(StateCollector(lambda: IDLE, lambda: picture, 16))
    text = generate_latest(registry).decode()
    samples = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) == len(set(samples))
    assert registry.get_sample_value("vllm:num_gpu_loaded_lora_adapters") == 2


@pytest.mark.parametrize("accept", ["*/*", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"])
def test_gateway_names_keep_their_colon_whatever_the_scraper_accepts(registry, metrics, accept):
    """prometheus-client 0.26 turns `vllm:...` into `vllm_...` when a scraper asks for OpenMetrics."""
    metrics.on_load("kjv", "ok", 0.5)
    server = MetricsServer("127.0.0.1", 0, registry)
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}/metrics", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = response.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/other", timeout=10)
    finally:
        server.close()
    assert "vllm:lora_adapter_load_seconds_count 1.0" in text
    assert "_created" not in text


def test_metrics_port_in_use_is_named_with_the_flag_that_changes_it(registry):
    server = MetricsServer("127.0.0.1", 0, registry)
    try:
        with pytest.raises(ConfigError, match=rf"/metrics cannot listen on 127\.0\.0\.1:{server.port}.*--metrics-port"):
            MetricsServer("127.0.0.1", server.port, registry)
    finally:
        server.close()
