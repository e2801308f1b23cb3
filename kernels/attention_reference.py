"""Paged attention in plain fp32 torch, one sequence and one query head at a time: the oracle of the tests."""

import torch
from torch import Tensor


def kv_write_reference_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor) -> None:
    """Writes token by token; see `attention.kv_write_` for the arguments."""
    block_size = k_cache.shape[2]
    for t in range(len(kv_slots)):
        slot = int(kv_slots[t])
        if slot >= 0:
            block, position = divmod(slot, block_size)
            k_cache[:, block, position] = k[t]
            v_cache[:, block, position] = v[t]


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
    """Computes softmax(q k^T) v over each sequence's own keys; see `attention.paged_attention` for the arguments."""
    num_kv_heads, _, block_size, head_dim = k_cache.shape
    group = q.shape[1] // num_kv_heads
    out = torch.zeros_like(q)
    for n in range(len(context_lens)):
        start, end, context_len = int(query_starts[n]), int(query_starts[n + 1]), int(context_lens[n])
        if start == end or context_len == 0:
            continue
        blocks = block_tables[n, : -(-context_len // block_size)].long()
        key_positions = torch.arange(context_len, device=q.device)
        query_positions = torch.arange(context_len - (end - start), context_len, device=q.device)[:, None]
        visible = key_positions <= query_positions
        if window > 0:
            visible &= key_positions > query_positions - window
        for head in range(q.shape[1]):
            keys = k_cache[head // group, blocks].reshape(-1, head_dim)[:context_len].float()
            values = v_cache[head // group, blocks].reshape(-1, head_dim)[:context_len].float()
            scores = (q[start:end, head].float() @ keys.T) * scale
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
            out[start:end, head] = (weights @ values).to(q.dtype)
    return out
