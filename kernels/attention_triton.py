"""Paged attention in Triton, for CUDA: one kernel for decodes and prefill chunks, one that joins split contexts.

A program owns a tile of query rows of one sequence and one KV head; the query heads of the group are rows of the tile
too, so that K and V are read once for all of them. It walks the keys that the tile sees with an online softmax
(FlashAttention-2, arXiv 2307.08691). A step of few rows has too few tiles for a GPU; its contexts are
split among programs, whose partial results a second kernel joins (the idea of Flash-Decoding). The packing of rows and
the map from programs to tiles follow vLLM's `triton_unified_attention.py`; here a split is a share of the keys that its
tile sees, and masked keys are never loaded.

Graph-safe: grids depend on shapes and on Python ints alone, every loop bound comes from the step's tensors on the
device, and nothing waits for the device. Under a graph `max_context_len` is the model's limit: how many splits there
are then depends on the number of rows and sequences, and a short context leaves some of them without a key. Sequences
without a row cost a program that leaves at once. Decodes may be launched dependently (`overlap_triton`).

Decodes beside chunks of prompts are in the chunks' launch, a tile of 64 rows each, of which a group is used. That costs
them little (at head_dim 128: 0.3 us of products for each 32 KiB of keys and values, which take a multiprocessor 1.4 us
of its share of 3 TB/s, and two programs have 64 KiB under way), and one launch lets both fill the GPU together, where
two would each end in a tail. In a step of 64 rows beside 16 decodes, contexts are split in two: the chunk's few tiles
would else be the last to end.

Bytes at context 1,024 for Llama-3-8B, each layer: 4.2 MB a sequence, so 1.4 us at 3 TB/s for one, 22 us for 16, 90 us
for 64. One sequence is bound by latencies, a chain of tables, keys and values; its 32 splits have a tile each.
"""
# ruff: noqa: ANN001, ANN202 -- triton.jit reads annotations, and has none for pointers

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import launches_dependently
from .overlap_triton import begin, wait

_LOG2E = tl.constexpr(1.4426950408889634)
# Below every score, and unlike -inf without NaN when two of them are subtracted.
_LOWEST = tl.constexpr(-1.0e38)

_MAX_SPLITS = 32
# Programs for each multiprocessor, if contexts are split. Of decodes five fit, and four hide each other's waits; with
# chunks two fit, and a second round lets short ones go first.
_PROGRAMS_PER_PROCESSOR = 4
# Fewer keys than this in a split are not worth joining it.
_MIN_SPLIT_KEYS = 256
# Streaming multiprocessors assumed where there is no GPU to ask, that is in the interpreter; an H100's.
_DEFAULT_PROCESSORS = 132


class _Tiles(NamedTuple):
    """Constants of the attention kernel.

    Attributes:
        rows: (query row, head of the group) pairs in a tile; at least tl.dot's 16.
        keys: in a tile of K or V.
        dim: head_dim, padded to a power of two.
        num_warps: of a program.
        num_stages: of the software pipeline.
    """

    rows: int
    keys: int
    dim: int
    num_warps: int
    num_stages: int


@lru_cache
def _tiles(head_dim: int, group: int, itemsize: int, decode: bool) -> _Tiles:
    """Chosen by what the compiled kernels take on compute capability 9.0 and 8.6, not tuned on any GPU yet.

    Decodes wait for memory: small tiles, of which two are in flight. That takes five stages, because the loads of K and
    V depend on the block table, whose own load takes up every other one. Chunks compute: larger tiles, one in flight.
    At 16 bit and head_dim 128 a program takes 38 and 80 KiB of shared memory, so five and two share an H100's SM.
    """
    dim = max(16, triton.next_power_of_2(head_dim))
    tile_bytes = 8192 if decode else 16384
    keys = min(64, max(16, tile_bytes // (dim * itemsize)))
    # A step with chunks also has decodes, which waste a large tile: 64 rows is between what suits either. fp32 doesn't
    # run on tensor cores, and spills from 64 rows on.
    rows = 16 if decode or itemsize == 4 else 64
    rows = max(rows, triton.next_power_of_2(group))
    return _Tiles(rows, keys, dim, num_warps=8 if rows * dim > 64 * 128 else 4, num_stages=5 if decode else 3)


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
    num_splits: int | None = None,
) -> Tensor:
    """See `attention.paged_attention`.

    `num_splits` overrides into how many parts, at most 32, contexts are split.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, _, block_size, _ = k_cache.shape
    num_seqs = context_lens.shape[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0 or num_seqs == 0:
        return out
    group = num_heads // num_kv_heads
    decode = max_query_len <= 1
    tiles = _tiles(head_dim, group, q.element_size(), decode)
    # Sequence n begins at tile query_starts[n] // rows_per_tile + n: never too few, at most one too many each.
    grid_tiles = num_seqs if decode else num_tokens // (tiles.rows // group) + num_seqs
    if num_splits is None:
        visible = min(max_context_len, window) if window else max_context_len
        num_splits = _choose_splits(q.device, grid_tiles * num_kv_heads, visible)
    split = num_splits > 1
    dependent = decode and launches_dependently(q.device)
    # Unused without splits, but an argument needs some tensor.
    partial, stats = out, out
    if split:
        partial = torch.empty((num_tokens, num_heads, num_splits, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((num_tokens, num_heads, num_splits, 2), dtype=torch.float32, device=q.device)
    _paged_attention_kernel[(grid_tiles, num_kv_heads, num_splits)](
        out,
        partial,
        stats,
        q,
        k_cache,
        v_cache,
        query_starts,
        context_lens,
        block_tables,
        num_seqs,
        block_tables.stride(0),
        *q.stride(),
        k_cache.stride(0),
        scale,
        WINDOW=window,
        SOFTCAP=softcap,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE_ROWS=tiles.rows,
        TILE_KEYS=tiles.keys,
        PADDED_DIM=tiles.dim,
        PADDED_SEQS=1 if decode else max(64, triton.next_power_of_2(num_seqs)),
        DECODE=decode,
        SPLIT=split,
        DEPENDENT=dependent,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        launch_pdl=dependent,
    )
    if split:
        _join_splits_kernel[(num_tokens, num_heads)](
            out,
            partial,
            stats,
            query_starts,
            num_seqs,
            num_splits,
            HEAD_DIM=head_dim,
            PADDED_DIM=tiles.dim,
            PADDED_SPLITS=triton.next_power_of_2(num_splits),
            DEPENDENT=dependent,
            num_warps=4,
            launch_pdl=dependent,
        )
    return out


def _choose_splits(device: torch.device, num_programs: int, num_keys: int) -> int:
    """Parts of each context, so that the GPU is filled."""
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        processors = _DEFAULT_PROCESSORS
    return max(1, min(_PROGRAMS_PER_PROCESSOR * processors // num_programs, num_keys // _MIN_SPLIT_KEYS, _MAX_SPLITS))


# Not specialized: what varies from step to step would compile anew when it becomes 1 or a multiple of 16.
@triton.jit(do_not_specialize=["num_seqs", "block_tables_stride"])
def _paged_attention_kernel(
    out_ptr,
    partial_ptr,
    stats_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    query_starts_ptr,
    context_lens_ptr,
    block_tables_ptr,
    num_seqs,
    block_tables_stride,
    q_stride_token,
    q_stride_head,
    q_stride_dim,
    cache_stride_head,
    scale,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_SEQS: tl.constexpr,
    DECODE: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Attend: out[row, head] = sum_j softmax_j(q . k_j * scale) v_j over the keys j that the row sees.

    Grid: (tiles, num_kv_heads, splits). DECODE: no sequence has more than one row, and tile n is sequence n. SPLIT:
    each program writes the sums of its share of the keys to `partial` and (maximum, normalizer) to `stats`.
    """
    begin(DEPENDENT)
    QUERIES: tl.constexpr = TILE_ROWS // GROUP
    kv_head = tl.program_id(1)
    if DECODE:
        seq = tl.program_id(0)
        first_query = 0
    else:
        tile = tl.program_id(0)
        seqs = tl.arange(0, PADDED_SEQS)
        starts = tl.load(query_starts_ptr + seqs, mask=seqs < num_seqs, other=0)
        begun = (seqs < num_seqs) & (starts // QUERIES + seqs <= tile)
        seq = tl.sum(begun.to(tl.int32), axis=0) - 1
        first_query = (tile - (tl.load(query_starts_ptr + seq) // QUERIES + seq)) * QUERIES
    start = tl.load(query_starts_ptr + seq)
    query_len = tl.load(query_starts_ptr + seq + 1) - start
    context_len = tl.load(context_lens_ptr + seq)
    wait(DEPENDENT)
    if first_query >= query_len:
        return

    # Row i of the tile is query first_query + i // GROUP and head i % GROUP of the group.
    rows = tl.arange(0, TILE_ROWS)
    queries = first_query + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    row_mask = (rows < QUERIES * GROUP) & (queries < query_len)
    tokens = (start + queries).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    dim_mask = dims < HEAD_DIM
    q = tl.load(
        q_ptr
        + (tokens * q_stride_token + heads.to(tl.int64) * q_stride_head)[:, None]
        + (dims * q_stride_dim)[None, :],
        mask=row_mask[:, None] & dim_mask[None, :],
        other=0.0,
    )

    # Keys [low, high) are seen by some row of the tile; what is outside may belong to others, and is not loaded.
    first_position = context_len - query_len + first_query
    positions = first_position + rows // GROUP
    high = first_position + tl.minimum(QUERIES, query_len - first_query)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(0, first_position - WINDOW + 1)
    first_tile = low // TILE_KEYS
    end_tile = tl.cdiv(high, TILE_KEYS)
    if SPLIT:
        share = tl.cdiv(end_tile - first_tile, tl.num_programs(2))
        first_tile += tl.program_id(2) * share
        end_tile = tl.minimum(first_tile + share, end_tile)

    table_ptr = block_tables_ptr + seq.to(tl.int64) * block_tables_stride
    k_head_ptr = k_cache_ptr + kv_head.to(tl.int64) * cache_stride_head
    v_head_ptr = v_cache_ptr + kv_head.to(tl.int64) * cache_stride_head
    maximum = tl.full((TILE_ROWS,), _LOWEST, tl.float32)
    normalizer = tl.zeros((TILE_ROWS,), tl.float32)
    acc = tl.zeros((TILE_ROWS, PADDED_DIM), tl.float32)
    for key_tile in range(first_tile, end_tile):
        keys = key_tile * TILE_KEYS + tl.arange(0, TILE_KEYS)
        key_mask = (keys >= low) & (keys < high)
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=key_mask, other=0).to(tl.int64)
        entries = (blocks * BLOCK_SIZE + keys % BLOCK_SIZE) * HEAD_DIM
        offsets = entries[:, None] + dims[None, :]
        load_mask = key_mask[:, None] & dim_mask[None, :]
        k = tl.load(k_head_ptr + offsets, mask=load_mask, other=0.0)
        v = tl.load(v_head_ptr + offsets, mask=load_mask, other=0.0)

        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP > 0:
            # tanh(x) = 1 - 2 / (e^2x + 1): exact at both ends, and there is no portable tl.tanh.
            scores = SOFTCAP - 2 * SOFTCAP / (tl.exp2(scores * (2 * _LOG2E / SOFTCAP)) + 1)
        visible = key_mask[None, :] & (keys[None, :] <= positions[:, None])
        if WINDOW > 0:
            visible &= keys[None, :] > positions[:, None] - WINDOW
        scores = tl.where(visible, scores * _LOG2E, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        correction = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum[:, None])
        normalizer = normalizer * correction + tl.sum(weights, axis=1)
        acc = acc * correction[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = new_maximum

    out_rows = tokens * (tl.num_programs(1) * GROUP) + heads
    if SPLIT:
        out_rows = out_rows * tl.num_programs(2) + tl.program_id(2)
        tl.store(stats_ptr + out_rows * 2, maximum, mask=row_mask)
        tl.store(stats_ptr + out_rows * 2 + 1, normalizer, mask=row_mask)
        out = acc
        target_ptr = partial_ptr
    else:
        # A row past the sequence's end may see no key; it is not stored.
        out = acc / tl.where(row_mask, normalizer, 1.0)[:, None]
        target_ptr = out_ptr
    tl.store(
        target_ptr + out_rows[:, None] * HEAD_DIM + dims[None, :],
        out.to(target_ptr.dtype.element_ty),
        mask=row_mask[:, None] & dim_mask[None, :],
    )


@triton.jit(do_not_specialize=["num_seqs", "num_splits"])
def _join_splits_kernel(
    out_ptr,
    partial_ptr,
    stats_ptr,
    query_starts_ptr,
    num_seqs,
    num_splits,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Join splits: out = sum_s 2^(m_s - m) acc_s / sum_s 2^(m_s - m) l_s with m = max_s m_s.

    Grid: (num_tokens, num_heads). Rows that no sequence owns stay as they are.
    """
    begin(DEPENDENT)
    owned = tl.load(query_starts_ptr + num_seqs)
    wait(DEPENDENT)
    if tl.program_id(0) >= owned:
        return
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    splits = tl.arange(0, PADDED_SPLITS)
    dims = tl.arange(0, PADDED_DIM)
    split_mask = splits < num_splits
    split_rows = row * num_splits + splits
    maximum = tl.load(stats_ptr + split_rows * 2, mask=split_mask, other=_LOWEST)
    normalizer = tl.load(stats_ptr + split_rows * 2 + 1, mask=split_mask, other=0.0)
    weights = tl.exp2(maximum - tl.max(maximum, axis=0))
    partial = tl.load(
        partial_ptr + split_rows[:, None] * HEAD_DIM + dims[None, :],
        mask=split_mask[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    out = tl.sum(partial * weights[:, None], axis=0) / tl.sum(normalizer * weights, axis=0)
    tl.store(out_ptr + row * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
