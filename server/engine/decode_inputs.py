"""What a captured decode step reads beside adapters and block tables, in one block of memory and one upload.

One row a request, padded to the rows of the graph. Running example of 2 requests in a graph of 4 rows:

    ids           [17, 4, 0, 0]
    positions     [9, 30, 0, 0]
    kv_slots      [37, 46, -1, -1]   padding writes no key
    query_starts  [0, 1, 2, 2, 2]    padding belongs to no sequence
    context_lens  [10, 31, 0, 0]
"""

import numpy as np
import torch
from torch import Tensor

from ...adapters.staging import StagedValues
from ..base.attention import KVCache, PagedStep
from .block_tables import BlockTables
from .scheduler import ScheduledStep


class DecodeInputs:
    """Preallocated, at addresses that never change.

    Args:
        max_rows: of the largest graph.
        tables: of the step's requests.
        cache: paged KV.
        max_context: tokens of the longest context.
        device: where the step runs.
    """

    def __init__(
        self, max_rows: int, tables: BlockTables, cache: KVCache, max_context: int, device: torch.device
    ) -> None:
        self._tables = tables
        self._cache = cache
        self._max_context = max_context
        # Words of 64 bits: three fields of them, then context_lens and query_starts of 32 bits.
        num_words = 3 * max_rows + (2 * max_rows + 2) // 2
        self._staged = StagedValues(num_words, torch.int64, device)
        self._host = np.zeros(num_words, np.int64)
        self._ids, self._positions, self._kv_slots = self._host[: 3 * max_rows].reshape(3, max_rows)
        small = self._host[3 * max_rows :].view(np.int32)
        self._context_lens, self._query_starts = small[:max_rows], small[max_rows : 2 * max_rows + 1]
        words = self._staged.tensor
        self._device_ids, self._device_positions, self._device_kv_slots = words[: 3 * max_rows].view(3, max_rows)
        device_small = words[3 * max_rows :].view(torch.int32)
        self._device_context_lens = device_small[:max_rows]
        self._device_query_starts = device_small[max_rows : 2 * max_rows + 1]
        self._row_numbers = np.arange(max_rows + 1, dtype=np.int32)

    def fill(self, step: ScheduledStep) -> None:
        """Describe a step; every row of its block tables is filled already."""
        items = step.requests
        count = len(items)
        self._ids[:count] = [item.request.token_ids(item.start, item.start + 1)[0] for item in items]
        self._ids[count:] = 0
        self._positions[:count] = [item.start for item in items]
        self._positions[count:] = 0
        positions = self._positions[:count]
        size = self._cache.block_size
        blocks = self._tables.host[self._row_numbers[:count], positions // size]
        self._kv_slots[:count] = blocks.astype(np.int64) * size + positions % size
        self._kv_slots[count:] = -1
        self._context_lens[:count] = positions + 1
        self._context_lens[count:] = 0
        np.minimum(self._row_numbers, count, out=self._query_starts)
        self._staged.fill(self._host)

    def blank(self) -> None:
        """Describe a step that is all padding."""
        self.fill(ScheduledStep([]))

    def tensors(self, num_rows: int) -> tuple[Tensor, Tensor, PagedStep]:
        """Ids and positions [num_rows], and the paging, as a graph of so many rows reads them."""
        paged = PagedStep(
            cache=self._cache,
            kv_slots=self._device_kv_slots[:num_rows],
            query_starts=self._device_query_starts[: num_rows + 1],
            context_lens=self._device_context_lens[:num_rows],
            block_tables=self._tables.rows(num_rows),
            max_query_len=1,
            max_context_len=self._max_context,
        )
        return self._device_ids[:num_rows], self._device_positions[:num_rows], paged
