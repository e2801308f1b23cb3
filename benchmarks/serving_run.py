"""What one run of a trace over gRPC says: by the client's clock, and by the server's metrics beside it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from server_process import Scrape
from serving_client import Seen


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count as good.

    Attributes:
        ttft_s: longest time to the first token; S-LoRA's is 6.
        itl_s: longest mean time between its tokens.
    """

    ttft_s: float
    itl_s: float


@dataclass(frozen=True, slots=True)
class ServingRun:
    """One run.

    Attributes:
        wall_s: from the first arrival to the last end.
        requests, output_tokens: that ended well, and what they brought.
        codes: status code -> requests, OK included.
        ttft_s: of each request that has a first token, from its arrival in the trace.
        itl_s: between two messages with tokens of a request.
        mean_itl_s: between two tokens, over all of them.
        good: requests within the SLO.
        late_s: of each request: sent after its arrival in the trace; the client's own fault.
        tokens_per_message: 1 unless the server joined tokens under load.
        distinct_adapters: that requests named.
        loads, evictions_device: adapters read from disk, and that left the device, meanwhile.
        server: the same by the server's metrics: see `from_metrics`.
    """

    wall_s: float
    requests: int
    output_tokens: int
    codes: dict[str, int]
    ttft_s: list[float]
    itl_s: list[float]
    mean_itl_s: float
    good: int
    late_s: list[float]
    tokens_per_message: float
    distinct_adapters: int
    loads: int
    evictions_device: int
    server: dict[str, float]

    @property
    def sent(self) -> int:
        """All requests, however they ended."""
        return sum(self.codes.values())

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of requests that ended well."""
        return self.output_tokens / self.wall_s

    @property
    def requests_per_s(self) -> float:
        """That ended well."""
        return self.requests / self.wall_s

    @property
    def good_per_s(self) -> float:
        """Goodput: requests a second within the SLO."""
        return self.good / self.wall_s

    @property
    def good_share(self) -> float:
        """Of all requests."""
        return self.good / self.sent

    def ttft(self, percent: float) -> float:
        """Percentile, in seconds; 0 if no request has a token."""
        return float(np.percentile(self.ttft_s, percent)) if self.ttft_s else 0.0

    def itl(self, percent: float) -> float:
        """Percentile, in seconds; 0 if no request has two messages."""
        return float(np.percentile(self.itl_s, percent)) if self.itl_s else 0.0


def evaluate(seen: Sequence[Seen], requests: Sequence[dict[str, Any]], metrics: Scrape, slo: Slo) -> ServingRun:
    """Sum a run up.

    Args:
        seen: by the client, of each of `requests`.
        requests: what was sent.
        metrics: what the server's counters gained meanwhile.
        slo: what counts as good.

    Raises:
        RuntimeError: client and server count differently.
    """
    well = [s for s in seen if s.code == "OK"]
    firsts = [s for s in seen if s.message_at]
    further = sum(sum(s.tokens) - 1 for s in firsts)
    run = ServingRun(
        wall_s=max(s.ended for s in seen) - min(s.due for s in seen),
        requests=len(well),
        output_tokens=sum(sum(s.tokens) for s in well),
        codes=dict(Counter(s.code for s in seen)),
        ttft_s=[s.message_at[0] - s.due for s in firsts],
        itl_s=[b - a for s in seen for a, b in zip(s.message_at, s.message_at[1:], strict=False)],
        mean_itl_s=sum(s.message_at[-1] - s.message_at[0] for s in firsts) / max(1, further),
        good=sum(_is_good(s, slo) for s in well),
        late_s=[s.sent - s.due for s in seen],
        tokens_per_message=sum(sum(s.tokens) for s in firsts) / max(1, sum(len(s.tokens) for s in firsts)),
        distinct_adapters=len({r["adapter_id"] for r in requests}),
        loads=round(metrics.sum("lorikeet_adapter_loads_total", outcome="ok")),
        evictions_device=round(metrics.sum("lorikeet_adapter_evictions_total", tier="device")),
        server=from_metrics(metrics),
    )
    check_counts(run, metrics)
    return run


def from_metrics(metrics: Scrape) -> dict[str, float]:
    """What the server's metrics say of a run: mean seconds, counts."""

    def mean(name: str) -> float:
        return metrics.sum(f"{name}_sum") / max(1.0, metrics.sum(f"{name}_count"))

    return {
        "mean_ttft_s": mean("lorikeet_time_to_first_token_seconds"),
        "mean_itl_s": mean("lorikeet_inter_token_latency_seconds"),
        "mean_queue_wait_s": mean("lorikeet_queue_wait_seconds"),
        "mean_step_s": mean("lorikeet_step_seconds"),
        "mean_step_requests": mean("lorikeet_step_requests"),
        "mean_step_adapters": mean("lorikeet_step_adapters"),
        "generated_tokens": metrics.sum("lorikeet_generated_tokens_total"),
    }


def check_counts(run: ServingRun, metrics: Scrape) -> None:
    """Both sides must have counted the same.

    Raises:
        RuntimeError: they did not.
    """
    of_server = {code: round(n) for code, n in metrics.by("lorikeet_rpcs_total", "code").items() if n}
    if of_server != run.codes:
        raise RuntimeError(f"the client saw calls end with {run.codes}, the server with {of_server}")
    # Of a request that failed, tokens may have been on their way.
    generated = round(run.server["generated_tokens"])
    if run.requests == run.sent and generated != run.output_tokens:
        raise RuntimeError(f"the client got {run.output_tokens} tokens, the server generated {generated}")


def _is_good(seen: Seen, slo: Slo) -> bool:
    further = sum(seen.tokens) - 1
    mean_itl_s = (seen.message_at[-1] - seen.message_at[0]) / further if further else 0.0
    return seen.message_at[0] - seen.due <= slo.ttft_s and mean_itl_s <= slo.itl_s
