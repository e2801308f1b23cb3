"""What is drawn row by row on a CPU is what the tensor functions for a device draw from the same logits and numbers."""

import numpy as np
import pytest
import torch
from lorikeet.server.engine.distribution import draw_on_device
from lorikeet.server.engine.host_draws import HostDraws
from lorikeet.server.engine.sampling_params import SamplingParams

ROWS = 8
VOCAB = 20_011  # no multiple of anything that draws work in, and long enough for every shortcut
FILTERS = {
    "temperature": {"temperature": 1.7},
    "top_p": {"top_p": 0.9},
    "tiny top_p": {"top_p": 1e-9},
    "almost all": {"top_p": 1 - 1e-7},
    "hot top_p": {"top_p": 0.95, "temperature": 3.0},
    "cold top_p": {"top_p": 0.95, "temperature": 0.1},
    "one": {"top_k": 1},
    "top_k": {"top_k": 40},
    "many": {"top_k": 9000},
    "all": {"top_k": VOCAB},
    "top_k and top_p": {"top_k": 300, "top_p": 0.8},
    "min_p": {"min_p": 0.02},
    "everything": {"top_k": 500, "top_p": 0.99, "min_p": 0.001, "temperature": 1.3},
    "top_p and min_p": {"top_p": 0.999, "min_p": 0.01},
}


def peaked(g: torch.Generator) -> torch.Tensor:
    """As of a model that knows: few tokens have nearly all of the mass."""
    logits = 2.5 * torch.randn(ROWS, VOCAB, generator=g)
    logits[:, torch.randperm(VOCAB, generator=g)[:50]] += torch.linspace(14, 4, 50)
    return logits


LOGITS = {
    "peaked": peaked,
    "normal": lambda g: torch.randn(ROWS, VOCAB, generator=g),
    "flat": lambda g: torch.full((ROWS, VOCAB), 3.25),
    "ties": lambda g: torch.randint(-8, 3, (ROWS, VOCAB), generator=g).float(),
    "masked": lambda g: torch.randn(ROWS, VOCAB, generator=g).where(
        torch.rand(ROWS, VOCAB, generator=g) < 0.01, -torch.inf
    ),
    "one left": lambda g: torch.full((ROWS, VOCAB), -torch.inf).index_fill(1, torch.tensor([777]), 0.5),
}


def both(logits: torch.Tensor, params: list[SamplingParams], numbers: list[float]) -> tuple[list[int], list[int]]:
    inverse = [1 / p.temperature for p in params]
    with torch.inference_mode():
        return (
            HostDraws().draw(logits, params, inverse, numbers).tolist(),
            draw_on_device(logits, params, inverse, numbers).tolist(),
        )


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("make", LOGITS.values(), ids=LOGITS)
def test_tokens_are_those_of_the_reference(make, filters):
    generator = torch.Generator().manual_seed(9)
    logits = make(generator)
    numbers = torch.rand(3 * ROWS, dtype=torch.float64, generator=generator).tolist()
    numbers[:2] = [0.0, 1.0 - 2.0**-53]
    params = [SamplingParams(**filters)] * len(numbers)
    found, expected = both(logits.repeat(3, 1), params, numbers)
    # A number within rounding of the border between two tokens may fall on its other side.
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 1
    if found != expected:
        pairs = zip(found, expected, strict=True)
        assert all(abs(a - b) < VOCAB // 100 for a, b in pairs)


def test_rows_of_a_step_may_be_filtered_each_in_its_own_way():
    generator = torch.Generator().manual_seed(10)
    logits = torch.cat([make(generator) for make in LOGITS.values()])
    filters = [list(FILTERS.values())[i % len(FILTERS)] for i in range(len(logits))]
    numbers = np.random.default_rng(11).random(len(logits)).tolist()
    params = [SamplingParams(**each) for each in filters]
    found, _ = both(logits, params, numbers)
    inverse = [1 / p.temperature for p in params]
    alone = [
        int(HostDraws().draw(logits[i : i + 1], params[i : i + 1], inverse[i : i + 1], numbers[i : i + 1]))
        for i in range(len(logits))
    ]
    assert found == alone


def test_buffers_follow_the_vocabulary():
    draws = HostDraws()
    for vocab in (700, 20, 1500):
        logits = torch.full((2, vocab), -torch.inf)
        logits[0, vocab - 1], logits[1, 3] = 0.0, 1.0
        for params in (SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=4)):
            assert draws.draw(logits, [params] * 2, [1.0] * 2, [0.999, 0.001]).tolist() == [vocab - 1, 3]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_give_some_token(bad):
    logits = torch.randn(1, 5000)
    logits[0, 77] = bad
    for filters in FILTERS.values():
        params = SamplingParams(**filters)
        assert 0 <= int(HostDraws().draw(logits, [params], [1 / params.temperature], [0.5])) < 5000
