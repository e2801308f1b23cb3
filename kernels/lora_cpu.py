"""LoRA's operators for CPU, segment by segment in plain torch; affine natively where there is a library.

The layers take `lora_site.LoraSite` in place of shrink and expand. Everything is computed in fp32 whatever the dtype of
the model.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from .lora_rows import AdaptedRows
from .native.functions import ADDRESS, COUNT, NUMBER, TYPE_NUMBERS, function

_AFFINE: Final = (
    "lorikeet_lora_affine",
    NUMBER,
    ADDRESS,
    COUNT,
    COUNT,
    ADDRESS,
    ADDRESS,
    ADDRESS,
    ADDRESS,
    COUNT,
    NUMBER,
)
_affine = function(*_AFFINE)
_affine_briefly = function(*_AFFINE, brief=True)
# Up to so many rows a call takes microseconds.
_FEW: Final = 32


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
    """See `lora.lora_shrink`; [num_tokens, max_rank]."""
    h = torch.zeros(x.shape[0], max_rank)
    for g, slot, start, end in _adapted_segments(seg_starts, seg_slots):
        rank = int(ranks[slot].sum())
        if rank > 0:
            segment_h = x[start:end].float() @ _read_a(arena, offsets, slot, rank, x.shape[1]).T
            h[start:end, :rank] = segment_h if seg_weights is None else segment_h * seg_weights[g]
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
    """See `lora.lora_expand_`; h is [num_tokens, max_rank]."""
    for _, slot, start, end in _adapted_segments(seg_starts, seg_slots):
        for columns, h_columns, b_t in _read_b(arena, offsets, slot, ranks, slice_widths, in_features):
            y[start:end, columns] += h[start:end, h_columns] @ b_t


def lora_affine_(y: Tensor, arena: Tensor, offsets: Tensor, seg_starts: Tensor, seg_slots: Tensor) -> None:
    """See `lora.lora_affine_`."""
    width = y.shape[1]
    affine = _affine_briefly if y.shape[0] <= _FEW else _affine
    if affine is not None:
        offsets, seg_starts, seg_slots = offsets.contiguous(), seg_starts.contiguous(), seg_slots.contiguous()
        affine(
            TYPE_NUMBERS[y.dtype],
            y.data_ptr(),
            y.stride(0),
            width,
            arena.data_ptr(),
            offsets.data_ptr(),
            seg_starts.data_ptr(),
            seg_slots.data_ptr(),
            len(seg_slots),
            torch.get_num_threads(),
        )
        return
    for _, slot, start, end in _adapted_segments(seg_starts, seg_slots):
        position = int(offsets[slot])
        if position >= 0:
            gain, offset = arena[position : position + 2 * width].view(2, width).unbind()
            rows = y[start:end]
            torch.addcmul(offset, rows, gain, out=rows)  # reads 16-bit values, computes in fp32 and rounds once


def lora_add_(
    y: Tensor, x: Tensor, arena: Tensor, offsets: Tensor, ranks: Tensor, rows: AdaptedRows, slice_widths: Sequence[int]
) -> None:
    """As `lora_site.LoraSite.add_`; for tables that it has checked."""
    distinct = torch.from_numpy(rows.distinct)
    sums = y.index_select(0, distinct).float()
    for slot, first, end in zip(rows.slots.tolist(), rows.starts[:-1].tolist(), rows.starts[1:].tolist(), strict=True):
        rank = int(ranks[slot].sum())
        if rank > 0:
            taken, places = torch.from_numpy(rows.rows[first:end]), torch.from_numpy(rows.places[first:end])
            h = x.index_select(0, taken).float() @ _read_a(arena, offsets, slot, rank, x.shape[1]).T
            h *= torch.from_numpy(rows.weights[first:end]).unsqueeze(1)
            for columns, h_columns, b_t in _read_b(arena, offsets, slot, ranks, slice_widths, x.shape[1]):
                sums[:, columns].index_add_(0, places, h[:, h_columns] @ b_t)
    y.index_copy_(0, distinct.long(), sums.to(y.dtype))


def _adapted_segments(seg_starts: Tensor, seg_slots: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """(number, slot, first row, end) of each segment that has an adapter."""
    starts = seg_starts.tolist()
    for number, slot in enumerate(seg_slots.tolist()):
        if slot >= 0:
            yield number, slot, starts[number], starts[number + 1]


def _read_a(arena: Tensor, offsets: Tensor, slot: int, rank: int, in_features: int) -> Tensor:
    """A of all slices, fp32 [rank, in_features]."""
    start = int(offsets[slot])
    return arena[start : start + rank * in_features].view(rank, in_features).float()


def _read_b(
    arena: Tensor, offsets: Tensor, slot: int, ranks: Tensor, slice_widths: Sequence[int], in_features: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of each adapted slice its columns of y and of h, and B^T: fp32 [rank, width]."""
    slot_ranks = ranks[slot].tolist()
    start = int(offsets[slot]) + sum(slot_ranks) * in_features
    column = first_rank = 0
    for rank, width in zip(slot_ranks, slice_widths, strict=True):
        if rank > 0:
            b_t = arena[start : start + rank * width].view(rank, width).float()
            yield slice(column, column + width), slice(first_rank, first_rank + rank), b_t
        start += rank * width
        column += width
        first_rank += rank
