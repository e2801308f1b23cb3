"""Drives a base model over the paged cache by hand: any split of any sequences into steps."""

import random
from collections.abc import Sequence

import torch
from lorikeet.server.base.attention import PagedStep
from lorikeet.server.base.model import BaseModel
from torch import Tensor

BLOCK = 8


class PagedDriver:
    """Sequences with scattered blocks; `step` computes the next tokens of some of them."""

    def __init__(self, base: BaseModel, sequences: Sequence[Sequence[int]], seed: int = 0) -> None:
        self.base = base
        self.sequences = [list(s) for s in sequences]
        self.done = [0] * len(self.sequences)
        needed = [-(-len(s) // BLOCK) for s in self.sequences]
        blocks = list(range(sum(needed) + 3))
        random.Random(seed).shuffle(blocks)
        self.tables = [[blocks.pop() for _ in range(n)] for n in needed]
        self.cache = base.new_kv_cache(sum(needed) + 3, BLOCK)
        for tensor in [*self.cache.keys, *self.cache.values]:
            tensor.fill_(float("nan"))  # whatever is read without having been written shows

    @torch.inference_mode()
    def step(self, counts: Sequence[tuple[int, int]]) -> dict[int, Tensor]:
        """Run `n` more tokens of each (sequence, n); logits of those tokens: {sequence: [n, vocab]}."""
        ids, positions, slots, starts, contexts = [], [], [], [0], []
        for i, n in counts:
            span = range(self.done[i], self.done[i] + n)
            ids += [self.sequences[i][p] for p in span]
            positions += span
            slots += [self.tables[i][p // BLOCK] * BLOCK + p % BLOCK for p in span]
            starts.append(len(ids))
            contexts.append(span.stop)
            self.done[i] = span.stop
        width = max(len(self.tables[i]) for i, _ in counts)
        tables = [self.tables[i] + [0] * (width - len(self.tables[i])) for i, _ in counts]
        device = self.base.device
        paged = PagedStep(
            cache=self.cache,
            kv_slots=torch.tensor(slots, device=device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
            max_query_len=max(n for _, n in counts),
            max_context_len=max(contexts),
        )
        logits = self.base.logits(
            torch.tensor([ids], device=device), torch.tensor([positions], device=device), paged=paged
        )
        return {i: logits[starts[row] : starts[row + 1]] for row, (i, _) in enumerate(counts)}
