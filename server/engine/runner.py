"""Runs one scheduled step on the device: builds the flat batch, calls the model once, returns the logits to sample.

Owned by the step thread. Every tensor that describes a step is preallocated at its largest size and filled by one copy
from (pinned, on CUDA) host memory, so that nothing inside a step waits for the device. Decode steps replay captured
graphs where there are any (`step_graphs.py`); everything else runs here, eagerly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...adapters.lora_batch import BASE_SLOT, Expand, LoraBatch
from ...adapters.row_overrides import RowOverrides
from ...adapters.staging import StagedValues
from ..base.attention import KVCache, PagedStep
from ..base.model import BaseModel
from .block_tables import BlockTables
from .graph_capture import CaptureBackend
from .scheduler import ScheduledRequest, ScheduledStep
from .stats import GraphStats
from .step_graphs import StepGraphs


class Runner:
    """The `ModelRunner` of the engine.

    Args:
        base: the loaded model, LoRA layers attached.
        lora: the metadata that the LoRA layers read.
        cache: paged KV.
        max_tokens: tokens a step at most (the scheduler's budget).
        max_requests: requests a step at most.
        max_blocks: blocks of the longest context.
        expand: members of the batch slots that stand for compositions.
        capture: captures decode steps as graphs; None: every step runs eagerly.
    """

    def __init__(
        self,
        base: BaseModel,
        lora: LoraBatch,
        cache: KVCache,
        *,
        max_tokens: int,
        max_requests: int,
        max_blocks: int,
        expand: Expand,
        capture: CaptureBackend | None = None,
    ) -> None:
        self._base = base
        self._lora = lora
        self._overrides = RowOverrides(base.model, base.module_table, lora)
        self._cache = cache
        self._expand = expand
        device = base.device
        self._ids = StagedValues(max_tokens, torch.int64, device)
        self._positions = StagedValues(max_tokens, torch.int64, device)
        self._kv_slots = StagedValues(max_tokens, torch.int64, device)
        self._query_starts = StagedValues(max_requests + 1, torch.int32, device)
        self._context_lens = StagedValues(max_requests, torch.int32, device)
        self._rows = StagedValues(max_requests, torch.int64, device)
        self._tables = BlockTables(max_requests, max_blocks, device)
        self._graphs: StepGraphs | None = None
        if capture is not None:
            self._graphs = StepGraphs(
                base,
                lora,
                cache,
                self._tables,
                capture,
                max_requests=max_requests,
                max_context=max_blocks * cache.block_size,
                expand=expand,
            )

    @property
    def graph_stats(self) -> GraphStats:
        """Of the captured steps; all zero without."""
        return GraphStats() if self._graphs is None else self._graphs.stats

    @torch.inference_mode()
    def capture_graphs(self, *, progress: bool = False) -> None:
        """Capture the graphs that most steps need; nothing happens without a backend. Before the first step.

        Args:
            progress: show a bar on stderr.
        """
        if self._graphs is not None:
            self._graphs.capture_at_start(progress=progress)

    @torch.inference_mode()
    def forward(self, step: ScheduledStep) -> Tensor:
        """Logits of every request of the step that samples, in step order: float32 [n, vocab].

        Where an adapter of these rows has another vocabulary, `vocab` is the largest; ids that a row lacks are -inf.
        They are right until the next step.
        """
        self._tables.fill([item.request for item in step.requests])
        logits = None if self._graphs is None else self._graphs.run(step)
        return self._run_eagerly(step) if logits is None else logits

    def _run_eagerly(self, step: ScheduledStep) -> Tensor:
        self._lora.prepare(*_segments(step.requests), self._expand)
        ids: list[int] = []
        positions: list[int] = []
        kv_slots: list[int] = []
        starts = [0]
        contexts: list[int] = []
        rows: list[int] = []
        size = self._cache.block_size
        for item in step.requests:
            request, stop = item.request, item.start + item.num_tokens
            ids += request.token_ids(item.start, stop)
            positions += range(item.start, stop)
            table = request.block_table
            kv_slots += [table[p // size] * size + p % size for p in range(item.start, stop)]
            starts.append(len(ids))
            contexts.append(stop)
            if item.samples:
                rows.append(len(ids) - 1)
        max_context = max(contexts)
        paged = PagedStep(
            cache=self._cache,
            kv_slots=self._kv_slots.fill(kv_slots),
            query_starts=self._query_starts.fill(starts),
            context_lens=self._context_lens.fill(contexts),
            block_tables=self._tables.narrow(len(contexts), -(-max_context // size)),
            max_query_len=max(item.num_tokens for item in step.requests),
            max_context_len=max_context,
        )
        logits = self._base.logits(
            self._ids.fill(ids).unsqueeze(0),
            self._positions.fill(positions).unsqueeze(0),
            # No request samples while all are in the middle of their prompts: one row is the least the head takes.
            rows=self._rows.fill(rows or [0]),
            paged=paged,
            overrides=self._overrides if self._overrides.active else None,
        )[: len(rows)]
        self._overrides.mask_(logits)
        return logits


def _segments(requests: Sequence[ScheduledRequest]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(batch slot, rows) of each request: in the flat batch, and of the rows that sample."""
    flat = [(item.request.slot, item.num_tokens) for item in requests]
    sampled = [(item.request.slot, 1) for item in requests if item.samples]
    # Without any, the head computes a row whose logits nobody takes.
    return flat, sampled or [(BASE_SLOT, 1)]
