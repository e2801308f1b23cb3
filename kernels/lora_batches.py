"""How the CPU's LoRA computes the rows of slots of equal ranks: in one batched matmul, or one adapter at a time.

Where adapters lie evenly spaced in the arena, one batched matmul computes them:

- of rows that lie in the order of the adapters, as those of plain adapters do, equally many for each, in place;
- of others, as compositions have, gathered, with padding for adapters with fewer rows, and for those that lie in
  between but have none. What is computed for padding is dropped.

The rest runs one adapter at a time: for plain adapters in place, since padding and gathering would cost more than that.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Most rows of a batched matmul, padding included, for each row that is wanted.
_MAX_PADDED = 1.5
# A batched matmul of fewer adapters takes as long as their own.
_MIN_TOGETHER = 3


class Batch(NamedTuple):
    """Slots of equal ranks whose rows are computed together.

    Attributes:
        ranks: of the slices.
        positions: where the slots' site blocks start, in elements after the first adapted slot's.
        together: in one batched matmul, of equally many rows for each position; else in one for each.
        step: distance of the positions, where those of a batched matmul can be read in place; else None.
        taken: the rows of x, position by position; where a slice, there may be other rows between those of two.
        sections: how many of the taken rows belong to each position, or, see `parts`, to none.
        parts: which sections are the positions'; None: all are.
        kept: int64, which of the taken rows are wanted; None: all.
        rows: int64, the wanted rows, a row of several slots several times; None: the slice `taken`.
        distinct: the rows once each, and for each of `rows` its place there; int64. For 16-bit types, whose sums are
            made in fp32; else None.
        weights: float32 [taken rows, 1], factors of h; None: all 1.
    """

    ranks: tuple[int, ...]
    positions: list[int]
    together: bool
    step: int | None
    taken: slice | Tensor
    sections: list[int]
    parts: list[int] | None
    kept: Tensor | None
    rows: Tensor | None
    distinct: tuple[Tensor, Tensor] | None
    weights: Tensor | None


class Group(NamedTuple):
    """Rows of one slot, ascending, and where its block starts."""

    position: int
    rows: Sequence[int]
    weights: Sequence[float]

    @property
    def is_range(self) -> bool:
        """Whether no other row is between them."""
        return self.rows[-1] - self.rows[0] + 1 == len(self.rows)


def make_batches(ranks: tuple[int, ...], groups: Sequence[Group], dtype: torch.dtype) -> list[Batch]:
    """Divides the rows of slots that have the same ranks.

    Args:
        ranks: of the slices.
        groups: one for each slot.
        dtype: of the arena.
    """
    groups = sorted(groups, key=lambda group: group.rows[0])
    if dtype != torch.float32:  # weights are copied anyway, to convert them, wherever they lie
        return [_gathered(ranks, groups, together=_is_dense(groups), rounds=True)]
    return _all_in_place(ranks, groups) if _are_disjoint(groups) else _all_gathered(ranks, groups)


def make_long_batch(ranks: tuple[int, ...], position: int, rows: range, weight: float) -> Batch:
    """A matmul of its own for rows of one slot that are beside each other."""
    return _in_place(ranks, [Group(position, rows, [weight] * len(rows))])


def _all_in_place(ranks: tuple[int, ...], groups: Sequence[Group]) -> list[Batch]:
    """For fp32 groups that are ranges of rows, in the order of their rows."""
    batches: list[Batch] = []
    rest: list[Group] = []
    runs = [[groups[0]]]
    for group in groups[1:]:
        run = runs[-1]
        step = _step(run[-1], group)
        if step is not None and (len(run) == 1 or step == _step(run[-2], run[-1])):
            run.append(group)
        elif step is not None and len(run) == 2:
            runs.append([run.pop(), group])
        else:
            runs.append([group])
    for run in runs:
        if len(run) < _MIN_TOGETHER:
            rest += run
        else:
            batches.append(_gathered(ranks, run, together=True, rounds=False))
    return [*batches, _in_place(ranks, rest)] if rest else batches


def _all_gathered(ranks: tuple[int, ...], groups: Sequence[Group]) -> list[Batch]:
    """For fp32 groups of any rows."""
    batches: list[Batch] = []
    rest: list[Group] = []
    groups = sorted(groups, key=lambda group: group.position)
    unit = min((b.position - a.position for a, b in pairwise(groups)), default=0)
    runs = [[groups[0]]]
    for before, group in pairwise(groups):
        if group.position - before.position in (unit, 2 * unit):
            runs[-1].append(group)
        else:
            runs.append([group])
    for run in runs:
        by_position = {group.position: group for group in run}
        places = range(run[0].position, run[-1].position + 1, unit or 1)
        filled = [by_position.get(position, Group(position, (), ())) for position in places]
        if len(run) < _MIN_TOGETHER or not _is_dense(filled):
            rest += run
        else:
            batches.append(_gathered(ranks, filled, together=True, rounds=False))
    return [*batches, _gathered(ranks, rest, together=False, rounds=False)] if rest else batches


def _in_place(ranks: tuple[int, ...], groups: Sequence[Group]) -> Batch:
    """A matmul for each of some disjoint ranges of rows, in their order."""
    first, end = groups[0].rows[0], groups[-1].rows[-1] + 1
    sections: list[int] = []
    parts: list[int] = []
    weights = [1.0] * (end - first)
    before = first
    for group in groups:
        start = group.rows[0]
        if start > before:
            sections.append(start - before)
        parts.append(len(sections))
        sections.append(len(group.rows))
        before = start + len(group.rows)
        weights[start - first : before - first] = group.weights
    positions = [group.position for group in groups]
    taken = slice(first, end)
    if len(parts) == len(sections):
        return Batch(ranks, positions, False, None, taken, sections, None, None, None, None, _column(weights))
    rows = torch.tensor([row for group in groups for row in group.rows])
    return Batch(ranks, positions, False, None, taken, sections, parts, rows - first, rows, None, _column(weights))


def _gathered(ranks: tuple[int, ...], groups: Sequence[Group], *, together: bool, rounds: bool) -> Batch:
    """Rows of any place; of groups computed together as many for each as the longest has."""
    lengths = [len(group.rows) for group in groups]
    if together:
        lengths = [max(lengths)] * len(groups)
    taken: list[int] = []
    weights: list[float] = []
    kept: list[int] = []
    padding_row = next(group.rows[0] for group in groups if group.rows)  # any that may be read
    for group, length in zip(groups, lengths, strict=True):
        padding = length - len(group.rows)
        kept += range(len(taken), len(taken) + len(group.rows))
        taken += [*group.rows, *([padding_row] * padding)]
        weights += [*group.weights, *([1.0] * padding)]
    positions = [group.position for group in groups]
    step = _spacing(positions) if together else None
    is_padded = len(kept) < len(taken)
    column = _column(weights)
    if not is_padded and all(b - a == 1 for a, b in pairwise(taken)):
        beside = slice(taken[0], taken[-1] + 1)
        return Batch(ranks, positions, together, step, beside, lengths, None, None, None, None, column)
    rows = [taken[i] for i in kept]
    distinct = None
    if rounds:
        places = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        distinct = torch.tensor(list(places)), torch.tensor([places[row] for row in rows])
    return Batch(
        ranks,
        positions,
        together,
        step,
        torch.tensor(taken),
        lengths,
        None,
        torch.tensor(kept) if is_padded else None,
        torch.tensor(rows),
        distinct,
        column,
    )


def _column(weights: Sequence[float]) -> Tensor | None:
    return torch.tensor(weights).unsqueeze(1) if any(weight != 1.0 for weight in weights) else None


def _step(a: Group, b: Group) -> int | None:
    """How far b's block is behind a's, where its rows are as many and right behind a's; None elsewhere."""
    is_next = b.rows[0] == a.rows[-1] + 1 and len(a.rows) == len(b.rows) and b.position > a.position
    return b.position - a.position if is_next else None


def _spacing(positions: Sequence[int]) -> int | None:
    """The distance from each position to the next, where it is the same for all and not negative."""
    steps = {b - a for a, b in pairwise(positions)}
    step = steps.pop() if len(steps) == 1 else -1
    return step if step >= 0 else None


def _are_disjoint(groups: Sequence[Group]) -> bool:
    """Whether groups in the order of their rows are ranges that do not overlap."""
    return all(group.is_range for group in groups) and all(a.rows[-1] < b.rows[0] for a, b in pairwise(groups))


def _is_dense(groups: Sequence[Group]) -> bool:
    """Whether a batched matmul of the groups has little padding."""
    lengths = [len(group.rows) for group in groups]
    return len(groups) >= 2 and len(lengths) * max(lengths) <= _MAX_PADDED * sum(lengths)
