"""The largest values of long rows on a CPU, without sorting whole rows. Imports no torch.

What torch has for that is scalar code on a CPU; NumPy's partitions, sorts and maxima are vectorized. One row of 49,152
on a core of an AMD EPYC (Zen 3, AVX2), torch 2.13.0, NumPy 2.4.6, least of many, 2026-11-23: torch's `max` with indices
120 us, NumPy's `argmax` 5; NumPy's whole sort 235, its partition 50, its maxima of 1,024 groups 7.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Columns = NDArray[np.int64]

# A row's columns are dealt out to so many groups. For more largest values than a quarter of that, or few columns in
# each, groups leave out too little.
_GROUPS: Final = 1024
# Of the mass outside of a nucleus so much may be left out of its candidates, and of a total so much tells nothing: sums
# in float32 must not make either matter.
_SHARE_LEFT_OUT: Final = 0.75
_ROUNDING: Final = 1e-5
# Fewer values, or a pass that leaves more than this share of them, are rather sorted than looked through again; and
# only this share of them is worth a copy of where they are.
_FEW: Final = 1024
_WORTHWHILE: Final = 0.75
_SHARE_OF_FEW: Final = 0.25
# So many values tell about where a nucleus ends, within four standard deviations of a rank in such a sample.
_SAMPLE: Final = 1024
_SAMPLE_ERROR: Final = 64


def columns_of_largest(row: Floats, count: int) -> Columns:
    """Where the `count` largest values are, values equal to the last of them, and perhaps some smaller ones.

    Args:
        row: [n].
        count: 1 to n.
    """
    if 4 * count > _GROUPS or len(row) < 4 * _GROUPS:
        least = np.partition(row, -count)[-count]
    else:
        # So many groups have a maximum of at least this, each a value of its own.
        maxima = row[: len(row) - len(row) % _GROUPS].reshape(-1, _GROUPS).max(0)
        least = np.partition(maxima, -count)[-count]
    found = np.flatnonzero(row >= least)
    return found if len(found) >= count else np.arange(len(row))  # a value is NaN


def largest_values(row: Floats, count: int) -> Floats:
    """The `count` largest values in descending order: [count].

    Args:
        row: [n].
        count: 1 to n.
    """
    return _descending(np.partition(row, -count)[-count:])


def largest_columns(row: Floats, count: int) -> Columns:
    """Where the `count` largest values are, in descending order, of equal ones the first: [count].

    Args:
        row: [n].
        count: 1 to n.
    """
    found = columns_of_largest(row, count)
    return found[np.argsort(-row[found], kind="stable")[:count]]


def columns_of_nucleus(weights: Floats, total: float, top_p: float) -> Columns | None:
    """Where the values are that top-p keeps, and perhaps some smaller ones; None: that leaves out too few.

    Args:
        weights: [n], 0 or more.
        total: sum of the weights.
        top_p: share of the total that it keeps, in (0, 1].
    """
    columns, may_go, gone = None, _SHARE_LEFT_OUT * (1.0 - top_p) * total, 0.0
    while len(weights) > _FEW and 1.0 - top_p > _ROUNDING:
        # All that are below this weigh less together than what may go, so the nucleus ends before.
        is_left = weights >= (may_go - gone) / len(weights)
        if np.count_nonzero(is_left) > _SHARE_OF_FEW * len(weights):
            break
        left = np.flatnonzero(is_left)
        columns, weights = left if columns is None else columns[left], weights[left]
        gone = total - float(weights.sum(dtype=np.float64))
    return columns


def least_of_nucleus(weights: Floats, total: float, top_p: float) -> float:
    """The smallest weight that top-p keeps.

    Args:
        weights: [n], 0 or more; at least those that it keeps.
        total: what it keeps a share of: the sum of the weights, and of those that are not among these.
        top_p: share of the total that it keeps, in (0, 1].
    """
    if top_p >= 1.0:
        return float(weights.min())
    # A weight is kept while the mass before it is short of the target; the first one always is.
    target = float(np.float32(total) * np.float32(top_p))
    is_shrinking = 1.0 - top_p > _ROUNDING
    while is_shrinking and len(weights) > _FEW:
        columns, target = _part_with_end(weights, target)
        is_shrinking = len(columns) < _WORTHWHILE * len(weights)
        weights = weights[columns]
    weights = _descending(weights)
    # Rounded like `nucleus_threshold`, which matters where next to nothing is left out.
    before = np.cumsum(weights, dtype=np.float64).astype(np.float32) - weights
    size = int(np.count_nonzero(before < np.float32(target)))
    return float(weights[max(1, size) - 1])


def _part_with_end(weights: Floats, target: float) -> tuple[Columns, float]:
    """Heavy, middle or light weights: those among which, in descending order, the sum reaches a target.

    Returns:
        Where they are, and what the sum of heavier ones is short of the target.
    """
    # Looked for from below: a sample misses the few that may weigh most.
    sample = np.sort(weights[:: len(weights) // _SAMPLE])
    lighter = (float(weights.sum()) - target) * len(sample) / len(weights)
    end = int(np.cumsum(sample, dtype=np.float64).searchsorted(lighter))
    low, high = sample[max(0, end - _SAMPLE_ERROR)], sample[min(end + _SAMPLE_ERROR, len(sample) - 1)]
    is_heavy = weights > high
    short = target - float((weights * is_heavy).sum(dtype=np.float64))
    if short <= 0.0:
        return np.flatnonzero(is_heavy), target
    middle = np.flatnonzero((weights >= low) ^ is_heavy)
    short_of_light = short - float(weights[middle].sum(dtype=np.float64))
    light = np.flatnonzero(weights < low) if short_of_light > 0.0 else middle[:0]
    return (light, short_of_light) if len(light) else (middle, short)


def _descending(values: Floats) -> Floats:
    ordered: Floats = -np.sort(-values)
    return ordered
