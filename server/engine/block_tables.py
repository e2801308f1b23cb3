"""The block tables of a step's requests on the device, kept from step to step: only what changed is uploaded.

A table of a long context is large, and a decode step adds a block to one request in sixteen. Row i belongs to the
step's i-th request; in a run of decode steps that is the same one.
"""

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...adapters.staging import StagedValues

# Entries that one upload changes at most; more take several.
_PATCH: Final = 8192


class HasBlocks(Protocol):
    """A request: its list only ever grows, and another list takes its place when it gets other blocks."""

    block_table: list[int]


class BlockTables:
    """See the module.

    Args:
        max_requests: of a step.
        max_blocks: of the longest context.
        device: where the tables are read.

    Attributes:
        host: int32 [max_requests, max_blocks], the same on the host.
    """

    def __init__(self, max_requests: int, max_blocks: int, device: torch.device) -> None:
        self.host: NDArray[np.int32] = np.zeros((max_requests, max_blocks), np.int32)
        self._flat_host = self.host.reshape(-1)
        self._tensor = torch.zeros((max_requests, max_blocks), dtype=torch.int32, device=device)
        self._max_blocks = max_blocks
        # Of each row the list that it holds, and how many of its entries.
        self._lists: list[list[int] | None] = [None] * max_requests
        self._lengths = [0] * max_requests
        self._where = StagedValues(_PATCH, torch.int64, device)
        self._values = StagedValues(_PATCH, torch.int32, device)

    def fill(self, requests: Sequence[HasBlocks]) -> None:
        """Make row i the table of request i."""
        changed: list[NDArray[np.int64]] = []
        for row, request in enumerate(requests):
            blocks = request.block_table
            known = self._lengths[row] if self._lists[row] is blocks else 0
            if known != len(blocks):
                self._lists[row], self._lengths[row] = blocks, len(blocks)
                self.host[row, known : len(blocks)] = blocks[known:]
                changed.append(np.arange(known, len(blocks)) + row * self._max_blocks)
        if not changed:
            return
        where = np.concatenate(changed)
        flat = self._tensor.view(-1)
        for start in range(0, len(where), _PATCH):
            part = where[start : start + _PATCH]
            flat.index_copy_(0, self._where.fill(part), self._values.fill(self._flat_host[part]))

    def rows(self, count: int) -> Tensor:
        """Of the first requests: [count, max_blocks], a view that stays where it is."""
        return self._tensor[:count]

    def narrow(self, count: int, width: int) -> Tensor:
        """The first blocks of the first requests: [count, width], contiguous, right for this step only."""
        return self._tensor[:count, :width].contiguous()
