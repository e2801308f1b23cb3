"""LoRA shrink, expand and affine in plain fp32 torch, one segment and one slice at a time.

The oracle of the tests and the baseline of the benchmarks. Written to be obviously right: it loops, it reads the tables
back to the host, and it shares no code with the implementations that it judges.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def lora_shrink_reference(
    x: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    max_rank: int,
    seg_weights: Tensor | None = None,
) -> Tensor:
    """Computes `h = weight * (x @ A^T)` segment by segment; see `lora.lora_shrink` for the arguments.

    Returns:
        h: [num_tokens, max_rank], float32.
    """
    in_features = x.shape[1]
    h = torch.zeros(x.shape[0], max_rank, dtype=torch.float32, device=x.device)
    for g in range(len(seg_slots)):
        slot, start, end = int(seg_slots[g]), int(seg_starts[g]), int(seg_starts[g + 1])
        if slot < 0:
            continue
        rank = int(ranks[slot].sum())
        if rank == 0:
            continue
        offset = int(offsets[slot])
        lora_a = arena[offset : offset + rank * in_features].reshape(rank, in_features)
        weight = 1.0 if seg_weights is None else float(seg_weights[g])
        h[start:end, :rank] = weight * (x[start:end].float() @ lora_a.float().T)
    return h


def lora_expand_reference_(
    y: Tensor,
    h: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    slice_widths: Sequence[int],
    in_features: int,
    affines: Tensor | None = None,
) -> None:
    """Computes `y += h @ B^T` slice by slice, after the affine; see `lora.lora_expand_`.

    h is [num_tokens, max_rank], as `lora_shrink_reference` returns it.
    """
    if affines is not None:
        lora_affine_reference_(y, arena, affines, seg_starts, seg_slots)
    for g in range(len(seg_slots)):
        slot, start, end = int(seg_slots[g]), int(seg_starts[g]), int(seg_starts[g + 1])
        if slot < 0:
            continue
        slice_ranks = [int(r) for r in ranks[slot]]
        block = int(offsets[slot]) + sum(slice_ranks) * in_features
        column = first_rank = 0
        for rank, width in zip(slice_ranks, slice_widths, strict=True):
            if rank > 0:
                lora_b_t = arena[block : block + rank * width].reshape(rank, width)
                delta = h[start:end, first_rank : first_rank + rank] @ lora_b_t.float()
                target = y[start:end, column : column + width]
                target.copy_(target.float() + delta)
            block += rank * width
            column += width
            first_rank += rank


def lora_affine_reference_(y: Tensor, arena: Tensor, offsets: Tensor, seg_starts: Tensor, seg_slots: Tensor) -> None:
    """Computes `y = y * gain + offset` segment by segment; see `lora.lora_affine_` for the arguments."""
    width = y.shape[1]
    for g in range(len(seg_slots)):
        slot, start, end = int(seg_slots[g]), int(seg_starts[g]), int(seg_starts[g + 1])
        if slot < 0 or int(offsets[slot]) < 0:
            continue
        position = int(offsets[slot])
        gain = arena[position : position + width].float()
        offset = arena[position + width : position + 2 * width].float()
        y[start:end] = (y[start:end].float() * gain + offset).to(y.dtype)
