"""LoRA for CPU: batched matmuls where adapters lie evenly spaced, else one for each adapter; see `lora_groups`.

Everything is computed in fp32 whatever the dtype of the model, which rounds once instead of twice: without AVX512-BF16
MKL's sgemm on converted weights beats bf16 matmuls of any number of rows.

Microseconds of CPU time for the four sites of a layer of the demo base (576 -> 576 + 192 + 192, 576 -> 576,
576 -> 1536 + 1536, 1536 -> 576) at rank 16 in fp32, against the same segment by segment and pass by pass with batched
matmuls for evenly spaced adapters of one pass only (commit 8fca53c). Least of five rounds in which both took turns over
six layers, one thread on 2 cores of an AMD EPYC (Zen 3, AVX2) that others used too, torch 2.13, 2026-11-22; expect
+-30 %:

    8 adapters, 8 rows and 32, evenly spaced                           825, 1222   against 1039, 1388
    8 of 12 adapters, 8 rows and 32                                   1560, 1798   against 1715, 1920
    8 of 32 adapters, 8 rows and 32                                   1306, 1576   against 1705, 2036
    8 adapters with 11, 6, 4, 3, 3, 2, 2, 1 rows                            1455   against       2401
    32 adapters, 32 rows                                                    2137   against       2511
    sums of two: random pairs of 8 adapters, 8 rows and 32            1422, 2274   against 2793, 6285
    sums of two: random pairs of 8 of 32 adapters, 32 rows                  2754   against       6974
    sums of two: neighbours of 4 adapters, 6 rows and 26               942, 1843   against 3100, 3090
    the first of those neighbours only                                 733,  921   against 1327, 1539
    one adapter, 512 rows                                                   3143   against       3008
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .lora_batches import Batch
from .lora_groups import AdaptedRows, Piece


class _Blocks(NamedTuple):
    """The site blocks of a step's slots.

    Attributes:
        arena: [num_elements].
        first: where the block at position 0 starts, in elements of the arena.
    """

    arena: Tensor
    first: int

    def each(self, batch: Batch, start: int, shape: tuple[int, int], strides: tuple[int, int]) -> list[Tensor]:
        """For each position the fp32 matrix that starts `start` elements into its block."""
        origin = self.arena.storage_offset() + self.first + start
        views = [self.arena.as_strided(shape, strides, origin + position) for position in batch.positions]
        return views if self.arena.dtype == torch.float32 else [view.float() for view in views]

    def together(self, batch: Batch, start: int, shape: tuple[int, int]) -> Tensor:
        """The same as one tensor [num_positions, *shape] with contiguous rows; no copy where it is fp32 and even."""
        count, size = len(batch.positions), shape[0] * shape[1]
        if batch.step is not None:
            origin = self.arena.storage_offset() + self.first + batch.positions[0] + start
            return self.arena.as_strided((count, *shape), (batch.step, shape[1], 1), origin).float()
        # Row i of this view is arena[i : i + size], so that one call gathers blocks that start anywhere.
        windows = self.arena.as_strided((self.arena.shape[0] - size + 1, size), (1, 1))
        starts = torch.tensor(batch.positions) + (self.first + start)
        return windows.index_select(0, starts).float().view(count, *shape)


def lora_add_(
    y: Tensor, x: Tensor, arena: Tensor, offsets: Tensor, ranks: Tensor, rows: AdaptedRows, slice_widths: Sequence[int]
) -> None:
    """Adds weight * B A x to y in place for all pieces of `rows`; no other row is read or written.

    Args:
        y: [num_tokens, sum of slice_widths], dtype of arena, rows contiguous.
        x: [num_tokens, in_features], likewise.
        arena: [num_elements]; this and the next two as for `lora.lora_shrink`.
        offsets: [max_slots], int64.
        ranks: [max_slots, num_slices], int32.
        rows: of the step.
        slice_widths: output width of each slice.
    """
    site = rows.at_site(offsets.numpy(), ranks.numpy())
    if site is None:
        return
    blocks = _Blocks(arena, site.first)
    for batch in site.batches:
        _expand_(y, _shrink(x, blocks, batch), blocks, batch, slice_widths, x.shape[1])


def lora_shrink(
    x: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    max_rank: int,
    seg_weights: Tensor | None = None,
) -> Tensor:
    """See `lora.lora_shrink`."""
    h = torch.zeros(x.shape[0], max_rank)
    site = _adapted_rows(arena, seg_starts, seg_slots, seg_weights).at_site(offsets.numpy(), ranks.numpy())
    if site is None:
        return h
    blocks = _Blocks(arena, site.first)
    for batch in site.batches:
        product = _shrink(x, blocks, batch)
        rank = product.shape[1]
        if batch.rows is None:
            h[batch.taken, :rank] = product
        else:
            h[:, :rank].index_copy_(0, batch.rows, _kept(product, batch))
    return h


def lora_expand_(
    y: Tensor,
    h: Tensor,
    arena: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    seg_starts: Tensor,
    seg_slots: Tensor,
    slice_widths: Sequence[int],
    in_features: int,
) -> None:
    """See `lora.lora_expand_`."""
    site = _adapted_rows(arena, seg_starts, seg_slots, None).at_site(offsets.numpy(), ranks.numpy())
    if site is None:
        return
    blocks = _Blocks(arena, site.first)
    for batch in site.batches:
        _expand_(y, _take(h, batch)[:, : sum(batch.ranks)], blocks, batch, slice_widths, in_features)


def _adapted_rows(arena: Tensor, seg_starts: Tensor, seg_slots: Tensor, seg_weights: Tensor | None) -> AdaptedRows:
    starts, slots = seg_starts.tolist(), seg_slots.tolist()
    weights = [1.0] * len(slots) if seg_weights is None else seg_weights.tolist()
    pieces = map(Piece, slots, starts, starts[1:], weights)
    return AdaptedRows((piece for piece in pieces if piece.slot >= 0 and piece.end > piece.start), arena.dtype)


def _shrink(x: Tensor, blocks: _Blocks, batch: Batch) -> Tensor:
    """Computes h of the taken rows: [taken rows, sum of ranks], fp32; undefined for those of no position."""
    rank, in_features = sum(batch.ranks), x.shape[1]
    rows = _take(x, batch).float()
    if batch.together:
        lora_a = blocks.together(batch, 0, (rank, in_features))
        h = torch.bmm(rows.view(len(batch.positions), -1, in_features), lora_a.transpose(1, 2)).view(-1, rank)
    else:
        h = rows.new_empty(rows.shape[0], rank)
        lora_a_t = blocks.each(batch, 0, (in_features, rank), (1, in_features))
        for part_h, part, matrix in zip(_parts(h, batch), _parts(rows, batch), lora_a_t, strict=True):
            torch.mm(part, matrix, out=part_h)
    if batch.weights is not None:
        h *= batch.weights
    return h


def _expand_(
    y: Tensor, h: Tensor, blocks: _Blocks, batch: Batch, slice_widths: Sequence[int], in_features: int
) -> None:
    start = sum(batch.ranks) * in_features
    column = first_rank = 0
    for rank, width in zip(batch.ranks, slice_widths, strict=True):
        if rank > 0:
            slice_h = h[:, first_rank : first_rank + rank]
            slice_y = y[:, column : column + width]
            if batch.together:
                lora_b_t = blocks.together(batch, start, (rank, width))
                delta = torch.bmm(slice_h.view(len(batch.positions), -1, rank), lora_b_t)
                _add_(slice_y, delta.view(-1, width), batch)
            else:
                _expand_each_(slice_y, slice_h, blocks.each(batch, start, (rank, width), (width, 1)), batch)
            start += rank * width
            first_rank += rank
        column += width


def _expand_each_(slice_y: Tensor, slice_h: Tensor, lora_b_t: list[Tensor], batch: Batch) -> None:
    if isinstance(batch.taken, slice) and slice_y.dtype == torch.float32:
        parts = zip(_parts(slice_y[batch.taken], batch), _parts(slice_h, batch), lora_b_t, strict=True)
        for part_y, part_h, matrix in parts:
            part_y.addmm_(part_h, matrix)
        return
    delta = slice_h.new_empty(slice_h.shape[0], slice_y.shape[1])
    for part, part_h, matrix in zip(_parts(delta, batch), _parts(slice_h, batch), lora_b_t, strict=True):
        torch.mm(part_h, matrix, out=part)
    _add_(slice_y, delta, batch)


def _parts(taken: Tensor, batch: Batch) -> Sequence[Tensor]:
    """The rows of each position."""
    sections = taken.split_with_sizes(batch.sections)
    return sections if batch.parts is None else [sections[i] for i in batch.parts]


def _take(matrix: Tensor, batch: Batch) -> Tensor:
    return matrix[batch.taken] if isinstance(batch.taken, slice) else matrix.index_select(0, batch.taken)


def _kept(matrix: Tensor, batch: Batch) -> Tensor:
    return matrix if batch.kept is None else matrix.index_select(0, batch.kept)


def _add_(slice_y: Tensor, delta: Tensor, batch: Batch) -> None:
    """Adds the product of the taken rows to their rows of y."""
    if batch.rows is None:
        slice_y[batch.taken] += delta
        return
    delta = _kept(delta, batch)
    if batch.distinct is None:
        slice_y.index_add_(0, batch.rows, delta)
    else:
        rows, places = batch.distinct
        total = slice_y.index_select(0, rows).float().index_add_(0, places, delta)
        slice_y.index_copy_(0, rows, total.to(slice_y.dtype))
