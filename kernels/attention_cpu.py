"""Paged attention for CPU: decodes of a step run in a few batches, other sequences one by one in tiles of query rows.

The query heads that share a KV head are rows of one matmul; repeating KV for them instead (`enable_gqa`) takes five
times as long at 9 heads over 3. Everything is computed in fp32: the gathered copies of K and V are converted, which
costs less than 16-bit matmuls of a few rows do without AVX512-BF16, and rounds once.

Which rows, blocks and masks a step needs is the same for all its layers. It is planned by `_plan`, a pure function of
the *values* of the step's tables that remembers its last results, so it can't be stale however the tables were filled.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Elements of K that a batch gathers at most: with V and the scores it then stays in the last-level cache, and the heap
# gives the same pages again instead of mapping new ones.
_MAX_GATHERED = 1 << 19
# A batch of decodes ends where padding the next sequence to its longest would gather more elements of K for nothing
# than the calls of another batch are worth.
_MAX_PADDING = 1 << 15
# Query rows of a prefill chunk that attend together; each such tile computes only the keys that one of its rows sees.
_TILE_ROWS = 64
# A step has one plan for each window size among the layers.
_REMEMBERED_PLANS = 4


class _Decodes(NamedTuple):
    """Single-row sequences that run as one batch of B, padded to L gathered positions each.

    Attributes:
        rows: int64 [B], their rows of the flat step batch.
        blocks: int64 [num_kv_heads * B * L / block_size], rows of the cache seen as [num_kv_heads * num_blocks, ...].
        bias: float32 [B, 1, L], 0 where the key is visible and -inf elsewhere.
        hidden: int64 [n], which of the B * L positions are not visible.
    """

    rows: Tensor
    blocks: Tensor
    bias: Tensor
    hidden: Tensor


class _Chunk(NamedTuple):
    """A sequence with several rows.

    Attributes:
        start: first row of the flat step batch.
        end: row after the last.
        blocks: int64, as in `_Decodes`, of the blocks that hold the visible keys.
        position: of row `start` among the gathered keys.
        first: first gathered key that row `start` sees.
    """

    start: int
    end: int
    blocks: Tensor
    position: int
    first: int


def kv_write_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_slots: Tensor) -> None:
    """See `attention.kv_write_`."""
    if kv_slots.shape[0] > 0 and int(kv_slots.min()) < 0:
        kept = (kv_slots >= 0).nonzero().squeeze(1)
        k, v, kv_slots = k.index_select(0, kept), v.index_select(0, kept), kv_slots.index_select(0, kept)
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
    decodes, chunks = _plan(
        query_starts.numpy().tobytes(),
        context_lens.numpy().tobytes(),
        block_tables.numpy().tobytes(),
        tuple(k_cache.shape),
        window,
    )
    out = torch.empty(q.shape, dtype=q.dtype)
    for batch in decodes:
        _attend_decodes(out, q, k_cache, v_cache, batch, scale, softcap)
    for chunk in chunks:
        _attend_chunk(out, q, k_cache, v_cache, chunk, scale, window, softcap)
    return out


def _attend_decodes(
    out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: _Decodes, scale: float, softcap: float
) -> None:
    num_kv_heads, _, _, head_dim = k_cache.shape
    count = batch.rows.shape[0]
    keys, values = _gather(k_cache, batch.blocks), _gather(v_cache, batch.blocks)
    if batch.hidden.shape[0] > 0:
        # -inf + NaN and 0 * NaN are NaN, so what nobody sees must not hold one.
        keys.view(num_kv_heads, -1, head_dim).index_fill_(1, batch.hidden, 0)
        values.view(num_kv_heads, -1, head_dim).index_fill_(1, batch.hidden, 0)
    shape = (num_kv_heads * count, -1, head_dim)
    queries = q.index_select(0, batch.rows).view(count, num_kv_heads, -1, head_dim).transpose(0, 1).float() * scale
    scores = torch.bmm(queries.reshape(shape), keys.view(shape).transpose(1, 2))
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    if batch.hidden.shape[0] > 0:
        scores.view(num_kv_heads, count, -1, batch.bias.shape[2]).add_(batch.bias)
    result = torch.bmm(scores.softmax(-1), values.view(shape)).view(num_kv_heads, count, -1, head_dim)
    out.index_copy_(0, batch.rows, result.transpose(0, 1).reshape(count, -1, head_dim).to(out.dtype))


def _attend_chunk(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    chunk: _Chunk,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    num_kv_heads, _, _, head_dim = k_cache.shape
    keys = _gather(k_cache, chunk.blocks).view(num_kv_heads, -1, head_dim)
    values = _gather(v_cache, chunk.blocks).view(num_kv_heads, -1, head_dim)
    for start in range(chunk.start, chunk.end, _TILE_ROWS):
        end = min(start + _TILE_ROWS, chunk.end)
        rows = end - start
        # All of [low, high) is seen by some row of the tile, so all of it was written.
        position = chunk.position + start - chunk.start
        low = max(chunk.first, position - window + 1) if window else chunk.first
        high = position + rows
        queries = q[start:end].float().view(rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        queries = (queries * scale).reshape(num_kv_heads, -1, head_dim)
        scores = torch.bmm(queries, keys[:, low:high].transpose(1, 2))
        if softcap:
            scores.div_(softcap).tanh_().mul_(softcap)
        # Row i of the tile is at `position + i`; the view has one [rows, keys] matrix for each query head.
        by_head = scores.view(num_kv_heads, -1, rows, high - low)
        by_head[..., position - low :].add_(torch.full((rows, rows), -torch.inf).triu_(1))
        if window:
            # Row i sees the columns from visible_from + i on.
            visible_from = position - window + 1 - low
            by_head.add_(torch.full((rows, high - low), -torch.inf).tril_(visible_from - 1))
        result = torch.bmm(scores.softmax(-1), values[:, low:high]).view(num_kv_heads, -1, rows, head_dim)
        out[start:end] = result.permute(2, 0, 1, 3).reshape(rows, -1, head_dim)


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """A float32 copy of some blocks of all heads: [len(blocks), block_size * head_dim]."""
    num_kv_heads, num_blocks, block_size, head_dim = cache.shape
    # Along dimension 0 a block is one contiguous copy; index_select along another costs twice as much.
    return cache.view(num_kv_heads * num_blocks, block_size * head_dim).index_select(0, blocks).float()


@lru_cache(maxsize=_REMEMBERED_PLANS)
def _plan(
    query_starts: bytes, context_lens: bytes, block_tables: bytes, cache_shape: tuple[int, int, int, int], window: int
) -> tuple[list[_Decodes], list[_Chunk]]:
    """What to gather, for all layers of one step; int32 tables as bytes, so that equal values are equal keys."""
    num_kv_heads, num_blocks, block_size, _ = cache_shape
    starts = np.frombuffer(query_starts, np.int32).astype(np.int64)
    contexts = np.frombuffer(context_lens, np.int32).astype(np.int64)
    tables = np.frombuffer(block_tables, np.int32).reshape(len(contexts), -1) if len(contexts) else np.zeros((0, 0))
    heads = np.arange(num_kv_heads)[:, None] * num_blocks
    rows = np.diff(starts)
    # First key that any row of the sequence sees, and the blocks [begins, ends) from there to the end of the context.
    firsts = np.maximum(contexts - rows - window + 1, 0) if window else np.zeros_like(contexts)
    begins, ends = firsts // block_size, -(-contexts // block_size)

    chunks = []
    for n in np.flatnonzero(rows > 1).tolist():
        base = int(begins[n]) * block_size
        chunks.append(
            _Chunk(
                start=int(starts[n]),
                end=int(starts[n + 1]),
                blocks=torch.from_numpy((heads + tables[n, begins[n] : ends[n]]).reshape(-1)),
                position=int(contexts[n] - rows[n]) - base,
                first=int(firsts[n]) - base,
            )
        )

    decodes = []
    for batch in _batches(np.flatnonzero(rows == 1), ends - begins, num_kv_heads * block_size * cache_shape[3]):
        longest = int((ends - begins)[batch[0]])
        # Past its end a sequence repeats its last block: a table's further entries may be anything.
        columns = np.minimum(begins[batch, None] + np.arange(longest), ends[batch, None] - 1)
        blocks = tables[batch[:, None], columns].reshape(-1)
        positions = begins[batch, None] * block_size + np.arange(longest * block_size)
        hidden = (positions < firsts[batch, None]) | (positions >= contexts[batch, None])
        decodes.append(
            _Decodes(
                rows=torch.from_numpy(starts[batch]),
                blocks=torch.from_numpy((heads + blocks).reshape(-1)),
                bias=torch.from_numpy(np.where(hidden, -np.inf, 0).astype(np.float32)).unsqueeze(1),
                hidden=torch.from_numpy(np.flatnonzero(hidden)),
            )
        )
    return decodes, chunks


def _batches(sequences: np.ndarray, num_blocks: np.ndarray, block_elements: int) -> list[np.ndarray]:
    """Splits sequences into batches of similar numbers of blocks, longest first."""
    ordered = sequences[np.argsort(-num_blocks[sequences], kind="stable")]
    lengths = num_blocks[ordered].tolist()
    batches = []
    begin = padding = 0
    for i, length in enumerate(lengths):
        padding += (lengths[begin] - length) * block_elements
        if i > begin and (padding > _MAX_PADDING or (i - begin + 1) * lengths[begin] * block_elements > _MAX_GATHERED):
            batches.append(ordered[begin:i])
            begin, padding = i, 0
    if lengths:
        batches.append(ordered[begin:])
    return batches
