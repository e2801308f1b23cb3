"""The largest values of long rows without sorting them: the same as of a sorted row, whatever the row looks like."""

import numpy as np
import pytest
import torch
from lorikeet.server.engine.largest import columns_of_largest, largest_columns
from lorikeet.server.engine.winners import Winners

ROWS = {
    "random": lambda g: g.standard_normal(5003),
    "peaked": lambda g: 12 * g.standard_normal(5003),
    "ties": lambda g: g.integers(0, 4, 5003),
    "masked": lambda g: np.where(g.random(5003) < 0.99, -np.inf, g.standard_normal(5003)),
    "flat": lambda g: np.zeros(5003),
    "short": lambda g: g.standard_normal(7),
    "long": lambda g: g.standard_normal(30_011),
    "long tail": lambda g: g.permutation(-1.2 * np.log(np.arange(1, 30_012))),
    "long and peaked": lambda g: np.where(g.random(30_011) < 1e-3, 25.0, 3.0) * g.standard_normal(30_011),
    "long ties": lambda g: g.integers(0, 3, 30_011),
    "ascending": lambda g: np.sort(g.standard_normal(30_011)),
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> np.ndarray:
    return ROWS[request.param](np.random.default_rng(3)).astype(np.float32)


def test_largest_are_those_of_the_sorted_row(row: np.ndarray) -> None:
    order = np.argsort(-row, kind="stable")
    for count in {1, 2, 7, min(300, len(row)), len(row)}:
        assert np.array_equal(largest_columns(row, count), order[:count])
        assert np.isin(np.flatnonzero(row >= row[order[count - 1]]), columns_of_largest(row, count)).all()


def test_largest_columns_of_a_row_with_nan_are_as_many_as_asked_for() -> None:
    row = np.array([1.0, np.nan, 3.0, 2.0], np.float32)
    assert sorted(largest_columns(row, 4).tolist()) == [0, 1, 2, 3] and len(largest_columns(row, 2)) == 2


def test_winners_are_those_of_torch_and_nan_is_seen() -> None:
    logits = torch.randn(5, 777)
    logits[3, 10] = torch.nan
    logits[4] = -torch.inf
    best, tokens = Winners().find(logits)
    assert tokens[:3].tolist() == logits[:3].argmax(-1).tolist() and best[:3].tolist() == logits[:3].amax(-1).tolist()
    assert best.isfinite().tolist() == [True] * 3 + [False] * 2
