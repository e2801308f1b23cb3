"""Paged attention for CPU: decodes of similar context run as one batch, prefill chunks one by one in query tiles.

The query heads of a group are rows of one matmul over their shared KV head. Repeating KV instead (`enable_gqa`) takes
five times as long at 9 heads over 3 and 80 to 200 tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Decodes share a batch while the shortest context is within this many tokens, or within a quarter, of the longest:
# what is gathered beyond a context's end is wasted.
_CONTEXT_SLACK = 32
# Elements of K that a batch of decodes gathers at most, so that K, V and scores stay in the last-level cache.
_MAX_GATHERED = 1 << 20
# Query rows of a chunk that attend together. A tile skips the keys after its last row and before its first row's
# window.
_QUERY_TILE = 256


class _Sequence(NamedTuple):
    """A sequence of the step: its index, its query rows [start, end) and its context length."""

    index: int
    start: int
    end: int
    context_len: int


def kv_write_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor) -> None:
    """See `attention.kv_write_`."""
    if kv_slots.numel() == 0:
        return
    if int(kv_slots.min()) < 0:
        kept = (kv_slots >= 0).nonzero().squeeze(1)
        k, v, kv_slots = k[kept], v[kept], kv_slots[kept]
    k_cache.flatten(1, 2).index_copy_(1, kv_slots, k.transpose(0, 1))
    v_cache.flatten(1, 2).index_copy_(1, kv_slots, v.transpose(0, 1))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """See `attention.paged_attention`."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    starts = query_starts.tolist()
    decodes: list[_Sequence] = []
    for index, context_len in enumerate(context_lens.tolist()):
        sequence = _Sequence(index, starts[index], starts[index + 1], context_len)
        num_queries = sequence.end - sequence.start
        if num_queries == 0 or context_len == 0:
            continue
        if num_queries == 1:
            decodes.append(sequence)
        else:
            _prefill(out, q, k_cache, v_cache, sequence, block_tables, scale, window, softcap)
    if decodes:
        num_kv_heads, _, _, head_dim = k_cache.shape
        max_tokens = _MAX_GATHERED // (num_kv_heads * head_dim)
        for batch in _batches(decodes, window, max_tokens):
            _decode(out, q, k_cache, v_cache, batch, block_tables, scale, window, softcap)
    return out


def _batches(decodes: list[_Sequence], window: int, max_tokens: int) -> list[list[_Sequence]]:
    """Splits decodes into batches of similar numbers of visible keys, longest first."""
    def visible(sequence: _Sequence) -> int:
        return min(sequence.context_len, window) if window > 0 else sequence.context_len

    batches: list[list[_Sequence]] = []
    longest = 0
    for sequence in sorted(decodes, key=visible, reverse=True):
        fits = longest - visible(sequence) <= max(_CONTEXT_SLACK, longest // 4)
        if batches and fits and (len(batches[-1]) + 1) * longest <= max_tokens:
            batches[-1].append(sequence)
        else:
            longest = visible(sequence)
            batches.append([sequence])
    return batches


def _decode(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: list[_Sequence],
    block_tables: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Attends with the one query row of each of a batch of sequences."""
    num_kv_heads, _, block_size, head_dim = k_cache.shape
    count = len(batch)
    context_lens = torch.tensor([sequence.context_len for sequence in batch])
    firsts = (context_lens - window).clamp_(min=0) if window > 0 else torch.zeros_like(context_lens)
    lengths = context_lens - firsts
    steps = torch.arange(int(lengths.max()))
    # A context that ends before the batch's longest repeats its last key. Masking alone would not do: what lies behind
    # the end belongs to others and may be NaN, and 0 * NaN would reach this sequence.
    positions = torch.minimum(steps + firsts[:, None], context_lens[:, None] - 1)
    tables = block_tables if count == len(block_tables) else block_tables[[sequence.index for sequence in batch]]
    slots = (tables.gather(1, positions // block_size) * block_size + positions % block_size).flatten()
    keys = _gather(k_cache, slots).view(num_kv_heads, count, -1, head_dim).transpose(0, 1)
    values = _gather(v_cache, slots).view(num_kv_heads, count, -1, head_dim).transpose(0, 1)
    mask = None if bool((lengths == len(steps)).all()) else (steps < lengths[:, None])[:, None, None, :]
    rows = torch.tensor([sequence.start for sequence in batch])
    queries = q.index_select(0, rows).view(count, num_kv_heads, -1, head_dim)
    out.index_copy_(0, rows, _attend(queries, keys, values, mask, scale, softcap).reshape(count, -1, head_dim))


def _prefill(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sequence: _Sequence,
    block_tables: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Attends with the query rows of one sequence's chunk."""
    num_kv_heads, _, block_size, head_dim = k_cache.shape
    offset = sequence.context_len - sequence.end  # position of a query = its row + offset
    first = max(0, sequence.start + offset - window + 1) if window > 0 else 0
    positions = torch.arange(first, sequence.context_len)
    table = block_tables[sequence.index]
    slots = table[positions // block_size] * block_size + positions % block_size
    keys, values = _gather(k_cache, slots)[:, None], _gather(v_cache, slots)[:, None]
    for start in range(sequence.start, sequence.end, _QUERY_TILE):
        end = min(start + _QUERY_TILE, sequence.end)
        low = max(0, start + offset - window + 1) if window > 0 else 0
        seen = slice(low - first, end + offset - first)
        query_positions = torch.arange(start + offset, end + offset)[:, None]
        key_positions = torch.arange(low, end + offset)
        mask = key_positions <= query_positions
        if window > 0:
            mask &= key_positions > query_positions - window
        queries = q[start:end].view(end - start, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        group = queries.shape[1]
        tile = _attend(
            queries,
            keys[:, :, seen].expand(-1, group, -1, -1),
            values[:, :, seen].expand(-1, group, -1, -1),
            mask,
            scale,
            softcap,
        )
        out[start:end] = tile.permute(2, 0, 1, 3).reshape(end - start, -1, head_dim)


def _gather(cache: Tensor, slots: Tensor) -> Tensor:
    """Returns the keys or values at kv_slots [n]: [num_kv_heads, n, head_dim]."""
    return cache.flatten(1, 2).index_select(1, slots)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Attends with q [A, B, n, D] over k and v [A, B, m, D]; mask: True = visible, broadcast to [A, B, n, m]."""
    if softcap == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q.float(), k.float().transpose(2, 3)).mul_(scale / softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    return torch.matmul(scores.softmax(dim=-1), v.float()).to(q.dtype)
