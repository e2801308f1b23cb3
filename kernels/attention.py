"""Paged attention over a block-table KV cache: writing keys and values, and attending over them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def kv_write_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor) -> None:
    """CPU path."""
    keep = kv_slots >= 0
    if not bool(keep.all()):
        k, v, kv_slots = k[keep], v[keep], kv_slots[keep]
    k_cache.flatten(1, 2).index_copy_(1, kv_slots, k.transpose(0, 1))
    v_cache.flatten(1, 2).index_copy_(1, kv_slots, v.transpose(0, 1))


def paged_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, query_starts: Tensor, context_lens: Tensor, block_tables: Tensor, max_query_len: int, max_context_len: int, scale: float, window: int, softcap: float) -> Tensor:
    """CPU path."""
    heads, size, dim = k_cache.shape[0], k_cache.shape[2], k_cache.shape[3]
    group = q.shape[1] // heads
    out = torch.empty(q.shape, dtype=q.dtype)
    starts, lens = query_starts.tolist(), context_lens.tolist()
    single = [n for n in range(len(lens)) if starts[n + 1] - starts[n] == 1]
    for n in range(len(lens)):
        if starts[n + 1] - starts[n] == 1:
            continue
        a, b, length = starts[n], starts[n + 1], lens[n]
        blocks = block_tables[n, : -(-length // size)].long()
        k = k_cache.index_select(1, blocks).view(heads, -1, dim)[:, :length]
        v = v_cache.index_select(1, blocks).view(heads, -1, dim)[:, :length]
        rows = q[a:b].view(b - a, heads, group, dim).permute(1, 2, 0, 3).reshape(heads, group * (b - a), dim)
        position = torch.arange(length - (b - a), length)[:, None]
        key = torch.arange(length)[None]
        ok = key <= position
        if window:
            ok &= key > position - window
        ok = ok.repeat(group, 1)
        y = _attend(rows, k, v, ok, scale, softcap)
        out[a:b] = y.view(heads, group, b - a, dim).permute(2, 0, 1, 3).reshape(b - a, heads * group, dim)
    if single:
        longest = max(lens[n] for n in single)
        nb = -(-longest // size)
        blocks = block_tables[single, :nb].long()
        rows_i = [starts[n] for n in single]
        k = k_cache.index_select(1, blocks.flatten()).view(heads, len(single), nb * size, dim)
        v = v_cache.index_select(1, blocks.flatten()).view(heads, len(single), nb * size, dim)
        rows = q[rows_i].view(len(single), heads, group, dim).transpose(0, 1)
        key = torch.arange(nb * size)[None]
        length_t = torch.tensor([lens[n] for n in single])[:, None]
        ok = key < length_t
        if window:
            ok &= key >= length_t - window
        y = _attend(rows, k, v.masked_fill(~ok[None, :, :, None], 0) if not bool(ok.all()) else v, ok[None, :, None, :], scale, softcap)
        out[rows_i] = y.transpose(0, 1).reshape(len(single), heads * group, dim)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, ok: Tensor, scale: float, softcap: float) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill_(~ok, float("-inf")).softmax(-1).to(q.dtype)
    return torch.matmul(weights, v)
