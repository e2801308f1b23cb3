"""LoRA shrink and expand over mixed adapters (CPU loop)."""

import torch
from torch import Tensor


def lora_shrink(x: Tensor, arena: Tensor, offsets: Tensor, ranks: Tensor, seg_starts: Tensor, seg_slots: Tensor, max_rank: int) -> Tensor:
    """CPU path."""
    h = torch.zeros(x.shape[0], max_rank)
    k = x.shape[1]
    starts = seg_starts.tolist()
    for g, slot in enumerate(seg_slots.tolist()):
        if slot < 0 or offsets[slot] < 0:
            continue
        rank = int(ranks[slot].sum())
        a = arena.as_strided((rank, k), (k, 1), int(offsets[slot]))
        h[starts[g] : starts[g + 1], :rank] = torch.mm(x[starts[g] : starts[g + 1]], a.t())
    return h


def lora_expand_(y: Tensor, h: Tensor, arena: Tensor, offsets: Tensor, ranks: Tensor, seg_starts: Tensor, seg_slots: Tensor, slice_widths: list[int], in_features: int) -> None:
    """CPU path."""
    starts = seg_starts.tolist()
    for g, slot in enumerate(seg_slots.tolist()):
        if slot < 0 or offsets[slot] < 0:
            continue
        per = ranks[slot].tolist()
        offset = int(offsets[slot]) + sum(per) * in_features
        col = out = 0
        for rank, width in zip(per, slice_widths, strict=True):
            if rank:
                b = arena.as_strided((rank, width), (width, 1), offset)
                y[starts[g] : starts[g + 1], out : out + width].addmm_(h[starts[g] : starts[g + 1], col : col + rank].to(b.dtype), b)
            offset += rank * width
            col += rank
            out += width
