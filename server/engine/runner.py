"""Runs one scheduled step on the device: builds the flat batch, calls the model once, returns the logits to sample.

Owned by the step thread. Every tensor that describes a step is preallocated at its largest size and filled by one copy
from (pinned, on CUDA) host memory, so that nothing inside a step waits for the device, and a captured graph can replay
it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...adapters.layers import LoraBatch
from ...adapters.staging import StagedInts
from ..base.attention import KVCache, PagedStep
from ..base.model import BaseModel
from .scheduler import ScheduledRequest, ScheduledStep


class Runner:
    """The `ModelRunner` of the engine.

    Args:
        base: the loaded model, LoRA layers attached.
        lora: the metadata that the LoRA layers read.
        cache: paged KV.
        max_tokens: tokens a step at most (the scheduler's budget).
        max_requests: requests a step at most.
        max_blocks: blocks of the longest context.
    """

    def __init__(
        self, base: BaseModel, lora: LoraBatch, cache: KVCache, *, max_tokens: int, max_requests: int, max_blocks: int
    ) -> None:
        self._base = base
        self._lora = lora
        self._cache = cache
        device = base.device
        self._ids = StagedInts(max_tokens, torch.int64, device)
        self._positions = StagedInts(max_tokens, torch.int64, device)
        self._kv_slots = StagedInts(max_tokens, torch.int64, device)
        self._query_starts = StagedInts(max_requests + 1, torch.int32, device)
        self._context_lens = StagedInts(max_requests, torch.int32, device)
        self._tables = StagedInts(max_requests * max_blocks, torch.int32, device)
        self._rows = StagedInts(max_requests, torch.int64, device)

    @torch.inference_mode()
    def forward(self, step: ScheduledStep) -> Tensor:
        """Logits of every request of the step that samples, in step order: float32 [n, vocab]."""
        self._lora.prepare(_segments(step.requests))
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
        paged = PagedStep(
            cache=self._cache,
            kv_slots=self._kv_slots.fill(kv_slots),
            query_starts=self._query_starts.fill(starts),
            context_lens=self._context_lens.fill(contexts),
            block_tables=self._block_tables(step.requests, max(contexts)),
            max_query_len=max(item.num_tokens for item in step.requests),
            max_context_len=max(contexts),
        )
        return self._base.logits(
            self._ids.fill(ids).unsqueeze(0),
            self._positions.fill(positions).unsqueeze(0),
            # No request samples while all are in the middle of their prompts: one row is the least the head takes.
            rows=self._rows.fill(rows or [0]),
            paged=paged,
        )[: len(rows)]

    def _block_tables(self, requests: Sequence[ScheduledRequest], max_context: int) -> Tensor:
        """int32 [N, blocks of the longest context of this step]; unused entries are 0 and never read."""
        width = -(-max_context // self._cache.block_size)
        flat: list[int] = []
        for item in requests:
            table = item.request.block_table[:width]
            flat += table
            flat += [0] * (width - len(table))
        return self._tables.fill(flat).view(len(requests), width)


def _segments(requests: Sequence[ScheduledRequest]) -> list[tuple[int, int]]:
    """(slot, rows) of each run of equal slots, in row order."""
    segments: list[tuple[int, int]] = []
    for item in requests:
        slot = item.request.slot
        if segments and segments[-1][0] == slot:
            segments[-1] = (slot, segments[-1][1] + item.num_tokens)
        else:
            segments.append((slot, item.num_tokens))
    return segments
