"""Paged attention over a KV cache in blocks: the operators `lorikeet::kv_write_` and `lorikeet::paged_attention`.

This file owns their schemas, their contract (the fakes run the same checks as the implementations) and the choice of
the implementation by device: `attention_cpu` in C++, `attention_triton` and `kv_write_triton` on CUDA. The oracle of
all is `attention_reference`. Called on the step thread, once a layer, with the same step tensors for all layers.

The step, by example: block_size 4, sequence 0 in the middle of its prompt (rows 0 to 2 of the flat batch are its
positions 3 to 5), sequence 1 decoding its tenth token:

    query_starts  [0, 3, 4]
    context_lens  [6, 10]                       including this step's tokens
    block_tables  [[7, 2, -], [0, 5, 3]]        position p of n is in block block_tables[n, p // 4], at offset p % 4
    kv_slots      [31, 8, 9, 13]                block * 4 + offset of each row: 7*4+3, 2*4+0, 2*4+1, 3*4+1

Entries of the cache that were never written, and table entries past the context, may hold anything: they are masked so
that not even a NaN there shows.
"""

import torch
from torch import Tensor

from . import attention_cpu
from .contract import refuse

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def kv_write_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor) -> None:
    """Writes the keys and values of a step's tokens into the cache, in place.

    Args:
        k: [num_tokens, num_kv_heads, head_dim], any strides.
        v: as `k`.
        k_cache: [num_kv_heads, num_blocks, block_size, head_dim], contiguous, dtype of `k`. Mutated.
        v_cache: as `k_cache`. Mutated.
        kv_slots: int64 [num_tokens], block * block_size + offset in the block, all different; -1: the token is skipped.

    Raises:
        RuntimeError: a shape, dtype or layout is not as above.
    """
    # On a CPU the dispatcher would take longer than a small call.
    if k.is_cpu and not torch.compiler.is_compiling():
        _kv_write_cpu(k, v, k_cache, v_cache, kv_slots)
    else:
        torch.ops.lorikeet.kv_write_.default(k, v, k_cache, v_cache, kv_slots)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Causal attention of each query row over its own sequence's cached keys, softmax in fp32.

    Sequence n owns the query rows [query_starts[n], query_starts[n + 1]); the last of them is at position
    context_lens[n] - 1. A sequence may own no row.

    Args:
        q: [num_tokens, num_heads, head_dim], float32, bfloat16 or float16, any strides; num_heads is a multiple of
            num_kv_heads, and query head h reads kv head h // (num_heads / num_kv_heads).
        k_cache: [num_kv_heads, num_blocks, block_size, head_dim], contiguous, dtype of `q`; holds this step's tokens
            already.
        v_cache: as `k_cache`.
        query_starts: int32 [num_seqs + 1], ascending from 0.
        context_lens: int32 [num_seqs], tokens of each sequence, this step's included.
        block_tables: int32 [num_seqs, max_blocks], contiguous.
        max_query_len: no sequence owns more rows. 1 selects a decode kernel, so a graph captured with 1 must not be
            replayed with more; beyond that it only tunes.
        max_context_len: no context is longer. Only tunes.
        scale: factor on q . k.
        window: 0: off; else the query at position p sees keys p - window + 1 to p.
        softcap: 0: off; else scores become softcap * tanh(scores / softcap).

    Returns:
        [num_tokens, num_heads, head_dim], dtype of `q`, contiguous. Rows that no sequence owns are undefined.

    Raises:
        RuntimeError: a shape, dtype or layout is not as above.
    """
    # On a CPU the dispatcher is left out, as in `kv_write_`.
    eager_cpu = q.is_cpu and not torch.compiler.is_compiling()
    implementation = _paged_attention_cpu if eager_cpu else torch.ops.lorikeet.paged_attention.default
    out: Tensor = implementation(
        q,
        k_cache,
        v_cache,
        query_starts,
        context_lens,
        block_tables,
        max_query_len,
        max_context_len,
        scale,
        window,
        softcap,
    )
    return out


def _check_caches(x: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    # On a CPU these run at every call of a microsecond or two, so messages are made only where they are needed.
    dtype, shape = x.dtype, k_cache.shape
    if dtype not in _FLOATS:
        refuse(f"expected float32, bfloat16 or float16, got {dtype}")
    if x.dim() != 3:
        refuse(f"expected [num_tokens, heads, head_dim], got {tuple(x.shape)}")
    if len(shape) != 4:
        refuse(f"k_cache has 4 dimensions, got {tuple(shape)}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not cache.is_contiguous():
            refuse(f"{name} is contiguous, got strides {cache.stride()}")
        if cache.dtype != dtype:
            refuse(f"{name} is {dtype} like its input, got {cache.dtype}")
    if shape != v_cache.shape:
        refuse(f"caches of one shape, got {tuple(shape)} and {tuple(v_cache.shape)}")
    if x.shape[2] != shape[3]:
        refuse(f"head_dim of the cache is {shape[3]}, got {x.shape[2]}")


def _check_kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor) -> None:
    _check_caches(k, k_cache, v_cache)
    if k.shape != v.shape or k.dtype != v.dtype:
        refuse(f"k and v alike, got {tuple(k.shape)} {k.dtype} and {tuple(v.shape)} {v.dtype}")
    if k.shape[1] != k_cache.shape[0]:
        refuse(f"num_kv_heads of the cache is {k_cache.shape[0]}, got {k.shape[1]}")
    if kv_slots.dtype != torch.int64 or kv_slots.shape != k.shape[:1]:
        refuse(f"kv_slots is int64 [{k.shape[0]}], got {kv_slots.dtype} {tuple(kv_slots.shape)}")


def check_paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    window: int,
    softcap: float,
) -> None:
    """Raises RuntimeError where arguments of `paged_attention` break its contract."""
    _check_caches(q, k_cache, v_cache)
    num_heads = q.shape[1]
    num_kv_heads = k_cache.shape[0]
    if num_heads % num_kv_heads != 0:
        refuse(f"num_heads is a multiple of num_kv_heads {num_kv_heads}, got {num_heads}")
    for name, table, dims in (
        ("query_starts", query_starts, 1),
        ("context_lens", context_lens, 1),
        ("block_tables", block_tables, 2),
    ):
        if table.dtype != torch.int32 or table.dim() != dims or not table.is_contiguous():
            refuse(
                f"{name} is int32, contiguous, of {dims} dimension(s), got {table.dtype} {tuple(table.shape)}, "
                f"strides {table.stride()}"
            )
    num_seqs = context_lens.shape[0]
    if query_starts.shape[0] != num_seqs + 1 or block_tables.shape[0] != num_seqs:
        refuse(
            f"query_starts [{num_seqs + 1}] and block_tables [{num_seqs}, ...] for {num_seqs} context_lens, "
            f"got {tuple(query_starts.shape)} and {tuple(block_tables.shape)}"
        )
    if window < 0 or softcap < 0:
        refuse(f"window and softcap >= 0, got {window} and {softcap}")


def _kv_write_fake(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor) -> None:
    _check_kv_write(k, v, k_cache, v_cache, kv_slots)


def _kv_write_cpu(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor) -> None:
    _check_kv_write(k, v, k_cache, v_cache, kv_slots)
    attention_cpu.kv_write_(k, v, k_cache, v_cache, kv_slots)


def _kv_write_cuda(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor) -> None:
    from . import kv_write_triton  # CPU-only installs have no Triton

    _check_kv_write(k, v, k_cache, v_cache, kv_slots)
    with torch.cuda.device_of(k):  # Triton launches on the current device, whatever its arguments are on
        kv_write_triton.kv_write_(k, v, k_cache, v_cache, kv_slots)


def _paged_attention_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    check_paged_attention(q, k_cache, v_cache, query_starts, context_lens, block_tables, window, softcap)
    return q.new_empty(q.shape)


def _paged_attention_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    check_paged_attention(q, k_cache, v_cache, query_starts, context_lens, block_tables, window, softcap)
    return attention_cpu.paged_attention(
        q, k_cache, v_cache, query_starts, context_lens, block_tables, max_context_len, scale, window, softcap
    )


def _paged_attention_cuda(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    from . import attention_triton  # CPU-only installs have no Triton

    check_paged_attention(q, k_cache, v_cache, query_starts, context_lens, block_tables, window, softcap)
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever its arguments are on
        return attention_triton.paged_attention(
            q,
            k_cache,
            v_cache,
            query_starts,
            context_lens,
            block_tables,
            max_query_len,
            max_context_len,
            scale,
            window,
            softcap,
        )


torch.library.define(
    "lorikeet::kv_write_", "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor kv_slots) -> ()"
)
torch.library.define(
    "lorikeet::paged_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor query_starts, Tensor context_lens, Tensor block_tables, "
    "SymInt max_query_len, SymInt max_context_len, float scale, int window, float softcap) -> Tensor",
)
torch.library.impl("lorikeet::kv_write_", "CPU", _kv_write_cpu)
torch.library.impl("lorikeet::kv_write_", "CUDA", _kv_write_cuda)
torch.library.register_fake("lorikeet::kv_write_", _kv_write_fake)
torch.library.impl("lorikeet::paged_attention", "CPU", _paged_attention_cpu)
torch.library.impl("lorikeet::paged_attention", "CUDA", _paged_attention_cuda)
torch.library.register_fake("lorikeet::paged_attention", _paged_attention_fake)
