"""Steps as captured graphs: what a step of hundreds of launches costs the host is one launch.

A graph is captured for a size (`graph_sizes.py`; smaller steps are padded) and a `LoraShape`. Which adapters, how many
of them, where they lie in the arena, their ranks below the shape's, the rows of each request, which of them sample and
the lengths of the contexts are in tensors that the graph reads. So one that was captured without any adapter loaded
replays right with any mix, and one of a step with tokens of prompts with any prompts: whole, their beginnings or ends,
behind a cached prefix, one or several.

Steps of decodes have graphs of their own: their attention is another kernel, and the head computes all rows. In the
others it computes as many as there may be requests, picked by a tensor of row numbers.

The base's shape and that of plain rank-16 adapters on all linears are captured before serving, in all sizes, and
decodes of one shared adapter apart where they are computed otherwise (`lora_nf4_triton`): by default 88 graphs. A step
that needs another shape takes the cheapest graph of its size that covers it, or runs eagerly; if its shape comes again
and again, a graph of its own is captured between two steps. Graphs are few: the one that was used longest ago makes
place.

Steps that never run here: those that score texts, rows with several adapters, adapters with tensors of their own in
place of the base's, ranks above `RANK_BUCKETS`, more rows or requests than the largest size.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import structlog
import torch
from torch import Tensor
from tqdm import tqdm

from ...adapters.captured_lora import CapturedLora
from ...adapters.lora_batch import Expand, LoraBatch
from ...adapters.lora_shape import NO_LORA, RANK_BUCKETS, LoraShape
from ...kernels.overlap import lora_runs_in_matmul
from ..base.attention import KVCache, PagedStep
from ..base.model import BaseModel
from .block_tables import BlockTables
from .device_memory import free_bytes
from .graph_capture import CaptureBackend
from .graph_sizes import GraphSize, GraphSizes
from .scheduler import ScheduledRequest, ScheduledStep
from .stats import GraphStats
from .step_inputs import StepInputs

MAX_GRAPHS: Final = 128
# Steps of a shape before a graph is captured for it: where a graph covers it, which only costs idle launches, and where
# none does. A capture stops all requests for some tenths of a second, so there is never more than one a second.
_SIGHTINGS_COVERED: Final = 64
_SIGHTINGS: Final = 4
_CAPTURE_EVERY_S: Final = 1.0
_MAX_SHAPES_SEEN: Final = 1024

_log = structlog.stdlib.get_logger(__name__)


def start_shapes(full: LoraShape, size: GraphSize) -> list[LoraShape]:
    """What is captured before serving: no adapter, one or any of the smallest rank on all linears of the layers."""
    plain = replace(full, rank=RANK_BUCKETS[0])
    alone = captured_shape(replace(plain, one_slot=True), size)
    return [NO_LORA, *dict.fromkeys((plain, alone))]


def captured_shape(shape: LoraShape, size: GraphSize) -> LoraShape:
    """Of the graph for a step of this shape: rows of one adapter are apart only where they are computed otherwise."""
    rows = size.requests
    differs = lora_runs_in_matmul(rows, one_adapter=True) and not lora_runs_in_matmul(rows, one_adapter=False)
    is_apart = shape.one_slot and size.is_decode and differs and not shape.affine
    return shape if is_apart == shape.one_slot else replace(shape, one_slot=is_apart)


@dataclass(frozen=True, slots=True)
class _Key:
    size: GraphSize
    shape: LoraShape


class StepGraphs:
    """Captures and replays steps.

    Args:
        base: the loaded model, LoRA layers attached.
        lora: the metadata that the LoRA layers read.
        cache: paged KV.
        tables: of the step's requests, filled before `run`.
        backend: captures.
        sizes: of the graphs.
        max_context: tokens of the longest context.
        expand: members of the batch slots that stand for compositions.
        clock: seconds.

    Attributes:
        stats: what there is, and how often it ran.
    """

    def __init__(
        self,
        base: BaseModel,
        lora: LoraBatch,
        cache: KVCache,
        tables: BlockTables,
        backend: CaptureBackend,
        *,
        sizes: GraphSizes,
        max_context: int,
        expand: Expand,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = GraphStats()
        self._base = base
        self._backend = backend
        self._expand = expand
        self._clock = clock
        self._sizes = sizes
        largest = sizes.decodes[-1]  # no other graph has more requests
        self._lora = CapturedLora(lora, largest)
        self._cache = cache
        self._tables = tables
        self._max_context = max_context
        tokens = max(sizes.tokens[-1], largest)
        self._inputs = StepInputs(tokens, largest, tables, cache.block_size, base.device)
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
        # Decodes first: too little memory for the others must not cost them. Of each kind the largest first: the memory
        # of its intermediate results is enough for the rest.
        sizes = sorted(reversed(self._sizes.all()), key=lambda size: not size.is_decode)
        keys = [_Key(size, shape) for size in sizes for shape in start_shapes(self._lora.full_shape, size)]
        device = self._base.device
        torch.cuda.empty_cache()
        started, free = self._clock(), free_bytes(device)
        for key in tqdm(keys, desc="Capturing steps", unit="graph", disable=not progress):
            if not self._capture(key):
                break
        torch.cuda.empty_cache()  # what the runs before the captures used
        _log.info(
            "graphs_captured",
            graphs=len(self._replays),
            largest=max(size.tokens for size in sizes),
            seconds=round(self._clock() - started, 2),
            device_bytes=free - free_bytes(device),
        )

    def run(self, step: ScheduledStep) -> Tensor | None:
        """Replay a step: float32 [n, vocab], the logits of its requests until the next step; None: run it eagerly."""
        size = self._size_of(step.requests)
        if size is None:
            return None
        items = step.requests
        runs = self._lora.runs([item.request.slot for item in items], [item.num_tokens for item in items], self._expand)
        shape = runs.shape.rounded_up() if runs is not None else None
        if runs is None or shape is None:
            return None
        key = self._find(_Key(size, captured_shape(shape, size)))
        if key is None:
            return None
        sampled = None
        if not size.is_decode and self._lora.adapts_head(key.shape):
            slots = [item.request.slot for item in items if item.samples]
            sampled = self._lora.runs(slots, [1] * len(slots), self._expand)
        num_sampled = self._inputs.fill(step, *size)
        self._lora.stage(key.shape, size.requests, runs, sampled)
        self._replays[key]()
        self.stats.num_replays += 1
        return self._logits[:num_sampled]

    def _size_of(self, items: Sequence[ScheduledRequest]) -> GraphSize | None:
        if all(item.num_tokens == 1 and item.samples for item in items):
            return self._sizes.of_decodes(len(items))
        if any(item.num_scored for item in items):
            return None
        return self._sizes.of_mixed(sum(item.num_tokens for item in items), len(items))

    def _find(self, wanted: _Key) -> _Key | None:
        """The graph to take for a step that needs `wanted`, captured now if that is due."""
        if wanted in self._replays:
            self._replays.move_to_end(wanted)
            return wanted
        covering = [key for key in self._replays if key.size == wanted.size and key.shape.covers(wanted.shape)]
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
        self._inputs.fill(ScheduledStep([]), *key.size)
        self._lora.blank(key.shape, key.size.requests)
        try:
            self._replays[key] = self._backend.capture(lambda: self._compute(key))
        except Exception as error:  # RuntimeErrors of CUDA and torch, out of memory among them; Triton has its own
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            self.stats.failure = "out of device memory" if out_of_memory else "capture failed"
            _log.warning(
                "graph_not_captured",
                reason=self.stats.failure,
                tokens=key.size.tokens,
                requests=key.size.requests,
                shape=key.shape,
                consequence=f"{len(self._replays)} graphs are kept, other steps run without",
                exc_info=error,
            )
        self._captured_at = self._clock()
        del self._seen[key]
        self.stats.num_graphs = len(self._replays)
        if not self.stats.failure:
            _log.debug("graph_captured", size=key.size, shape=key.shape, seconds=self._captured_at - started)
        return not self.stats.failure

    def _compute(self, key: _Key) -> None:
        """The step that is captured; everything here that is no tensor stays as it is now."""
        tokens, requests = size = key.size
        given = self._inputs.tensors(tokens, requests)
        paged = PagedStep(
            cache=self._cache,
            kv_slots=given.kv_slots,
            query_starts=given.query_starts,
            context_lens=given.context_lens,
            block_tables=self._tables.rows(requests),
            max_query_len=1 if size.is_decode else tokens,
            max_context_len=self._max_context,
        )
        self._lora.assume(key.shape, requests, samples_all=size.is_decode)
        rows = None if size.is_decode else given.rows
        logits = self._base.logits(given.ids.unsqueeze(0), given.positions.unsqueeze(0), rows=rows, paged=paged)
        self._logits[:requests].copy_(logits)
