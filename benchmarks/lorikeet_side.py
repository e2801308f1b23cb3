"""This project's side: the parts of `lorikeet serve` in this process, without gRPC."""

import queue
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.info import Tier
from lorikeet.server.app import App, assemble
from lorikeet.server.base.loader import load_base
from lorikeet.server.config import ServerConfig
from lorikeet.server.engine.request import Delta, Event, Failed, Finished, Request
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.logs import configure_logs
from lorikeet.server.policy.holder import PolicyHolder
from lorikeet.server.resolve import resolve_compute
from measurement import Run
from step_clock import StepClock

RUN_TIMEOUT_S = 900.0

Adapted = str | Mapping[str, float]
"""What adapts a stream: an adapter's id, "" for the base, or ids with their weights."""


class LorikeetSide:
    """A started engine with adapters loaded. Close it at the end.

    Args:
        base: the base model's directory.
        adapters: folder with one subfolder for each adapter.
        adapter_ids: the subfolders to load.
        settings: of the server; see `lorikeet serve --help`.
    """

    def __init__(self, base: Path, adapters: Path, adapter_ids: list[str], **settings: Any) -> None:
        config = ServerConfig(model=str(base), adapters=(adapters,), metrics=False, **settings)
        configure_logs("warning", "console")
        compute = resolve_compute(config)
        self.dtype: torch.dtype = compute.dtype
        model = load_base(str(base), device=compute.device, compute_dtype=compute.dtype, progress=False)
        self.nf4_bytes = model.nf4_bytes
        self._app: App = assemble(config, compute, model, PolicyHolder(None))
        self._clock = StepClock()
        # Beside what the metrics do with it.
        observe = self._app.metrics.on_step

        def on_step(*step: Any) -> None:
            self._clock.on_step(*step)
            observe(*step)

        self._app.metrics.on_step = on_step  # type: ignore[method-assign]
        self._app.manager.start()
        self._app.engine.start()
        self._runs = 0
        for name in adapter_ids:
            self._app.manager.load(name)

    def close(self) -> None:
        """Stop the engine and the adapter threads."""
        self._app.engine.stop()
        self._app.manager.close()
        self._app.state.close()

    def run(self, prompts: list[list[int]], adapted: Sequence[Adapted] | None, new_tokens: int) -> Run:
        """Generate greedily for all prompts at once.

        Args:
            prompts: token ids.
            adapted: what adapts each prompt; None asks the base.
            new_tokens: for each prompt.

        Raises:
            RuntimeError: a request did not end well.
        """
        self._runs += 1
        events: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in prompts]
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        for name in sorted({name for each in adapted or () for name in ([each] if isinstance(each, str) else each)}):
            if name:  # else the first requests may be done before the last one's adapter has come
                self._app.manager.prefetch(name, Tier.DEVICE)
        requests = []
        for i, (prompt, inbox) in enumerate(zip(prompts, events, strict=True)):
            adaptation = self._adaptation("" if adapted is None else adapted[i])
            requests.append(Request(f"run-{self._runs}-{i}", prompt, params, adaptation, inbox.put))
        self._clock.clear()
        start, cpu = time.perf_counter(), time.process_time()
        for request in requests:
            self._app.engine.submit(request)
        tokens = [_collect(inbox) for inbox in events]
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        return Run(
            wall_s=wall_s,
            cpu_s=cpu_s,
            output_tokens=sum(map(len, tokens)),
            steps_s=self._clock.full_decode_steps(len(prompts)),
            tokens=tokens,
        )

    def _adaptation(self, adapted: Adapted) -> Adaptation | None:
        weights = {adapted: 1.0} if isinstance(adapted, str) else adapted
        members = [(self._app.manager.resolve(name), weight) for name, weight in weights.items() if name]
        return Adaptation.of(members) if members else None


def _collect(events: queue.SimpleQueue[Event]) -> list[int]:
    tokens: list[int] = []
    while True:
        match events.get(timeout=RUN_TIMEOUT_S):
            case Delta(token_ids=token_ids):
                tokens += token_ids
            case Finished():
                return tokens
            case Failed(error=error):
                raise RuntimeError(f"a request failed: {error}")
