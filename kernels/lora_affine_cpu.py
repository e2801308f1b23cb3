"""LoRA's affine for CPU: y = y * gain + offset for all short segments in one call, for long ones one by one.

addcmul reads 16-bit values, computes in fp32 and rounds once. As in `lora_cpu`, calls cost more than the arithmetic in
a decode step; unlike there, an adapter's share is small enough to be copied, so that any slots share a call.

What it adds to shrink and expand at rank 16, and to them and the base's matmul in fp32, in percent (one thread of an
AVX2 machine that others used too, torch 2.13, 2026-11-22); evenly spaced adapters against those that lie anywhere:

    8 segments of 4 rows        576 -> 576 + 192 + 192   fp32 15, 15 and 6, 8    bf16 11, 11
    8 segments of 4 rows        576 -> 1536 + 1536       fp32 14, 18 and 1, 2    bf16 13, 15
    8 segments of 4 rows        1536 -> 576              fp32 19, 24 and 3, 5    bf16 13, 14
    32 segments of 1 row        576 -> 576 + 192 + 192   fp32 13,  3 and 7, 3    bf16  7,  6
    8 segments of 1, 3, 4 rows  576 -> 576 + 192 + 192   fp32 16, 16 and 11, 10  bf16  5,  3
    1 segment of 512 rows       576 -> 576 + 192 + 192   fp32 12, 12 and 1, 1
"""

from itertools import pairwise

import torch
from torch import Tensor

# Longer segments have a call of their own.
_MAX_SHARED_LENGTH = 16
# Segments that are not beside each other share a call from this number on: their rows must be taken out and put back.
_MIN_SCATTERED_SEGMENTS = 8


def lora_affine_(y: Tensor, arena: Tensor, offsets: Tensor, seg_starts: Tensor, seg_slots: Tensor) -> None:
    """See `lora.lora_affine_`."""
    slot_offsets = offsets.numpy()
    starts = seg_starts.tolist()
    short: list[tuple[int, int, int]] = []  # first row, end, element of the arena
    alone: list[tuple[int, int, int]] = []
    for g, slot in enumerate(seg_slots.tolist()):
        start, end = starts[g], starts[g + 1]
        if slot < 0 or start == end:
            continue
        position = int(slot_offsets[slot])
        if position >= 0:
            (short if end - start <= _MAX_SHARED_LENGTH else alone).append((start, end, position))
    if short:
        beside = all(a[1] == b[0] for a, b in pairwise(short))
        if len(short) < (2 if beside else _MIN_SCATTERED_SEGMENTS):
            alone += short
        elif beside:
            _apply_beside_(y, arena, short)
        else:
            _apply_scattered_(y, arena, short)
    width = y.shape[1]
    for start, end, position in alone:
        gain, offset = arena[position : position + 2 * width].view(2, width).unbind()
        rows = y[start:end]
        torch.addcmul(offset, rows, gain, out=rows)


def _apply_beside_(y: Tensor, arena: Tensor, segments: list[tuple[int, int, int]]) -> None:
    """The segments follow one another without a gap."""
    first, last = segments[0][0], segments[-1][1]
    positions = [position for _, _, position in segments]
    lengths = [end - start for start, end, _ in segments]
    rows = y[first:last]
    if min(lengths) == max(lengths):  # one gain for all rows of a segment
        rows = rows.view(len(segments), lengths[0], -1)
        affines = _gather(arena, positions, y.shape[1]).unsqueeze(2)  # [num_segments, 2, 1, width]
    else:
        affines = _gather(arena, _by_row(segments), y.shape[1])
    torch.addcmul(affines[:, 1], rows, affines[:, 0], out=rows)


def _apply_scattered_(y: Tensor, arena: Tensor, segments: list[tuple[int, int, int]]) -> None:
    indices = torch.tensor([row for start, end, _ in segments for row in range(start, end)])
    affines = _gather(arena, _by_row(segments), y.shape[1])
    rows = y.index_select(0, indices)
    y.index_copy_(0, indices, torch.addcmul(affines[:, 1], rows, affines[:, 0], out=rows))


def _by_row(segments: list[tuple[int, int, int]]) -> list[int]:
    """Returns the arena's element for each row of the segments."""
    return [position for start, end, position in segments for _ in range(start, end)]


def _gather(arena: Tensor, positions: list[int], width: int) -> Tensor:
    """Returns [len(positions), 2, width]: gains and offsets that start at each position."""
    step = positions[1] - positions[0]
    if step >= 0 and all(b - a == step for a, b in pairwise(positions)):  # evenly spaced: no copy
        return arena.as_strided((len(positions), 2, width), (step, width, 1), arena.storage_offset() + positions[0])
    # Row i of this view is arena[i : i + 2 * width], so that one call gathers what starts anywhere.
    windows = arena.as_strided((arena.shape[0] - 2 * width + 1, 2 * width), (1, 1))
    return windows.index_select(0, torch.tensor(positions)).view(-1, 2, width)
