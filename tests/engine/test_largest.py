"""The largest values of long rows without sorting them: the same as of a sorted row, whatever the row looks like."""

import numpy as np
import pytest
import torch
from lorikeet.server.engine.distribution import nucleus_threshold, top_k_threshold, top_p_threshold
from lorikeet.server.engine.largest import largest_columns, largest_values, nucleus_candidates
from lorikeet.server.engine.winners import Winners

ROWS = {
    "random": lambda g: g.standard_normal(5003),
    "peaked": lambda g: 12 * g.standard_normal(5003),
    "ties": lambda g: g.integers(0, 4, 5003),
    "masked": lambda g: np.where(g.random(5003) < 0.99, -np.inf, g.standard_normal(5003)),
    "flat": lambda g: np.zeros(5003),
    "short": lambda g: g.standard_normal(7),
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> np.ndarray:
    return ROWS[request.param](np.random.default_rng(3)).astype(np.float32)


def test_largest_are_those_of_the_sorted_row(row: np.ndarray) -> None:
    order = np.argsort(-row, kind="stable")
    for count in {1, 2, 7, min(300, len(row)), len(row)}:
        assert np.array_equal(largest_values(row, count), row[order[:count]])
        assert np.array_equal(largest_columns(row, count), order[:count])


def test_largest_columns_of_a_row_with_nan_are_as_many_as_asked_for() -> None:
    row = np.array([1.0, np.nan, 3.0, 2.0], np.float32)
    assert sorted(largest_columns(row, 4).tolist()) == [0, 1, 2, 3] and len(largest_columns(row, 2)) == 2


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999, 1 - 1e-7])
def test_nucleus_of_the_candidates_is_that_of_the_whole_row(row: np.ndarray, top_p: float) -> None:
    scaled = torch.from_numpy(row - row.max())[None]
    whole = scaled.sort(-1, descending=True).values
    all_columns, share = torch.tensor([len(row)]), torch.tensor([top_p])
    expected = nucleus_threshold(whole, all_columns, share)
    found = top_p_threshold(scaled, [top_p])
    # Sums in another order may round to the neighbour of the last token.
    near = (whole[0] == expected).nonzero()[[0, -1], 0] + torch.tensor([-1, 1])
    low, high = whole[0, near.clamp(0, len(row) - 1)].tolist()[::-1]
    assert low <= found.item() <= high
    weights = np.exp(scaled[0].numpy())
    candidates = nucleus_candidates(scaled[0].numpy(), weights, float(weights.sum(dtype=np.float64)), top_p)
    assert np.array_equal(candidates, whole[0, : len(candidates)].numpy())


def test_top_k_of_each_row_is_its_own() -> None:
    scaled = torch.randn(3, 901)
    scaled -= scaled.amax(-1, keepdim=True)
    descending = scaled.sort(-1, descending=True).values
    found = top_k_threshold(scaled, [1, 50, 900], [1.0, 1.0, 1.0])
    assert found.tolist() == [descending[0, 0], descending[1, 49], descending[2, 899]]
    share = torch.tensor([0.5])
    expected = nucleus_threshold(descending[1:2, :50], torch.tensor([50]), share)
    assert top_k_threshold(scaled[1:2], [50], [0.5]).tolist() == expected.tolist()


def test_winners_are_those_of_torch_and_nan_is_seen() -> None:
    logits = torch.randn(5, 777)
    logits[3, 10] = torch.nan
    logits[4] = -torch.inf
    best, tokens = Winners().find(logits)
    assert tokens[:3].tolist() == logits[:3].argmax(-1).tolist() and best[:3].tolist() == logits[:3].amax(-1).tolist()
    assert best.isfinite().tolist() == [True] * 3 + [False] * 2
