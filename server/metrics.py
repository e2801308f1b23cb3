"""What the engine and the adapter manager report, as Prometheus metrics. State read at a scrape: metrics_state.py.

Every name begins with `lorikeet_` and carries its base unit. Methods are called on the step thread and the adapter
threads, many times a step: labelled children are looked up once and kept.
"""

from functools import partial
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

BASE_LABEL = "base"
OTHER_LABEL = "other"
COMPOSED_LABEL = "composed"

# Waiting times: a cached prompt on a GPU answers in milliseconds, a long one on a CPU in a minute.
WAIT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
# One step, and so the time between tokens: 1 ms (GPU, small model) to 2.5 s (CPU, full prefill).
STEP_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
)  # seconds
# A whole request: up to the longest output on a CPU.
REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds
# Loading: a small adapter from the page cache to a large one from a network disk.
LOAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
# A merge: a small model as it is to a large one that is compared or calibrated, on idle time alone.
MERGE_BUCKETS = (5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 14400.0)  # seconds
TOKEN_BUCKETS = tuple(float(2**n) for n in range(0, 17, 2))  # 1 to 65536 tokens in a step
COUNT_BUCKETS = tuple(float(2**n) for n in range(0, 13))  # 1 to 4096 requests or adapters in a step

Metric = TypeVar("Metric", Counter, Histogram)


class AdapterLabels:
    """Label values of adapters: the first `limit` adapters that are used keep theirs, later ones share `other`.

    Only ids that the engine has accepted come here, so clients cannot make label values up. They can make combinations
    up: requests that several adapters answer together share `composed`, and so count once in every sum.

    Args:
        limit: how many adapters get a label value of their own.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._labels: dict[str, str] = {"": BASE_LABEL}

    def __getitem__(self, adapter_id: str) -> str:
        """The label value of an adapter; "" is the base."""
        label = self._labels.get(adapter_id)
        if label is None:
            if "+" in adapter_id:  # several, joined
                return COMPOSED_LABEL
            if len(self._labels) > self._limit:
                return OTHER_LABEL
            # An id has no slash: an adapter that is called `base` cannot be taken for what that means here.
            taken = (BASE_LABEL, OTHER_LABEL, COMPOSED_LABEL)
            label = f"adapter/{adapter_id}" if adapter_id in taken else adapter_id
            self._labels[adapter_id] = label
        return label


class _ByAdapter(Generic[Metric]):
    """A metric with label `adapter`, whose children are kept."""

    def __init__(self, metric: Metric, labels: AdapterLabels) -> None:
        self._metric: Metric = metric
        self._labels = labels
        self._children: dict[str, Metric] = {}

    def __getitem__(self, adapter_id: str) -> Metric:
        label = self._labels[adapter_id]
        child = self._children.get(label)
        if child is None:
            child = self._children[label] = self._metric.labels(label)
        return child


class ServerMetrics:
    """Implements EngineObserver, AdapterObserver, MergeObserver and the interceptor's `on_call`.

    Args:
        registry: where the metrics live; never the global one.
        max_adapter_labels: adapters with a label value of their own.
    """

    def __init__(self, registry: CollectorRegistry, max_adapter_labels: int) -> None:
        labels = AdapterLabels(max_adapter_labels)
        self._labels = labels
        counter = partial(Counter, registry=registry)
        histogram = partial(Histogram, registry=registry)

        def adapter_counter(name: str, text: str) -> _ByAdapter[Counter]:
            return _ByAdapter(counter(name, text, ["adapter"]), labels)

        def adapter_histogram(name: str, text: str, buckets: tuple[float, ...]) -> _ByAdapter[Histogram]:
            return _ByAdapter(histogram(name, text, ["adapter"], buckets=buckets), labels)

        self._calls = counter(
            "lorikeet_rpcs_total", "Calls ended, by method, status code and error reason.", ["method", "code", "reason"]
        )
        self._requests = counter(
            "lorikeet_requests_total", "Accepted requests ended, by adapter and outcome.", ["adapter", "outcome"]
        )
        self._queue_wait = adapter_histogram(
            "lorikeet_queue_wait_seconds", "From arrival to the first step of a request.", WAIT_BUCKETS
        )
        self._ttft = adapter_histogram(
            "lorikeet_time_to_first_token_seconds", "From arrival to the first token of a request.", WAIT_BUCKETS
        )
        self._itl = adapter_histogram(
            "lorikeet_inter_token_latency_seconds", "Between two tokens of a request.", STEP_BUCKETS
        )
        self._duration = adapter_histogram(
            "lorikeet_request_duration_seconds", "From arrival to the end of a request.", REQUEST_BUCKETS
        )
        self._prompt_tokens = adapter_counter("lorikeet_prompt_tokens_total", "Prompt tokens of ended requests.")
        self._cached_tokens = adapter_counter(
            "lorikeet_prefix_cached_tokens_total", "Prompt tokens of ended requests that the prefix cache had."
        )
        self._generated_tokens = adapter_counter(
            "lorikeet_generated_tokens_total", "Generated tokens of ended requests."
        )
        self._preemptions = adapter_counter(
            "lorikeet_preemptions_total", "Times a running request lost its KV blocks and had to be computed again."
        )
        self._step_seconds = histogram("lorikeet_step_seconds", "One step of the engine.", buckets=STEP_BUCKETS)
        self._step_tokens = histogram("lorikeet_step_tokens", "Tokens in a step.", buckets=TOKEN_BUCKETS)
        self._step_requests = histogram("lorikeet_step_requests", "Requests in a step.", buckets=COUNT_BUCKETS)
        self._step_adapters = histogram(
            "lorikeet_step_adapters", "Distinct adapters in a step.", buckets=(0.0, *COUNT_BUCKETS)
        )
        self._loads = counter(
            "lorikeet_adapter_loads_total", "Adapter loads, by outcome: ok or an error reason.", ["outcome"]
        )
        self._load_seconds = histogram(
            "lorikeet_adapter_load_seconds", "From disk to checked and packed in host memory.", buckets=LOAD_BUCKETS
        )
        # What gateways that know vLLM's adapter metrics look for (vLLM PR #54830).
        self._vllm_load_seconds = histogram(
            "vllm:lora_adapter_load_seconds", "Same as lorikeet_adapter_load_seconds.", buckets=LOAD_BUCKETS
        )
        self._evictions = counter("lorikeet_adapter_evictions_total", "Adapters evicted, by tier.", ["tier"])
        self._merges = Gauge(
            "lorikeet_merges_pending", "Merges that have not ended, by state.", ["state"], registry=registry
        )
        self.on_merges(queued=0, running=0)
        self._ended_merges = counter(
            "lorikeet_merges_total", "Merges ended, by outcome: ok or an error reason.", ["outcome"]
        )
        self._merge_seconds = histogram(
            "lorikeet_merge_seconds", "From the start of a merge to its model.", buckets=MERGE_BUCKETS
        )
        self._merge_progress = Gauge(
            "lorikeet_merge_progress_ratio",
            "How much of its stage the running merge has done, 0 to 1; 0 when none runs.",
            registry=registry,
        )

    def on_call(self, method: str, code: str, reason: str) -> None:
        """An RPC has ended."""
        self._calls.labels(method, code, reason).inc()

    def on_admitted(self, adapter: str, queue_wait_s: float) -> None:
        """A request is in its first step."""
        self._queue_wait[adapter].observe(queue_wait_s)

    def on_first_token(self, adapter: str, ttft_s: float) -> None:
        """A request has its first token."""
        self._ttft[adapter].observe(ttft_s)

    def on_token(self, adapter: str, itl_s: float) -> None:
        """A request has a later token."""
        self._itl[adapter].observe(itl_s)

    def on_finished(
        self, adapter: str, outcome: str, prompt_tokens: int, cached_tokens: int, output_tokens: int, e2e_s: float
    ) -> None:
        """A request has ended, well or not."""
        self._requests.labels(self._labels[adapter], outcome.lower()).inc()
        self._prompt_tokens[adapter].inc(prompt_tokens)
        self._cached_tokens[adapter].inc(cached_tokens)
        self._generated_tokens[adapter].inc(output_tokens)
        self._duration[adapter].observe(e2e_s)

    def on_step(self, seconds: float, num_tokens: int, num_requests: int, num_adapters: int) -> None:
        """The engine has made a step."""
        self._step_seconds.observe(seconds)
        self._step_tokens.observe(num_tokens)
        self._step_requests.observe(num_requests)
        self._step_adapters.observe(num_adapters)

    def on_preempted(self, adapter: str) -> None:
        """A running request went back to waiting."""
        self._preemptions[adapter].inc()

    def on_load(self, adapter_id: str, outcome: str, seconds: float) -> None:
        """An adapter load has ended. Ids of failed loads come from clients, so none becomes a label."""
        self._loads.labels(outcome.lower()).inc()
        if outcome == "ok":
            self._load_seconds.observe(seconds)
            self._vllm_load_seconds.observe(seconds)

    def on_evict(self, tier: str) -> None:
        """An adapter has left a tier to make room."""
        self._evictions.labels(tier).inc()

    def on_merges(self, queued: int, running: int) -> None:
        """So many merges wait and run now."""
        self._merges.labels("queued").set(queued)
        self._merges.labels("running").set(running)

    def on_merge_progress(self, share: float) -> None:
        """So much of its stage has the running merge done, 0 to 1."""
        self._merge_progress.set(share)

    def on_merge_ended(self, outcome: str, seconds: float) -> None:
        """A merge has ended: `ok` or an error's reason."""
        self._ended_merges.labels(outcome.lower()).inc()
        self._merge_progress.set(0)
        if outcome == "ok":
            self._merge_seconds.observe(seconds)
