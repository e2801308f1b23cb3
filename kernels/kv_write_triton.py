"""New keys and values into the paged cache, in Triton, for CUDA: one program a token.

The lean decoder writes them while it rotates (`rope_triton`); this is for models that run transformers' own forward.
Graph-safe: the grid depends on a shape alone, and a token without a slot writes nothing.
"""
# ruff: noqa: ANN001, ANN202 -- triton.jit reads annotations, and has none for pointers

import triton
import triton.language as tl
from torch import Tensor


def kv_write_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor) -> None:
    """See `attention.kv_write_`."""
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    width = triton.next_power_of_2(num_kv_heads * head_dim)
    _kv_write_kernel[(num_tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        kv_slots,
        *k.stride(),
        *v.stride(),
        kv_slots.stride(0),
        k_cache.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_WIDTH=width,
        num_warps=4 if width <= 2048 else 8,
    )


@triton.jit
def _kv_write_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    kv_slots_ptr,
    k_stride_token,
    k_stride_head,
    k_stride_dim,
    v_stride_token,
    v_stride_head,
    v_stride_dim,
    kv_slots_stride,
    cache_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
):
    """Write one token a program: cache[h, slot] = x[token, h] for K and V."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(kv_slots_ptr + token * kv_slots_stride)
    if slot >= 0:
        columns = tl.arange(0, PADDED_WIDTH)
        mask = columns < NUM_KV_HEADS * HEAD_DIM
        heads = (columns // HEAD_DIM).to(tl.int64)
        dims = columns % HEAD_DIM
        entries = heads * cache_stride_head + slot * HEAD_DIM + dims
        k = tl.load(k_ptr + token * k_stride_token + heads * k_stride_head + dims * k_stride_dim, mask=mask)
        tl.store(k_cache_ptr + entries, k, mask=mask)
        v = tl.load(v_ptr + token * v_stride_token + heads * v_stride_head + dims * v_stride_dim, mask=mask)
        tl.store(v_cache_ptr + entries, v, mask=mask)
