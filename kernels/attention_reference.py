"""Paged attention in plain fp32 torch: one sequence, one head and one query row at a time.

The oracle of the tests and the baseline of the benchmarks. Written to be obviously right: it loops, it reads the tables
back to the host, and it shares no code with the implementations that it judges.
"""

import torch
from torch import Tensor


def kv_write_reference_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor) -> None:
    """Writes each token to its place in the cache; see `attention.kv_write_` for the arguments."""
    block_size = k_cache.shape[2]
    for t, slot in enumerate(kv_slots.tolist()):
        if slot < 0:
            continue
        k_cache[:, slot // block_size, slot % block_size] = k[t]
        v_cache[:, slot // block_size, slot % block_size] = v[t]


def paged_attention_reference(
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
    """Computes `softmax(q . K^T * scale) . V` over the visible keys; see `attention.paged_attention` for the arguments.

    Returns:
        [num_tokens, num_heads, head_dim], float32. Rows that no sequence owns are zero.
    """
    num_kv_heads, _, block_size, _ = k_cache.shape
    group = q.shape[1] // num_kv_heads
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for n, context_len in enumerate(context_lens.tolist()):
        start, end = int(query_starts[n]), int(query_starts[n + 1])
        for row in range(start, end):
            position = context_len - (end - row)
            first = max(0, position - window + 1) if window else 0
            keys = torch.arange(first, position + 1, device=q.device)
            blocks, offsets = block_tables[n, keys // block_size].long(), keys % block_size
            for head in range(q.shape[1]):
                k = k_cache[head // group, blocks, offsets].float()
                v = v_cache[head // group, blocks, offsets].float()
                scores = k @ q[row, head].float() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                out[row, head] = scores.softmax(0) @ v
    return out
