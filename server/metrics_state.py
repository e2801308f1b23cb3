"""Metrics that are read at a scrape instead of being counted: what runs, waits and lies in memory right now.

Also what LoRA-aware gateways look for under vLLM's names, so that they route to this server: the older
`vllm:lora_requests_info` (Gateway API Inference Extension, model server protocol) and the newer
`vllm:lora_adapter_loaded` family (vLLM PR #54830, llm-d-router PR #2792). Adapter names in them are not capped: only
what is loaded or running is listed, and the byte budgets bound that. Runs on the threads of the metrics server.
"""

import time
from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .. import __version__
from ..adapters.info import AdapterState, AdapterStats, Tier
from .engine.stats import EngineStats, GraphStats

_VLLM_LEVELS = {Tier.DEVICE: "gpu", Tier.HOST: "cpu"}


class StateCollector(Collector):
    """Reads engine and adapter manager at each scrape.

    Args:
        engine: the engine's `stats`.
        adapters: the adapter manager's `snapshot`.
        max_slots: most adapters on the device at a time.
        graphs: the runner's `graph_stats`.
    """

    def __init__(
        self,
        engine: Callable[[], EngineStats],
        adapters: Callable[[], AdapterStats],
        max_slots: int,
        graphs: Callable[[], GraphStats] = GraphStats,
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._max_slots = max_slots
        self._graphs = graphs

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read an engine that has not started."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All families, from one picture of each."""
        engine, adapters = self._engine(), self._adapters()
        build = GaugeMetricFamily("lorikeet_build_info", "Always 1; the label has the version.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        yield from _engine_families(engine)
        yield from _graph_families(self._graphs())
        yield from _adapter_families(adapters)
        yield from self._vllm_families(engine, adapters)

    def _vllm_families(self, engine: EngineStats, adapters: AdapterStats) -> Iterable[Metric]:
        requests = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests, each by itself; the value is the Unix time of the scrape.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        running, waiting = (
            ",".join(sorted(name for name in by_adapter if name))
            for by_adapter in (engine.running_by_adapter, engine.waiting_by_adapter)
        )
        requests.add_metric([str(self._max_slots), running, waiting], time.time())
        yield requests

        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "Always 1, for every adapter that requests can use without reading a disk; pinned: it is kept there.",
            labels=["adapter_name", "level", "pinned", "rank"],
        )
        counts = dict.fromkeys(_VLLM_LEVELS.values(), 0)
        # Several versions of one adapter can be ready (aliases); one that looks the same here may be listed only once.
        seen: set[tuple[str, ...]] = set()
        for info in adapters.adapters:
            level = _VLLM_LEVELS.get(info.tier)
            if info.state is AdapterState.READY and level is not None:
                counts[level] += 1
                kept = info.pinned in (Tier.DEVICE, info.tier)
                labels = (info.adapter_id, level, str(kept).lower(), str(info.max_rank))
                if labels not in seen:
                    seen.add(labels)
                    loaded.add_metric(labels, 1)
        yield loaded
        yield GaugeMetricFamily("vllm:num_gpu_loaded_lora_adapters", "Adapters on the device.", counts["gpu"])
        yield GaugeMetricFamily("vllm:num_cpu_loaded_lora_adapters", "Adapters in host memory only.", counts["cpu"])
        yield GaugeMetricFamily("vllm:max_gpu_lora_adapters", "Most adapters on the device.", self._max_slots)


def _engine_families(stats: EngineStats) -> Iterable[Metric]:
    yield GaugeMetricFamily("lorikeet_requests_running", "Requests that have KV blocks.", stats.running)
    yield GaugeMetricFamily("lorikeet_requests_waiting", "Requests that wait for their turn.", stats.waiting)
    blocks = GaugeMetricFamily(
        "lorikeet_kv_blocks",
        "KV blocks by state: used by requests, cached prefixes that can be taken back, free.",
        labels=["state"],
    )
    for state in ("used", "cached", "free"):
        blocks.add_metric([state], getattr(stats.blocks, state))
    yield blocks
    yield CounterMetricFamily(
        "lorikeet_prefix_cache_queried_tokens",
        "Prompt tokens looked up in the prefix cache.",
        stats.blocks.queried_tokens,
    )
    yield CounterMetricFamily(
        "lorikeet_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.", stats.blocks.hit_tokens
    )


def _graph_families(stats: GraphStats) -> Iterable[Metric]:
    yield GaugeMetricFamily("lorikeet_cuda_graphs", "Captured steps.", stats.num_graphs)
    yield GaugeMetricFamily(
        "lorikeet_cuda_graphs_failed",
        "1: a capture failed (the log says why), and no further one is tried; steps without a graph run eagerly.",
        int(bool(stats.failure)),
    )
    yield CounterMetricFamily("lorikeet_cuda_graph_replays", "Steps that ran as a captured graph.", stats.num_replays)


def _adapter_families(stats: AdapterStats) -> Iterable[Metric]:
    tiers = GaugeMetricFamily("lorikeet_adapters", "Adapters that requests can use, by fastest tier.", labels=["tier"])
    for tier, names in stats.names_by_tier().items():
        tiers.add_metric([tier.value], len(names))
    yield tiers
    pinned = GaugeMetricFamily("lorikeet_adapters_pinned", "Adapters that are kept in a tier.", labels=["tier"])
    for tier in (Tier.HOST, Tier.DEVICE):
        pinned.add_metric([tier.value], len({info.adapter_id for info in stats.adapters if info.pinned is tier}))
    yield pinned
    aliases = {alias for info in stats.adapters for alias in info.aliases}
    yield GaugeMetricFamily("lorikeet_adapter_aliases", "Aliases that lead to adapters.", len(aliases))
    states = GaugeMetricFamily("lorikeet_adapter_versions", "Adapter versions by state.", labels=["state"])
    for state in AdapterState:
        states.add_metric([state.value], sum(info.state is state for info in stats.adapters))
    yield states
    resident = GaugeMetricFamily(
        "lorikeet_adapter_resident_bytes", "Memory that adapters take, by tier.", labels=["tier"]
    )
    for tier, size in stats.bytes_used.items():
        resident.add_metric([tier.value], size)
    yield resident
    budget = GaugeMetricFamily(
        "lorikeet_adapter_budget_bytes", "Memory that adapters may take, by tier.", labels=["tier"]
    )
    for tier, size in stats.bytes_budget.items():
        budget.add_metric([tier.value], size)
    yield budget
    yield GaugeMetricFamily(
        "lorikeet_adapters_wanted", "Adapter versions that requests wait for to come onto the device.", stats.wanted
    )
