"""LoRA shrink and expand for CPU: segments that are alike run as one batched matmul, the others one by one.

A decode step has many segments of few rows, where the calls cost more than the arithmetic. Everything is computed in
fp32 whatever the dtype of the model, which rounds once instead of twice: without AVX512-BF16 MKL's sgemm on converted
weights beats bf16 matmuls of any number of rows.

CPU microseconds of shrink and expand at rank 16 and evenly spaced blocks, against one matmul in the model's dtype for
each segment and slice (one thread of an AVX2 machine that others used too, torch 2.13, 2026-11-22; expect +-30 %):

    8 segments of 4 rows   576 -> 576 + 192 + 192   fp32 105, 238 against 165, 264   bf16 190, 195 against 313, 694
    8 segments of 4 rows   576 -> 1536 + 1536       fp32  92, 245 against 221, 253   bf16 186, 404 against 305, 1920
    8 segments of 4 rows   1536 -> 576              fp32 101, 121 against 151, 173   bf16 183, 194 against 391, 328
    32 segments of 1 row   576 -> 576 + 192 + 192   fp32 192, 389 against 682, 1683  bf16 333, 396 against 736, 1328
    1 segment of 512 rows  576 -> 576 + 192 + 192   fp32 466, 217 against 454, 218   bf16 422, 594 against 3028, 6669
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Longer segments fill a matmul of their own.
_MAX_BATCHED_LENGTH = 16
# Segments that are not beside each other are batched only from this number on: their rows must be gathered and put
# back, which costs about as much as two or three separate matmuls.
_MIN_SCATTERED_SEGMENTS = 4


class _Segment(NamedTuple):
    """Rows [start, end) of one slot, where its site block starts in the arena, in elements, and the factor of h."""

    start: int
    end: int
    offset: int
    ranks: tuple[int, ...]
    weight: float


class _Batch(NamedTuple):
    """Segments of equal length whose slots have the same ranks.

    Attributes:
        rows: the rows that they own, segment by segment: a slice where the segments are beside each other.
        length: rows of each segment.
        offsets: of the slots' site blocks, one a segment.
        ranks: of the slices.
        weights: factors of h, one a segment.
    """

    rows: slice | Tensor
    length: int
    offsets: list[int]
    ranks: tuple[int, ...]
    weights: list[float]

    def take(self, matrix: Tensor) -> Tensor:
        """Returns the batch's rows of `matrix` [num_tokens, width] as [num_segments, length, width]."""
        rows = matrix[self.rows] if isinstance(self.rows, slice) else matrix.index_select(0, self.rows)
        return rows.view(len(self.offsets), self.length, -1)


def lora_shrink(
    x: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    max_rank: int,
    seg_weights: Tensor | None = None,
) -> Tensor:
    """See `lora.lora_shrink`."""
    in_features = x.shape[1]
    h = torch.zeros(x.shape[0], max_rank)
    origin = arena.storage_offset()
    segments, batches = _plan(arena, offsets, ranks, seg_starts, seg_slots, seg_weights)
    for start, end, offset, slice_ranks, weight in segments:
        rank = sum(slice_ranks)
        lora_a_t = arena.as_strided((in_features, rank), (1, in_features), origin + offset)
        slice_h = h[start:end, :rank]
        torch.addmm(slice_h, x[start:end].float(), lora_a_t.float(), beta=0, alpha=weight, out=slice_h)
    for batch in batches:
        rank = sum(batch.ranks)
        lora_a = _gather(arena, batch.offsets, 0, rank * in_features).view(-1, rank, in_features)
        product = torch.bmm(batch.take(x).float(), lora_a.transpose(1, 2))
        if seg_weights is not None:
            product *= torch.tensor(batch.weights).view(-1, 1, 1)
        product = product.view(-1, rank)
        if isinstance(batch.rows, slice):
            h[batch.rows, :rank] = product
        else:
            h[:, :rank].index_copy_(0, batch.rows, product)
    return h


def lora_expand_(
    y: Tensor,
    h: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    slice_widths: Sequence[int],
    in_features: int,
) -> None:
    """See `lora.lora_expand_`."""
    origin = arena.storage_offset()
    segments, batches = _plan(arena, offsets, ranks, seg_starts, seg_slots)
    for start, end, offset, slice_ranks, _ in segments:
        position = origin + offset + sum(slice_ranks) * in_features
        column = first_rank = 0
        for rank, width in zip(slice_ranks, slice_widths, strict=True):
            if rank > 0:
                lora_b_t = arena.as_strided((rank, width), (width, 1), position)
                slice_h = h[start:end, first_rank : first_rank + rank]
                slice_y = y[start:end, column : column + width]
                if y.dtype == torch.float32:
                    slice_y.addmm_(slice_h, lora_b_t)
                else:
                    slice_y += torch.mm(slice_h, lora_b_t.float())
                position += rank * width
                first_rank += rank
            column += width
    for batch in batches:
        _expand_batch_(y, h, arena, batch, slice_widths, in_features)


def _expand_batch_(
    y: Tensor, h: Tensor, arena: Tensor, batch: _Batch, slice_widths: Sequence[int], in_features: int
) -> None:
    sizes = [rank * width for rank, width in zip(batch.ranks, slice_widths, strict=True)]
    lora_b_t = _gather(arena, batch.offsets, sum(batch.ranks) * in_features, sum(sizes))
    batch_h = batch.take(h)
    column = first_rank = position = 0
    for rank, width, size in zip(batch.ranks, slice_widths, sizes, strict=True):
        if rank > 0:
            slice_b_t = lora_b_t[:, position : position + size].view(-1, rank, width)
            delta = torch.bmm(batch_h[:, :, first_rank : first_rank + rank], slice_b_t).view(-1, width)
            slice_y = y[:, column : column + width]
            if isinstance(batch.rows, slice):
                slice_y[batch.rows] += delta
            else:
                delta += slice_y.index_select(0, batch.rows)
                slice_y.index_copy_(0, batch.rows, delta.to(y.dtype))
        column += width
        first_rank += rank
        position += size


def _plan(
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    seg_weights: Tensor | None = None,
) -> tuple[list[_Segment], list[_Batch]]:
    """Returns the adapted segments to run one by one, and those to run together."""
    slot_offsets, slot_ranks = offsets.numpy(), ranks.numpy()
    starts = seg_starts.tolist()
    weights = None if seg_weights is None else seg_weights.tolist()
    alone: list[_Segment] = []
    groups: dict[tuple[tuple[int, ...], int], list[_Segment]] = {}
    for g, slot in enumerate(seg_slots.tolist()):
        start, end = starts[g], starts[g + 1]
        if slot < 0 or start == end:
            continue
        weight = 1.0 if weights is None else weights[g]
        segment = _Segment(start, end, int(slot_offsets[slot]), tuple(slot_ranks[slot].tolist()), weight)
        if not any(segment.ranks):
            continue
        if end - start > _MAX_BATCHED_LENGTH:
            alone.append(segment)
        else:
            groups.setdefault((segment.ranks, end - start), []).append(segment)
    batches: list[_Batch] = []
    for group in groups.values():
        batch = _batch(group, arena.dtype)
        if batch is None:
            alone += group
        else:
            batches.append(batch)
    return alone, batches


def _batch(group: list[_Segment], dtype: torch.dtype) -> _Batch | None:
    """Returns the group as a batch, or None where that would not be faster."""
    if len(group) == 1:
        return None
    offsets = [segment.offset for segment in group]
    # fp32 weights that are not evenly spaced would have to be copied; others are copied anyway, to convert them.
    if dtype == torch.float32 and _spacing(offsets) is None:
        return None
    first, last = group[0], group[-1]
    weights = [segment.weight for segment in group]
    length = first.end - first.start
    if last.end == first.start + len(group) * length:  # segments do not overlap, so no other is in between
        return _Batch(slice(first.start, last.end), length, offsets, first.ranks, weights)
    if len(group) < _MIN_SCATTERED_SEGMENTS:
        return None
    rows = torch.tensor([row for segment in group for row in range(segment.start, segment.end)])
    return _Batch(rows, length, offsets, first.ranks, weights)


def _spacing(offsets: list[int]) -> int | None:
    """Returns the distance from each offset to the next where it is the same for all, and not negative."""
    step = offsets[1] - offsets[0]
    return step if step >= 0 and all(b - a == step for a, b in pairwise(offsets)) else None


def _gather(arena: Tensor, offsets: list[int], start: int, size: int) -> Tensor:
    """Returns [len(offsets), size] in fp32: row i = elements [offsets[i] + start, offsets[i] + start + size)."""
    step = _spacing(offsets)
    if step is not None:
        first = arena.storage_offset() + offsets[0] + start
        return arena.as_strided((len(offsets), size), (step, 1), first).float()
    # Row i of this view is arena[i : i + size], so that one call gathers blocks that start anywhere.
    windows = arena.as_strided((arena.shape[0] - size + 1, size), (1, 1))
    return windows.index_select(0, torch.tensor(offsets) + start).float()
