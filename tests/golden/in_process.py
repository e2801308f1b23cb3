"""A whole server but for gRPC, in this process: the parts exactly as `lorikeet serve` assembles them."""

import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lorikeet.adapters.composition import Wish
from lorikeet.server.app import App, assemble
from lorikeet.server.base.loader import load_base
from lorikeet.server.config import ServerConfig
from lorikeet.server.engine.request import Delta, Event, Failed, Finished, Request
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.policy.holder import PolicyHolder
from lorikeet.server.resolve import Compute

from ..devices import CPU


@contextmanager
def serving(
    model: Path,
    adapters: Path | None = None,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    base_cache: Path | None = None,
    **settings: Any,
) -> Iterator[App]:
    """Assemble and start; base_cache is load_base's, settings are those of `ServerConfig`."""
    roots = () if adapters is None else (adapters,)
    config = ServerConfig(
        model=str(model), adapters=roots, **({"kv_cache_bytes": "8MiB", "adapter_device_bytes": "16MiB"} | settings)
    )
    compute = Compute(device, dtype, 1)
    base = load_base(
        str(model), device=compute.device, compute_dtype=compute.dtype, cache_dir=base_cache, progress=False
    )
    app = assemble(config, compute, base, PolicyHolder(config.policy))
    app.manager.start()
    app.engine.start()
    try:
        yield app
    finally:
        app.engine.stop()
        app.manager.close()
        app.state.close()


@dataclass
class Answer:
    """What came back for one request."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: Finished | None = None
    failed: Failed | None = None


class Call:
    """One submitted request, of the base (""), of one adapter, or of several with their weights."""

    def __init__(
        self, app: App, name: str, adapter: str | Mapping[str, float], prompt: Sequence[int], params: SamplingParams
    ) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        members = {adapter: 1.0} if isinstance(adapter, str) else adapter
        wishes = [Wish(reference, weight, "adapters") for reference, weight in members.items() if reference]
        adaptation = app.composition.resolve(wishes) if wishes else None
        self.request = Request(name, list(prompt), params, adaptation, self._events.put)
        app.engine.submit(self.request)

    def result(self, timeout_s: float = 120.0) -> Answer:
        """Wait for the terminal event."""
        answer = Answer()
        while answer.finished is None and answer.failed is None:
            match self._events.get(timeout=timeout_s):
                case Delta(text=text, token_ids=token_ids):
                    answer.text += text
                    answer.token_ids += token_ids
                case Finished() as end:
                    answer.finished = end
                case Failed() as end:
                    answer.failed = end
        return answer


def greedy_params(max_tokens: int) -> SamplingParams:
    """Greedy, to the full length."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
