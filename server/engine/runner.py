"""Runs one scheduled step on the device: builds the flat batch, calls the model once, returns the logits to sample.

Owned by the step thread. Every tensor that describes a step is preallocated at its largest size and filled by one copy
from (pinned, on CUDA) host memory, so that nothing inside a step waits for the device. Steps replay captured graphs
where there are any (`step_graphs.py`); everything else runs here, eagerly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...adapters.lora_batch import BASE_SLOT, Expand, LoraBatch
from ...adapters.row_overrides import RowOverrides
from ..base.attention import KVCache, PagedStep
from ..base.model import BaseModel
from .block_tables import BlockTables
from .graph_capture import CaptureBackend
from .graph_sizes import GraphSizes
from .request import Request, TokenLogprob
from .scheduler import ScheduledRequest, ScheduledStep
from .scoring import Piece, Scorer, cut_step
from .stats import GraphStats
from .step_graphs import StepGraphs
from .step_inputs import StepInputs
from .upload import upload


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
        capture: captures steps as graphs; None: every step runs eagerly.

    Attributes:
        padded_sizes: tokens to which steps with tokens of prompts are padded, ascending; larger ones are not.
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
        self._scorer = Scorer()
        # Memory is planned for the logits of as many rows as may be sampled from, in the compute type and in float32.
        # While pieces are computed, those in float32 may all be there: what is left is enough for a quarter.
        self._piece_rows = max(1, max_requests // 4)
        device = base.device
        self._tables = BlockTables(max_requests, max_blocks, device)
        self._inputs = StepInputs(max_tokens, max_requests, self._tables, cache.block_size, device)
        self._graphs: StepGraphs | None = None
        self.padded_sizes: list[int] = []
        if capture is not None:
            sizes = GraphSizes(max_tokens, max_requests)
            self.padded_sizes = sizes.tokens
            self._graphs = StepGraphs(
                base,
                lora,
                cache,
                self._tables,
                capture,
                sizes=sizes,
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

    def scores(self) -> dict[Request, list[TokenLogprob] | None]:
        """Of the step that was just run: what its scored rows give; None where logits were not finite."""
        return self._scorer.take()

    def _run_eagerly(self, step: ScheduledStep) -> Tensor:
        self._lora.prepare(*_segments(step.requests), self._expand)
        num_rows = self._inputs.fill(step)
        given = self._inputs.tensors(step.num_tokens, len(step.requests))
        max_context = max(item.start + item.num_tokens for item in step.requests)
        paged = PagedStep(
            cache=self._cache,
            kv_slots=given.kv_slots,
            query_starts=given.query_starts,
            context_lens=given.context_lens,
            block_tables=self._tables.narrow(len(step.requests), -(-max_context // self._cache.block_size)),
            max_query_len=max(item.num_tokens for item in step.requests),
            max_context_len=max_context,
        )
        inputs = given.ids.unsqueeze(0), given.positions.unsqueeze(0)
        # No request samples while all are in the middle of their prompts: one row is the least the head takes.
        sampled = given.rows[: max(1, num_rows)]
        pieces = cut_step(step, self._piece_rows)
        if pieces:
            return self._score(step, inputs, sampled, pieces, paged)[:num_rows]
        overrides = self._overrides if self._overrides.active else None
        logits = self._base.logits(*inputs, rows=sampled, paged=paged, overrides=overrides)[:num_rows]
        self._overrides.mask_(logits)
        return logits

    def _score(
        self,
        step: ScheduledStep,
        inputs: tuple[Tensor, Tensor],
        sampled: Tensor,
        pieces: Sequence[Piece],
        paged: PagedStep,
    ) -> Tensor:
        """Run a prepared step that scores; the logits of the rows that are sampled from."""
        self._scorer.begin(pieces)
        rows = [sampled, *(upload(piece.rows, torch.int64, sampled.device) for piece in pieces)]
        overrides = self._overrides if self._overrides.active else None
        computed = self._base.logits_in_pieces(*inputs, rows, paged=paged, overrides=overrides)
        logits = next(computed)
        self._overrides.mask_(logits)
        flat, _ = _segments(step.requests)
        for piece in pieces:
            self._lora.prepare(flat, piece.segments, self._expand)  # the head's rows are others now
            scored = next(computed)
            self._overrides.mask_(scored)
            self._scorer.add(piece, scored)
        return logits


def _segments(requests: Sequence[ScheduledRequest]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(batch slot, rows) of each request: in the flat batch, and of the rows that sample."""
    flat = [(item.request.slot, item.num_tokens) for item in requests]
    sampled = [(item.request.slot, 1) for item in requests if item.samples]
    # Without any, the head computes a row whose logits nobody takes.
    return flat, sampled or [(BASE_SLOT, 1)]
