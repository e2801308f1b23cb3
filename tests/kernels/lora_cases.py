"""Inputs for the LoRA operators in which everything that must not be read is NaN, and what must hold of the outputs."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lorikeet.kernels.lora_reference import lora_expand_reference_, lora_shrink_reference
from torch import Tensor

Shrink = Callable[..., Tensor]
Expand = Callable[..., None]


@dataclass(frozen=True)
class LoraCase:
    """Arguments of both operators.

    Attributes:
        x: [num_tokens, in_features], NaN in the rows that no segment owns.
        y: [num_tokens, sum of slice_widths], likewise.
        arena: NaN outside the blocks of slots that the segments use.
        tables: offsets, ranks, seg_starts, seg_slots.
        slice_widths: of the site.
        weights: float32, one a segment, NaN for those of the base.
    """

    x: Tensor
    y: Tensor
    arena: Tensor
    tables: tuple[Tensor, Tensor, Tensor, Tensor]
    slice_widths: list[int]
    weights: Tensor

    @property
    def num_rows(self) -> int:
        """Rows that segments own."""
        return int(self.tables[2][-1])

    @property
    def max_rank(self) -> int:
        """One more than is needed, so that a column is left over."""
        return int(self.tables[1].sum(dim=1).max()) + 1

    def row_ranks(self) -> list[list[int]]:
        """Ranks of the slices for each row; zeros for base rows."""
        _, ranks, starts, slots = self.tables
        rows: list[list[int]] = []
        for g, slot in enumerate(slots.tolist()):
            slice_ranks = ranks[slot].tolist() if slot >= 0 else [0] * len(self.slice_widths)
            rows += [slice_ranks] * int(starts[g + 1] - starts[g])
        return rows


def make_case(
    segments: Sequence[tuple[int, int]],
    *,
    in_features: int = 48,
    slice_widths: Sequence[int] = (33, 5, 192),
    ranks: Sequence[Sequence[int]] = ((4, 0, 2), (1, 1, 1), (16, 8, 64), (0, 0, 0), (8, 8, 8)),
    dtype: torch.dtype = torch.float32,
    padding_rows: int = 3,
    aligned: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> LoraCase:
    """Builds a case of the given (slot, rows) segments; `ranks[slot]` are the slot's ranks.

    Blocks lie in shuffled order with gaps, at odd offsets unless `aligned`, in which case they lie in order, evenly
    spaced. A last slot that no segment uses has a rank, and a block of NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    slot_ranks = torch.tensor([*ranks, [1] * len(slice_widths)], dtype=torch.int32)
    widths = torch.tensor(slice_widths)
    sizes = (slot_ranks.sum(dim=1) * in_features + (slot_ranks * widths).sum(dim=1)).tolist()
    order = list(range(len(sizes)))
    if not aligned:
        random.Random(seed).shuffle(order)
    offsets = torch.zeros(len(sizes), dtype=torch.int64)
    end = 0
    for slot in order:
        end = -(-end // 64) * 64 if aligned else end + 3 + end % 2  # always odd without `aligned`
        offsets[slot] = end
        end += sizes[slot]
    arena = torch.full((end + 5,), torch.nan, dtype=torch.float32)
    for slot in {slot for slot, rows in segments if slot >= 0 and rows > 0}:
        size_a = int(slot_ranks[slot].sum()) * in_features
        block = arena[int(offsets[slot]) : int(offsets[slot]) + sizes[slot]]
        block[:size_a] = torch.randn(size_a, generator=generator) * in_features**-0.5
        block[size_a:] = torch.randn(sizes[slot] - size_a, generator=generator) / 4
    offsets[slot_ranks.sum(dim=1) == 0] = -1

    starts = torch.tensor([0, *(rows for _, rows in segments)]).cumsum(0).to(torch.int32)
    num_rows = int(starts[-1])
    x = torch.full((num_rows + padding_rows, in_features), torch.nan)
    y = torch.full((num_rows + padding_rows, sum(slice_widths)), torch.nan)
    x[:num_rows] = torch.randn(num_rows, in_features, generator=generator)
    y[:num_rows] = torch.randn(num_rows, sum(slice_widths), generator=generator)
    y[:num_rows, ::7] = -0.0  # adding 0.0 to it would flip its sign: no bit may change where no adapter adds
    slots = torch.tensor([slot for slot, _ in segments], dtype=torch.int32)
    weights = torch.randn(len(segments), generator=generator).masked_fill_(slots < 0, torch.nan)
    return LoraCase(
        x.to(device, dtype),
        y.to(device, dtype),
        arena.to(device, dtype),
        (offsets.to(device), slot_ranks.to(device), starts.to(device), slots.to(device)),
        list(slice_widths),
        weights.to(device),
    )


def assert_equals_reference(
    case: LoraCase, shrink: Shrink, expand_: Expand, tolerance: tuple[float, float], max_rank: int | None = None
) -> None:
    """Runs both operators, shrink with and without weights, and compares them with the reference.

    Base rows and slices of rank 0 must come out equal bit for bit, rows of no segment untouched, and nothing that is
    NaN in the case or outside h's defined columns may reach a result.
    """
    atol, rtol = tolerance
    max_rank = case.max_rank if max_rank is None else max_rank
    expected_h = lora_shrink_reference(case.x, case.arena, *case.tables, max_rank)
    h = shrink(case.x, case.arena, *case.tables, max_rank).sum(dim=0)
    assert h.shape == expected_h.shape and h.dtype == torch.float32
    torch.testing.assert_close(h, expected_h, atol=1e-4, rtol=1e-4)
    weighted_h = shrink(case.x, case.arena, *case.tables, max_rank, case.weights).sum(dim=0)
    expected_weighted_h = lora_shrink_reference(case.x, case.arena, *case.tables, max_rank, case.weights)
    torch.testing.assert_close(weighted_h, expected_weighted_h, atol=1e-4, rtol=1e-4)

    # What h holds outside the slot's columns must not matter to expand.
    poisoned = torch.full_like(expected_h, torch.nan)
    untouched = torch.ones(case.y.shape, dtype=torch.bool)
    for row, slice_ranks in enumerate(case.row_ranks()):
        assert (h[row, sum(slice_ranks) :] == 0).all()
        poisoned[row, : sum(slice_ranks)] = expected_h[row, : sum(slice_ranks)]
        columns = [torch.full((w,), r == 0) for r, w in zip(slice_ranks, case.slice_widths, strict=True)]
        untouched[row] = torch.cat(columns)

    expected_y = case.y.clone()
    lora_expand_reference_(expected_y, poisoned, case.arena, *case.tables, case.slice_widths, case.x.shape[1])
    y = case.y.clone()
    expand_(y, poisoned.unsqueeze(0), case.arena, *case.tables, case.slice_widths, case.x.shape[1])
    untouched = untouched.to(y.device)
    assert torch.equal(bits(y)[untouched], bits(case.y)[untouched])
    torch.testing.assert_close(y[~untouched], expected_y[~untouched], atol=atol, rtol=rtol)


def bits(values: Tensor) -> Tensor:
    """The values as integers, so that a NaN equals itself."""
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)
