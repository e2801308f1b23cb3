"""Decode steps as captured graphs: what a step of thousands of launches costs the host is one launch.

A graph is captured for a number of rows (a bucket; smaller steps are padded) and a `LoraShape`. Which adapters, how
many of them, where they lie in the arena, their ranks below the shape's and the lengths of the contexts are in tensors
that the graph reads, so one that was captured without any adapter loaded replays right with any mix.

The base's shape and that of plain rank-16 adapters on all linears are captured before serving. A step that needs
another shape takes the cheapest graph that covers it, or runs eagerly; if its shape comes again and again, a graph of
its own is captured between two steps. Graphs are few: the one that was used longest ago makes place.

Steps that never run here: chunks of prompts, rows with several adapters, adapters with tensors of their own in place of
the base's, ranks above `RANK_BUCKETS`, more rows than the largest bucket.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

import structlog
import torch
from torch import Tensor
from tqdm import tqdm

from ...adapters.decode_lora import DecodeLora
from ...adapters.lora_batch import Expand, LoraBatch
from ...adapters.lora_shape import NO_LORA, RANK_BUCKETS, LoraShape
from ..base.attention import KVCache, PagedStep
from ..base.model import BaseModel
from .block_tables import BlockTables
from .device_memory import free_bytes
from .graph_capture import CaptureBackend
from .scheduler import ScheduledStep
from .stats import GraphStats
from .step_inputs import StepInputs

# Larger steps are the device's own work, not its launches.
MAX_GRAPH_ROWS: Final = 512
MAX_GRAPHS: Final = 128
# Steps of a shape before a graph is captured for it: where a graph covers it, which only costs idle launches, and where
# none does. A capture stops all requests for some tenths of a second, so there is never more than one a second.
_SIGHTINGS_COVERED: Final = 64
_SIGHTINGS: Final = 4
_CAPTURE_EVERY_S: Final = 1.0
_MAX_SHAPES_SEEN: Final = 1024

_log = structlog.stdlib.get_logger(__name__)


def bucket_sizes(max_requests: int) -> list[int]:
    """Rows of the graphs that are captured, ascending: close together where a step is short, never many."""
    largest = min(max_requests, MAX_GRAPH_ROWS)
    steps = chain((1, 2, 4), range(8, 128, 8), range(128, 256, 32), range(256, MAX_GRAPH_ROWS, 64))
    return [*(size for size in steps if size < largest), largest]


def start_shapes(full: LoraShape) -> list[LoraShape]:
    """What is captured before serving: no adapter, and the smallest rank on all linears of the layers."""
    return [NO_LORA, replace(full, rank=RANK_BUCKETS[0])]


@dataclass(frozen=True, slots=True)
class _Key:
    num_rows: int
    shape: LoraShape


class StepGraphs:
    """Captures and replays decode steps.

    Args:
        base: the loaded model, LoRA layers attached.
        lora: the metadata that the LoRA layers read.
        cache: paged KV.
        tables: of the step's requests, filled before `run`.
        backend: captures.
        max_requests: requests a step at most.
        max_context: tokens of the longest context.
        expand: members of the batch slots that stand for compositions.
        clock: seconds.
    """

    def __init__(
        self,
        base: BaseModel,
        lora: LoraBatch,
        cache: KVCache,
        tables: BlockTables,
        backend: CaptureBackend,
        *,
        max_requests: int,
        max_context: int,
        expand: Expand,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = GraphStats()
        self._base = base
        self._backend = backend
        self._expand = expand
        self._clock = clock
        self._sizes = bucket_sizes(max_requests)
        largest = self._sizes[-1]
        # Bucket of a step of n rows.
        self._size_of = [next(size for size in self._sizes if size >= rows) for rows in range(largest + 1)]
        self._lora = DecodeLora(lora, largest)
        self._cache = cache
        self._tables = tables
        self._max_context = max_context
        self._inputs = StepInputs(largest, largest, tables, cache.block_size, base.device)
        vocab = base.site_table.sites[-1].out_features
        self._logits = torch.empty((largest, vocab), dtype=torch.float32, device=base.device)
        self._replays: OrderedDict[_Key, Callable[[], None]] = OrderedDict()  # least recently used first
        self._seen: Counter[_Key] = Counter()
        self._captured_at = 0.0

    def capture_at_start(self, *, progress: bool) -> None:
        """Capture what most steps need; called once, before the first step.

        Args:
            progress: show a bar on stderr.
        """
        # The largest first: the memory of its intermediate results is enough for all others.
        keys = [_Key(rows, shape) for rows in reversed(self._sizes) for shape in start_shapes(self._lora.full_shape)]
        device = self._base.device
        torch.cuda.empty_cache()
        started, free = self._clock(), free_bytes(device)
        for key in tqdm(keys, desc="Capturing decode steps", unit="graph", disable=not progress):
            if not self._capture(key):
                break
        torch.cuda.empty_cache()  # what the runs before the captures used
        _log.info(
            "graphs_captured",
            graphs=len(self._replays),
            largest=self._sizes[-1],
            seconds=round(self._clock() - started, 2),
            device_bytes=free - free_bytes(device),
        )

    def run(self, step: ScheduledStep) -> Tensor | None:
        """Replay a step: float32 [n, vocab], the logits of its requests until the next step; None: run it eagerly."""
        items = step.requests
        if len(items) >= len(self._size_of) or not all(item.num_tokens == 1 and item.samples for item in items):
            return None
        runs = self._lora.runs([item.request.slot for item in items], self._expand)
        shape = runs.shape.rounded_up() if runs is not None else None
        if runs is None or shape is None:
            return None
        key = self._find(_Key(self._size_of[len(items)], shape))
        if key is None:
            return None
        self._inputs.fill(step, key.num_rows, key.num_rows)
        self._lora.stage(key.shape, runs, key.num_rows)
        self._replays[key]()
        self.stats.num_replays += 1
        return self._logits[: len(items)]

    def _find(self, wanted: _Key) -> _Key | None:
        """The graph to take for a step that needs `wanted`, captured now if that is due."""
        if wanted in self._replays:
            self._replays.move_to_end(wanted)
            return wanted
        covering = [key for key in self._replays if key.num_rows == wanted.num_rows and key.shape.covers(wanted.shape)]
        found = min(covering, key=lambda key: key.shape.cost, default=None)
        if self._is_due(wanted, is_covered=found is not None) and self._capture(wanted):
            return wanted
        if found is not None:
            self._replays.move_to_end(found)
        return found

    def _is_due(self, key: _Key, *, is_covered: bool) -> bool:
        if self.stats.failure:
            return False
        if len(self._seen) >= _MAX_SHAPES_SEEN:
            self._seen.clear()
        self._seen[key] += 1
        enough = _SIGHTINGS_COVERED if is_covered else _SIGHTINGS
        return self._seen[key] >= enough and self._clock() - self._captured_at >= _CAPTURE_EVERY_S

    def _capture(self, key: _Key) -> bool:
        """Capture a graph; False if that failed, and then no other will be tried."""
        started = self._clock()
        while len(self._replays) >= MAX_GRAPHS:
            self._replays.popitem(last=False)
        # A capture runs the step before it records it: of padding alone it writes to nobody's KV.
        self._inputs.fill(ScheduledStep([]), key.num_rows, key.num_rows)
        self._lora.blank(key.shape, key.num_rows)
        try:
            self._replays[key] = self._backend.capture(lambda: self._compute(key))
        except Exception as error:  # RuntimeErrors of CUDA and torch, out of memory among them; Triton has its own
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            self.stats.failure = "out of device memory" if out_of_memory else "capture failed"
            _log.warning(
                "graph_not_captured",
                reason=self.stats.failure,
                rows=key.num_rows,
                shape=key.shape,
                consequence=f"{len(self._replays)} graphs are kept, other steps run without",
                exc_info=error,
            )
        self._captured_at = self._clock()
        del self._seen[key]
        self.stats.num_graphs = len(self._replays)
        if not self.stats.failure:
            _log.debug("graph_captured", rows=key.num_rows, shape=key.shape, seconds=self._captured_at - started)
        return not self.stats.failure

    def _compute(self, key: _Key) -> None:
        """The step that is captured; everything here that is no tensor stays as it is now."""
        given = self._inputs.tensors(key.num_rows, key.num_rows)
        paged = PagedStep(
            cache=self._cache,
            kv_slots=given.kv_slots,
            query_starts=given.query_starts,
            context_lens=given.context_lens,
            block_tables=self._tables.rows(key.num_rows),
            max_query_len=1,
            max_context_len=self._max_context,
        )
        self._lora.assume(key.shape, key.num_rows)
        logits = self._base.logits(given.ids.unsqueeze(0), given.positions.unsqueeze(0), paged=paged)
        self._logits[: key.num_rows].copy_(logits)
