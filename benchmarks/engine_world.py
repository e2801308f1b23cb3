"""The engine around a model that costs nothing, with a clock on each part of a round.

Everything is what a server has: `Engine`, scheduler, blocks, runner, sampler, detokenizer, metrics, event bridge. The
model answers with logits that were prepared, and adapters are tables without weights, so what a round takes is what the
host does for it.
"""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from local_server import listen
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.composition import CompositionPort
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.lora_batch import LoraBatch
from lorikeet.adapters.modules import Module, ModuleKind, ModuleTable
from lorikeet.adapters.sites import Site, SiteTable, Slice
from lorikeet.adapters.version import AdapterVersion
from lorikeet.server.base.attention import KVCache
from lorikeet.server.engine.block_manager import BlockManager
from lorikeet.server.engine.detokenizer import DetokenizerFactory
from lorikeet.server.engine.engine import Engine
from lorikeet.server.engine.request import Request
from lorikeet.server.engine.runner import Runner
from lorikeet.server.engine.sampler import Sampler
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.engine.scheduler import Scheduler
from lorikeet.server.event_stream import EventBridge, EventStream
from lorikeet.server.metrics import ServerMetrics
from part_clock import PartClock, Timed
from prometheus_client import CollectorRegistry
from torch import Tensor, nn

CPU = torch.device("cpu")
BLOCK = 16
RANK = 16
LAYERS = 30
METRICS_LABELS = 100
PARTS = ("schedule", "inputs", "sampling", "metrics", "detokenize, deliver, loop")
GREEDY = SamplingParams(temperature=0.0, max_tokens=10**6, ignore_eos=True)


class CostlessBase:
    """Stands for `BaseModel`: the first rows of prepared logits answer every step."""

    def __init__(self, vocab_size: int, max_rows: int) -> None:
        self.device = CPU
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(1, 1)
        embedding = Module("embed_tokens", ModuleKind.EMBEDDING, {"weight": (vocab_size, 1)})
        self.module_table = ModuleTable(
            {embedding.path: embedding}, embedding.path, "lm_head", is_tied=False, vocab_size=vocab_size
        )
        self._logits = _prepared_logits(max_rows, vocab_size)

    def logits(self, ids: Tensor, positions: Tensor, *, rows: Tensor, **_: Any) -> Tensor:
        """[n, vocab_size]."""
        return self._logits[: len(rows)]


@functools.lru_cache(maxsize=2)
def _prepared_logits(rows: int, vocab_size: int) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(7))


class ResidentVersions:
    """Stands for the adapter manager: the first versions are on the device, all others never come."""

    def __init__(self, resident: Sequence[AdapterVersion]) -> None:
        self.on_ready: Callable[[], None] = lambda: None
        self._slots = {version: slot for slot, version in enumerate(resident)}

    def try_activate(self, version: AdapterVersion) -> int | None:
        """Its slot, if it has one."""
        return self._slots.get(version)

    def deactivate(self, version: AdapterVersion) -> None:
        """Nothing is counted."""

    def release(self, version: AdapterVersion) -> None:
        """Nor here."""

    def step_work(self) -> None:
        """There is none."""


class StillLoop:
    """Stands for the event loop: what it is asked to do waits until `run`, outside of the timed round."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        """As of asyncio's loops."""
        self._calls.append(call)

    def call_later(self, _: float, call: Callable[[], None]) -> None:
        """The same."""
        self._calls.append(call)

    def run(self) -> None:
        """Do it now."""
        calls, self._calls = self._calls, []
        for call in calls:
            call()


@dataclass(slots=True)
class Rounds:
    """Some timed rounds.

    Attributes:
        total_us: of each.
        parts_us: part -> mean over the rounds; empty where no clock was on the parts.
        requests, tokens: in a step, mean.
        preempted: requests, in all rounds.
    """

    total_us: list[float] = field(default_factory=list)
    parts_us: dict[str, float] = field(default_factory=dict)
    requests: float = 0.0
    tokens: float = 0.0
    preempted: int = 0


def versions(count: int) -> list[AdapterVersion]:
    """So many adapters that nobody ever saw."""
    return [AdapterVersion(f"adapter-{i:05d}", f"{i:064x}") for i in range(count)]


def bare_store(slots: int) -> DeviceStore:
    """Device tables as of plain adapters on all linears of the demo base; there are no weights."""
    widths = {"qkv_proj": 3, "o_proj": 1, "gate_up_proj": 2, "down_proj": 1}
    sites = []
    for layer, (kind, parts) in itertools.product(range(LAYERS), widths.items()):
        name = f"layers.{layer}.{kind}"
        sites.append(Site(len(sites), name, layer, 1, tuple(Slice(f"{name}.{i}", 1) for i in range(parts))))
    sites.append(Site(len(sites), "lm_head", -1, 1, (Slice("lm_head", 1),), is_head=True))
    store = DeviceStore(SiteTable(sites), torch.float32, CPU, 2**20, slots)
    store.rank_sums[:, :-1] = torch.tensor([RANK * len(site.slices) for site in sites[:-1]], dtype=torch.int32)
    return store


class EngineWorld:
    """An engine to step by hand.

    Args:
        tokenizer: of transformers.
        store: what the LoRA metadata of a step is made from.
        manager: the adapter manager, or what stands for it.
        max_running, step_tokens, num_blocks, max_context: as of a server.
        prefix_cache: whether blocks are shared.
    """

    def __init__(
        self,
        tokenizer: Any,
        store: DeviceStore,
        manager: Any,
        *,
        max_running: int,
        step_tokens: int,
        num_blocks: int,
        max_context: int,
        prefix_cache: bool = True,
    ) -> None:
        self.vocab_size = len(tokenizer)
        self.step_tokens = step_tokens
        port = CompositionPort(manager, store.max_slots)
        self.scheduler = Scheduler(
            BlockManager(num_blocks, BLOCK, prefix_cache=prefix_cache),
            port,
            max_running=max_running,
            token_budget=step_tokens,
            starvation_bound_s=10**9,  # what never comes in shall hold nobody back
            max_wait_s=10**9,
        )
        kv = KVCache(
            num_layers=0, num_kv_heads=1, head_dim=1, num_blocks=1, block_size=BLOCK, dtype=torch.float32, device=CPU
        )
        self._runner = Runner(
            CostlessBase(self.vocab_size, max_running),  # type: ignore[arg-type]
            LoraBatch(store, max_tokens=step_tokens, max_segments=max_running),
            kv,
            max_tokens=step_tokens,
            max_requests=max_running,
            max_blocks=-(-max_context // BLOCK),
            expand=port.expand,
        )
        self._sampler = Sampler([0])
        self._metrics = ServerMetrics(CollectorRegistry(), METRICS_LABELS)
        self._steps: list[tuple[int, int]] = []
        self._num_preempted = 0
        listen(self._metrics, "on_step", self._on_step)
        listen(self._metrics, "on_preempted", self._on_preempted)
        self._loop = StillLoop()
        self._bridge = EventBridge(self._loop)  # type: ignore[arg-type]
        self.engine = Engine(
            self._runner,
            self.scheduler,
            self._sampler,
            DetokenizerFactory(tokenizer),
            port,
            self._metrics,
            eos_token_ids=(0,),
            max_context=max_context,
            max_waiting=10**6,
        )
        self._numbers = itertools.count()
        heard = ("on_admitted", "on_first_token", "on_token", "on_step")
        self._clock = PartClock(
            [
                Timed(self.scheduler, "schedule", PARTS[0]),
                Timed(self.scheduler, "complete", PARTS[0]),
                Timed(self._runner, "forward", PARTS[1]),
                Timed(self._sampler, "sample", PARTS[2]),
                *(Timed(self._metrics, name, PARTS[3]) for name in heard),
            ]
        )

    def submit(self, prompt: list[int], version: AdapterVersion | None, params: SamplingParams = GREEDY) -> Request:
        """Hand in a request; None: of the base."""
        adaptation = None if version is None else Adaptation.single(version)
        emit = self._bridge.deliver_to(EventStream())
        request = Request(f"r{next(self._numbers)}", prompt, params, adaptation, emit)
        self.engine.submit(request)
        return request

    def settle(self) -> None:
        """Rounds until every running request decodes."""
        while True:
            self.engine.step()
            self._loop.run()
            running = self.scheduler.running
            if running and all(request.output_token_ids for request in running):
                return

    def rounds(self, count: int, *, in_parts: bool = False, before: Callable[[], None] = lambda: None) -> Rounds:
        """Time so many rounds.

        Args:
            count: of rounds.
            in_parts: put a clock on every part, which makes the rounds longer.
            before: called before each, outside of the timed part.
        """
        found = Rounds()
        self._steps.clear()
        self._num_preempted = 0
        with self._clock.running() if in_parts else nullcontext():
            for _ in range(count):
                before()
                begin = time.perf_counter_ns()
                self.engine.step()
                found.total_us.append((time.perf_counter_ns() - begin) / 1000)
                self._loop.run()
        if in_parts:
            spent = {part: self._clock.spent[part] / 1000 / count for part in PARTS[:-1]}
            found.parts_us = spent | {PARTS[-1]: max(0.0, sum(found.total_us) / count - sum(spent.values()))}
        steps = len(self._steps) or 1
        found.requests = sum(requests for requests, _ in self._steps) / steps
        found.tokens = sum(tokens for _, tokens in self._steps) / steps
        found.preempted = self._num_preempted
        return found

    def _on_step(self, seconds: float, num_tokens: int, num_requests: int, num_adapters: int) -> None:
        self._steps.append((num_requests, num_tokens))

    def _on_preempted(self, adapter: str) -> None:
        self._num_preempted += 1
