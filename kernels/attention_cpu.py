"""Paged attention and cache writes on a CPU: the C++ kernels of `native`, and plain torch where there is no library.

Plain torch also computes attention over heads whose width is no multiple of 8 (OpenLLaMA-3B: 100).

The kernels read keys and values in place, each once for all query heads that share it, and compute in fp32. Where the
CPU has instructions for it (AVX512-BF16) they multiply bfloat16 as it is, if heads are a multiple of 32 wide; of
several rows the weights are rounded to bfloat16 too. A row's result depends neither on the other sequences of the batch
nor on the number of threads.
"""

import torch
from torch import Tensor

from .native.functions import ADDRESS, COUNT, NUMBER, REAL, TYPE_NUMBERS, function, multiplies_bf16

_ATTENTION = (
    "lorikeet_paged_attention",
    *(NUMBER, NUMBER),
    *(ADDRESS, COUNT, COUNT),
    *(ADDRESS, ADDRESS),
    *(ADDRESS, ADDRESS, ADDRESS, COUNT),
    ADDRESS,
    *(COUNT, COUNT, COUNT, COUNT, COUNT, COUNT),
    *(REAL, COUNT, REAL),
    NUMBER,
)
_attend = function(*_ATTENTION)
_attend_briefly = function(*_ATTENTION, brief=True)
_WRITE = (
    "lorikeet_kv_write",
    NUMBER,
    *(ADDRESS, COUNT, COUNT),
    *(ADDRESS, COUNT, COUNT),
    *(ADDRESS, ADDRESS, ADDRESS),
    *(COUNT, COUNT, COUNT, COUNT),
)
_write = function(*_WRITE)
# Multiplications up to which a call takes some 100 us at most: less than getting Python's lock back may take.
_BRIEF = 1 << 21
LANES = 8
"""The C++ attention takes heads whose width is a multiple of this."""


def kv_write_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor) -> None:
    """See `attention.kv_write_`."""
    if _write is None:
        kept = (kv_slots >= 0).nonzero().squeeze(1)
        for x, cache in ((k, k_cache), (v, v_cache)):
            cache.flatten(1, 2).index_copy_(1, kv_slots[kept], x[kept].transpose(0, 1))
        return
    num_tokens, num_kv_heads, head_dim = k.shape
    k, v, kv_slots = _with_whole_heads(k), _with_whole_heads(v), kv_slots.contiguous()
    _write(
        k.element_size(),
        k.data_ptr(),
        *k.stride()[:2],
        v.data_ptr(),
        *v.stride()[:2],
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        kv_slots.data_ptr(),
        num_tokens,
        num_kv_heads,
        head_dim,
        k_cache.shape[1] * k_cache.shape[2],
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    max_context_len: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """See `attention.paged_attention`."""
    work = 2 * q.shape[0] * q.shape[1] * q.shape[2] * max_context_len
    attend = _attend_briefly if work <= _BRIEF else _attend
    if attend is None or q.shape[2] % LANES:
        return _attend_plainly(q, k_cache, v_cache, query_starts, context_lens, block_tables, scale, window, softcap)
    q = _with_whole_heads(q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    q_row, q_head, _ = q.stride()
    num_kv_heads, num_blocks, block_size, head_dim = k_cache.shape
    attend(
        TYPE_NUMBERS[q.dtype],
        q.dtype is torch.bfloat16 and multiplies_bf16(),
        q.data_ptr(),
        q_row,
        q_head,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        query_starts.data_ptr(),
        context_lens.data_ptr(),
        block_tables.data_ptr(),
        block_tables.shape[1],
        out.data_ptr(),
        block_tables.shape[0],
        q.shape[1],
        num_kv_heads,
        head_dim,
        num_blocks,
        block_size,
        scale,
        window,
        softcap,
        torch.get_num_threads(),
    )
    return out


def _with_whole_heads(x: Tensor) -> Tensor:
    """The tensor itself where the values of a head lie side by side, as they do unless someone transposes."""
    return x if x.stride(2) == 1 else x.contiguous()


def _attend_plainly(
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
    """One sequence after the other, over a gathered fp32 copy of the keys and values that its rows see."""
    num_kv_heads, _, block_size, head_dim = k_cache.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    starts = query_starts.tolist()
    for n, context in enumerate(context_lens.tolist()):
        start, end = starts[n], starts[n + 1]
        rows = end - start
        if rows == 0:
            continue
        positions = torch.arange(context - rows, context)[:, None]
        first = max(0, context - rows - window + 1) if window else 0
        visible = torch.arange(first, context)
        blocks, offsets = block_tables[n, visible // block_size].long(), visible % block_size
        keys, values = (cache[:, blocks, offsets].float().unsqueeze(1) for cache in (k_cache, v_cache))
        queries = q[start:end].float().view(rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3) * scale
        scores = queries @ keys.transpose(2, 3)  # [num_kv_heads, group, rows, positions]
        if softcap:
            scores = (scores / softcap).tanh() * softcap
        hidden = visible > positions
        if window:
            hidden |= visible <= positions - window
        result = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
        out[start:end] = result.permute(2, 0, 1, 3).reshape(rows, -1, head_dim)
    return out
