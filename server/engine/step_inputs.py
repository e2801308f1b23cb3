"""What a step reads beside adapters and block tables: one block of memory, filled with NumPy, one upload.

Running example, blocks of 4: request a computes tokens 6 to 8 of its prompt (blocks 3, 7, 9), request b decodes its
token 30 (blocks 1, 2, 4, 5, 6, 8, 10, 11).

    ids           [.., .., .., 4]
    positions     [6, 7, 8, 30]
    kv_slots      [30, 31, 36, 46]
    query_starts  [0, 3, 4]
    context_lens  [9, 31]

A captured step is padded to the rows and requests of its graph. The example in a graph of 6 rows and 3 requests:
positions [6, 7, 8, 30, 0, 0], kv_slots [30, 31, 36, 46, -1, -1] (padding writes no key), query_starts [0, 3, 4, 4] (and
belongs to no sequence), context_lens [9, 31, 0], and rows [3, 0, 0]: b alone samples, and where nobody does the head
computes row 0.
"""

from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...adapters.staging import StagedValues
from .block_tables import BlockTables
from .scheduler import ScheduledStep

# Words of 64 bits: where every field of the block begins. Kernels are compiled for what they know of addresses.
_ALIGNMENT: Final = 8


class StepTensors(NamedTuple):
    """Views of the block on the device.

    Attributes:
        ids, positions, kv_slots: int64 [tokens].
        query_starts: int32 [requests + 1].
        context_lens: int32 [requests].
        rows: int64 [sampling requests], the rows that sample.
    """

    ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    rows: Tensor


class _Layout(NamedTuple):
    """The fields of the block for so many tokens and requests: where they are filled, and where they are read."""

    host: tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]
    device: StepTensors


class StepInputs:
    """Preallocated; what a layout of so many tokens and requests reads is always at the same place.

    Args:
        max_tokens: of a step.
        max_requests: of a step.
        tables: of the step's requests, which are filled before.
        block_size: of the KV cache.
        device: where the step runs.
    """

    def __init__(
        self, max_tokens: int, max_requests: int, tables: BlockTables, block_size: int, device: torch.device
    ) -> None:
        self._tables = tables
        self._block_size = block_size
        num_words = _num_words(max_tokens, max_requests)
        self._staged = StagedValues(num_words, torch.int64, device)
        self._host = np.zeros(num_words, np.int64)
        self._numbers = np.arange(max(max_tokens, max_requests + 1))
        self._layouts: dict[tuple[int, int], _Layout] = {}  # of steps of decodes, and of padded ones

    def fill(self, step: ScheduledStep, num_tokens: int | None = None, num_requests: int | None = None) -> int:
        """Describe a step.

        Args:
            step: every row of its block tables is filled already.
            num_tokens, num_requests: to which it is padded; None: to nothing.

        Returns:
            How many rows sample.
        """
        items = step.requests
        count = len(items)
        ids: list[int] = []
        for item in items:
            ids += item.request.token_ids(item.start, item.start + item.num_tokens)
        total = len(ids)
        is_kept = num_tokens is not None or total == count
        num_tokens = total if num_tokens is None else num_tokens
        num_requests = count if num_requests is None else num_requests
        layout = self._layout(num_tokens, num_requests, is_kept=is_kept)
        host_ids, positions, kv_slots, query_starts, context_lens, rows = layout.host
        host_ids[:total] = ids
        starts = np.array([item.start for item in items], np.int64)
        if total == count:  # one row each, nothing to repeat
            positions[:total] = starts
            query_starts[: count + 1] = self._numbers[: count + 1]
            self._fill_slots(kv_slots[:total], self._numbers[:total], starts)
            context_lens[:count] = starts + 1
        else:
            lengths = np.array([item.num_tokens for item in items], np.int64)
            query_starts[0] = 0
            np.cumsum(lengths, out=query_starts[1 : count + 1])
            np.add(np.repeat(starts - query_starts[:count], lengths), self._numbers[:total], out=positions[:total])
            self._fill_slots(kv_slots[:total], np.repeat(self._numbers[:count], lengths), positions[:total])
            context_lens[:count] = starts + lengths
        sampling = [number for number, item in enumerate(items) if item.samples]
        rows[: len(sampling)] = query_starts[1:][sampling] - 1
        rows[len(sampling) :] = 0
        if total < num_tokens or count < num_requests:
            host_ids[total:] = 0
            positions[total:] = 0
            kv_slots[total:] = -1
            query_starts[count + 1 :] = total
            context_lens[count:] = 0
        self._staged.fill(self._host[: _num_words(num_tokens, num_requests)])
        return len(sampling)

    def tensors(self, num_tokens: int, num_requests: int) -> StepTensors:
        """What a step padded to so many tokens and requests reads; all rows of requests are listed as sampling."""
        return self._layout(num_tokens, num_requests, is_kept=False).device

    def _layout(self, num_tokens: int, num_requests: int, *, is_kept: bool) -> _Layout:
        """Views that are needed again are kept: making them takes longer than filling them for a few requests."""
        layout = self._layouts.get((num_tokens, num_requests))
        if layout is None:
            layout = _Layout(
                _fields(self._host, np.int32, num_tokens, num_requests),
                StepTensors(*_fields(self._staged.tensor, torch.int32, num_tokens, num_requests)),
            )
            if is_kept:
                self._layouts[num_tokens, num_requests] = layout
        return layout

    def _fill_slots(
        self, kv_slots: NDArray[np.int64], requests: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> None:
        """Where the KV of each token goes; `requests`: which one it is of."""
        blocks, offsets = np.divmod(positions, self._block_size)
        np.multiply(self._tables.host[requests, blocks], self._block_size, out=kv_slots, dtype=np.int64)
        kv_slots += offsets


def _fields(words: Any, int32: Any, num_tokens: int, num_requests: int) -> tuple[Any, Any, Any, Any, Any, Any]:
    """The fields of a block, an array or a tensor of 64-bit words, as `StepTensors` has them."""
    long, short = _aligned(num_tokens), _aligned(num_requests)
    ids, positions, kv_slots = (words[field * long : field * long + num_tokens] for field in range(3))
    rows = words[3 * long : 3 * long + num_requests]
    small = words[3 * long + short :].view(int32)
    starts = 2 * _aligned(num_requests // 2 + 1)  # of 32 bits: room for num_requests + 1
    return ids, positions, kv_slots, small[: num_requests + 1], small[starts : starts + num_requests], rows


def _num_words(num_tokens: int, num_requests: int) -> int:
    return 3 * _aligned(num_tokens) + _aligned(num_requests) + 2 * _aligned(num_requests // 2 + 1)


def _aligned(num_words: int) -> int:
    return -(-num_words // _ALIGNMENT) * _ALIGNMENT
