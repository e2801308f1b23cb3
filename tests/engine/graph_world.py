"""Two runners over the same base and adapters, one eager and one that captures steps: both answer every step."""

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.layers import LoraLinear
from lorikeet.adapters.lora_batch import LoraBatch
from lorikeet.server.base.loader import load_base
from lorikeet.server.engine.graph_capture import CaptureBackend, CudaCapture
from lorikeet.server.engine.graph_sizes import GraphSizes
from lorikeet.server.engine.runner import Runner
from lorikeet.server.engine.scheduler import ScheduledRequest, ScheduledStep
from lorikeet.server.engine.step_graphs import start_shapes
from torch import Tensor

from ..adapters.hand_made import HandMade
from ..base.family_models import VOCAB, save_family
from ..devices import CPU
from .adapted_runner import Stream

BLOCK, MAX_ROWS, MAX_TOKENS, MAX_BLOCKS, MAX_SLOTS = 8, 12, 72, 6, 10
# (dtype fp32, tolerance) of logits: padding changes how matmuls are grouped, on CUDA also which kernel computes them.
CPU_TOLERANCE, CUDA_TOLERANCE = 1e-5, 1e-4


class Rerun:
    """Repeats a captured function by calling it again.

    Attributes:
        captures: so many functions were captured.
        error: what the next capture raises.
    """

    def __init__(self) -> None:
        self.captures = 0
        self.error: BaseException | None = None

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        if self.error is not None:
            raise self.error
        self.captures += 1
        return run


class GraphWorld:
    """See the module. Nothing is captured until `capture` is called."""

    def __init__(self, family: str, directory: Path, device: torch.device = CPU, seed: int = 0) -> None:
        save_family(family, directory, seed=seed)
        self.rng = random.Random(seed)
        self.now = 100.0
        self.base = load_base(str(directory), device=device, compute_dtype=torch.float32, progress=False)
        self.store = DeviceStore(self.base.site_table, torch.float32, device, 16 * 2**20, MAX_SLOTS)
        self.lora = LoraBatch(self.store, max_tokens=MAX_TOKENS, max_segments=MAX_ROWS)
        self.base.wrap_sites(lambda linear, site: LoraLinear(linear, site, self.lora))
        self.backend: CaptureBackend = CudaCapture(device) if device.type == "cuda" else Rerun()
        self.tolerance = CUDA_TOLERANCE if device.type == "cuda" else CPU_TOLERANCE
        self.compositions: dict[int, Sequence[tuple[int, float]]] = {}
        self.eager, self.graphed = (self._runner(capture) for capture in (None, self.backend))
        assert self.graphed._graphs is not None
        self.graphs = self.graphed._graphs
        sizes = GraphSizes(MAX_TOKENS, MAX_ROWS).all()
        self.num_at_start = sum(len(start_shapes(self.graphs._lora.full_shape, size)) for size in sizes)
        self.graphs._clock = lambda: self.now
        self._numbers = itertools.count()

    def _runner(self, capture: CaptureBackend | None) -> Runner:
        return Runner(
            self.base,
            self.lora,
            self.base.new_kv_cache(MAX_ROWS * MAX_BLOCKS, BLOCK),
            max_tokens=MAX_TOKENS,
            max_requests=MAX_ROWS,
            max_blocks=MAX_BLOCKS,
            expand=lambda slot: self.compositions[slot],
            capture=capture,
        )

    def install(
        self, rank: int, *kinds: str, affine: bool = False, change: Callable[[HandMade], object] | None = None
    ) -> int:
        """A random adapter of the linears of these kinds (none: all but the head); its slot."""
        sites = [s for s in self.base.site_table.sites if (s.kind in kinds if kinds else not s.is_head)]
        modules = [piece.module for site in sites for piece in site.slices]
        own = HandMade(self.base.site_table, next(self._numbers) + 1000, std=0.1)
        own.lora(rank, *modules)
        if affine:
            own.affine(*modules[::2])
        if change is not None:
            change(own)
        slot = self.store.install(own.pack())
        assert slot is not None
        return slot

    def compose(self, *members: tuple[int, float]) -> int:
        """A batch slot for several adapters, or for one with a weight."""
        slot = self.store.max_slots + len(self.compositions)
        self.compositions[slot] = members
        return slot

    def stream(self, place: int, slot: int, prompt: int) -> Stream:
        """A sequence of so many random tokens in the blocks of a place, 0 to MAX_ROWS - 1; nothing is computed."""
        tokens = [self.rng.randrange(VOCAB) for _ in range(prompt)]
        blocks = list(range(place * MAX_BLOCKS, (place + 1) * MAX_BLOCKS))
        self.rng.shuffle(blocks)
        return Stream(tokens, slot, (), blocks)

    def step(self, streams: Sequence[Stream], *num_tokens: int) -> tuple[Tensor, Tensor]:
        """Some tokens of each stream, by both runners: their logits, rows in the order of the slots.

        `num_tokens` are those of each, or one number for all (left out: 1).
        A stream samples where these are the last tokens that it has; it gets a token where it has none left.
        """
        items = []
        counts = num_tokens if len(num_tokens) > 1 else (num_tokens or (1,)) * len(streams)
        wanted = zip(streams, counts, strict=True)
        for stream, count in sorted(wanted, key=lambda pair: pair[0].slot):
            if stream.done == len(stream.tokens):
                stream.tokens.append(self.rng.randrange(VOCAB))
            start, stream.done = stream.done, stream.done + count
            assert stream.done <= len(stream.tokens)
            samples = stream.done == len(stream.tokens)
            items.append(ScheduledRequest(stream, start, count, samples))  # type: ignore[arg-type]
        step = ScheduledStep(items)
        return self.eager.forward(step).cpu(), self.graphed.forward(step).to(CPU, copy=True)

    def check(self, streams: Sequence[Stream], *num_tokens: int) -> bool:
        """Both runners agree on a step, and on what it wrote to the cache; whether it was replayed."""
        before = self.graphs.stats.num_replays
        want, got = self.step(streams, *num_tokens)
        torch.testing.assert_close(got, want, atol=self.tolerance, rtol=self.tolerance)
        for name in ("keys", "values"):
            caches = (getattr(runner._cache, name) for runner in (self.eager, self.graphed))
            for one, other in zip(*caches, strict=True):
                torch.testing.assert_close(other, one, atol=self.tolerance, rtol=self.tolerance)
        return self.graphs.stats.num_replays > before
