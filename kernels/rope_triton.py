"""Rotary embedding and cache write in Triton, for CUDA: a program takes some heads of one token.

Programs of queries rotate in place; programs of keys and values read both and write to the cache alone, so nobody reads
what another one writes.

Graph-safe: the grid depends on shapes alone, nothing waits for the device. May be launched dependently
(`overlap_triton`). Not tuned on a GPU yet.
"""
# ruff: noqa: ANN001, ANN202 -- triton.jit reads annotations, and has none for pointers

import triton
import triton.language as tl
from torch import Tensor

from .overlap import launches_dependently
from .overlap_triton import begin, wait

# Bytes of a program in each half of its heads: one load of 16 bytes for each thread of two warps. Small, because a
# decode step has few tokens.
_TILE_BYTES = 1024


def rope_kv_write_(
    qkv: Tensor,
    rotations: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots: Tensor,
    head_norm: Tensor | None,
    eps: float,
) -> None:
    """See `rope.rope_kv_write_`."""
    num_kv_heads, head_dim = k_cache.shape[0], k_cache.shape[3]
    num_tokens, num_heads = qkv.shape[0], qkv.shape[1] // head_dim - 2 * num_kv_heads
    if num_tokens == 0:
        return
    padded_half = triton.next_power_of_2(head_dim // 2)
    tile_heads = max(1, _TILE_BYTES // (padded_half * qkv.element_size()))
    tile_heads = min(tile_heads, triton.next_power_of_2(num_heads))
    query_tiles = triton.cdiv(num_heads, tile_heads)
    dependent = launches_dependently(qkv.device)
    _rope_kv_write_kernel[(num_tokens, query_tiles + triton.cdiv(num_kv_heads, tile_heads))](
        qkv,
        rotations,
        k_cache,
        v_cache,
        kv_slots,
        # Unused without a norm, but an argument needs some tensor.
        qkv if head_norm is None else head_norm,
        qkv.stride(0),
        k_cache.stride(0),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        PADDED_HALF=padded_half,
        TILE_HEADS=tile_heads,
        QUERY_TILES=query_tiles,
        NORM=head_norm is not None,
        DEPENDENT=dependent,
        num_warps=2,
        launch_pdl=dependent,
    )


@triton.jit
def _rope_kv_write_kernel(
    qkv_ptr,
    rotations_ptr,
    k_cache_ptr,
    v_cache_ptr,
    kv_slots_ptr,
    head_norm_ptr,
    qkv_stride,
    cache_stride_head,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Rotate TILE_HEADS query heads of a token in place, or as many key heads into the cache with their values.

    Grid: (num_tokens, QUERY_TILES + tiles of the kv heads).
    """
    begin(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    wait(DEPENDENT)  # before all reads: rotations are computed by the step, too
    dims = tl.arange(0, PADDED_HALF)
    dim_mask = dims < HALF
    # Once for each head, like the heads themselves: loaded as one row they would go to the threads by shared memory.
    angles = token * (3 * HALF) + tl.broadcast_to(dims[None, :], (TILE_HEADS, PADDED_HALF))
    cos = tl.load(rotations_ptr + angles, mask=dim_mask[None, :], other=0.0).to(tl.float32)
    sin = tl.load(rotations_ptr + angles + 2 * HALF, mask=dim_mask[None, :], other=0.0).to(tl.float32)
    row_ptr = qkv_ptr + token * qkv_stride
    if tile < QUERY_TILES:
        heads = tile * TILE_HEADS + tl.arange(0, TILE_HEADS)
        mask = (heads < NUM_HEADS)[:, None] & dim_mask[None, :]
        columns = heads[:, None] * (2 * HALF) + dims[None, :]
        low, high = _load_head(row_ptr, head_norm_ptr, columns, mask, eps, HALF, NORM)
        tl.store(row_ptr + columns, (low * cos - high * sin).to(qkv_ptr.dtype.element_ty), mask=mask)
        tl.store(row_ptr + columns + HALF, (high * cos + low * sin).to(qkv_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(kv_slots_ptr + token)
        if slot >= 0:
            heads = (tile - QUERY_TILES) * TILE_HEADS + tl.arange(0, TILE_HEADS)
            mask = (heads < NUM_KV_HEADS)[:, None] & dim_mask[None, :]
            key_columns = (NUM_HEADS + heads)[:, None] * (2 * HALF) + dims[None, :]
            value_columns = key_columns + NUM_KV_HEADS * 2 * HALF
            value_low = tl.load(row_ptr + value_columns, mask=mask, other=0.0)
            value_high = tl.load(row_ptr + value_columns + HALF, mask=mask, other=0.0)
            low, high = _load_head(row_ptr, head_norm_ptr, key_columns, mask, eps, HALF, NORM)
            entries = (heads.to(tl.int64) * cache_stride_head)[:, None] + slot * (2 * HALF) + dims[None, :]
            element = k_cache_ptr.dtype.element_ty
            tl.store(k_cache_ptr + entries, (low * cos - high * sin).to(element), mask=mask)
            tl.store(k_cache_ptr + entries + HALF, (high * cos + low * sin).to(element), mask=mask)
            tl.store(v_cache_ptr + entries, value_low, mask=mask)
            tl.store(v_cache_ptr + entries + HALF, value_high, mask=mask)


@triton.jit
def _load_head(row_ptr, head_norm_ptr, columns, mask, eps, HALF: tl.constexpr, NORM: tl.constexpr):
    """(low, high) halves of heads in fp32, normalized where the family does that.

    The norm's weights of all heads are one after the other, so they are at the columns of their heads.
    """
    stored_low = tl.load(row_ptr + columns, mask=mask, other=0.0)
    stored_high = tl.load(row_ptr + columns + HALF, mask=mask, other=0.0)
    low, high = stored_low.to(tl.float32), stored_high.to(tl.float32)
    if NORM:
        factor = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF) + eps)[:, None]
        weight_low = tl.load(head_norm_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        weight_high = tl.load(head_norm_ptr + columns + HALF, mask=mask, other=0.0).to(tl.float32)
        # Rounded where transformers rounds, as in norm_triton.
        low = ((low * factor).to(stored_low.dtype).to(tl.float32) * weight_low).to(stored_low.dtype).to(tl.float32)
        high = ((high * factor).to(stored_low.dtype).to(tl.float32) * weight_high).to(stored_low.dtype).to(tl.float32)
    return low, high
