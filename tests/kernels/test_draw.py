"""What the native call draws is what the tensor functions for a device draw from the same logits and numbers."""

import numpy as np
import pytest
import torch
from lorikeet.kernels import draw as draw_module
from lorikeet.kernels.draw import Draw, draw, is_available
from lorikeet.server.engine.distribution import draw_on_device
from lorikeet.server.engine.sampling_params import SamplingParams

from .native_libraries import LIBRARIES, use_library

pytestmark = pytest.mark.skipif(not is_available(), reason="built without the C++ kernels")
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
    # top-p is of all that top-k leaves, also of what min-p then takes away.
    "min_p within top_k": {"top_k": 200, "top_p": 0.6, "min_p": 0.3},
    "min_p within many": {"top_k": 5000, "top_p": 0.5, "min_p": 0.1, "temperature": 0.7},
    "min_p within top_p": {"top_p": 0.6, "min_p": 0.2},
}


@pytest.fixture(params=[name for name in LIBRARIES if name != "none"])
def each_library(request, monkeypatch):
    use_library(monkeypatch, request.param, draw_module, {"_draw": draw_module._DRAW})


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


def draw_natively(logits: torch.Tensor, params: list[SamplingParams], numbers: list[float]) -> list[int]:
    draws = [
        Draw(number, 1 / p.temperature, p.top_p, p.min_p, min(p.top_k, logits.shape[-1]))
        for p, number in zip(params, numbers, strict=True)
    ]
    return draw(logits, draws).tolist()


def both(logits: torch.Tensor, params: list[SamplingParams], numbers: list[float]) -> tuple[list[int], list[int]]:
    inverse = [1 / p.temperature for p in params]
    with torch.inference_mode():
        return (
            draw_natively(logits, params, numbers),
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


@pytest.mark.usefixtures("each_library")
def test_rows_of_a_step_may_be_filtered_each_in_its_own_way():
    generator = torch.Generator().manual_seed(10)
    logits = torch.cat([make(generator) for make in LOGITS.values()])
    filters = [list(FILTERS.values())[i % len(FILTERS)] for i in range(len(logits))]
    numbers = np.random.default_rng(11).random(len(logits)).tolist()
    params = [SamplingParams(**each) for each in filters]
    found = draw_natively(logits, params, numbers)
    alone = [draw_natively(logits[i : i + 1], params[i : i + 1], numbers[i : i + 1])[0] for i in range(len(logits))]
    assert found == alone


@pytest.mark.usefixtures("each_library")
def test_any_vocabulary_one_after_the_other():
    for vocab in (700, 20, 1500, 1, 257, 8):
        logits = torch.full((2, vocab), -torch.inf)
        logits[0, vocab - 1], logits[1, 0] = 0.0, 1.0
        for params in (SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=4), SamplingParams(min_p=1.0)):
            assert draw_natively(logits, [params] * 2, [0.999, 0.001]) == [vocab - 1, 0]


def test_rows_need_not_lie_beside_each_other():
    logits = torch.randn(6, 3001, generator=torch.Generator().manual_seed(12))
    params = [SamplingParams(top_p=0.7)] * 3
    numbers = [0.1, 0.5, 0.9]
    assert draw_natively(logits[::2], params, numbers) == draw_natively(logits[::2].contiguous(), params, numbers)
    assert draw_natively(logits[::2, 1:], params, numbers) == draw_natively(
        logits[::2, 1:].contiguous(), params, numbers
    )


def test_threads_change_nothing():
    generator = torch.Generator().manual_seed(13)
    logits, numbers = 3 * torch.randn(40, 5003, generator=generator), torch.rand(40, generator=generator).tolist()
    params = [SamplingParams(**list(FILTERS.values())[i % len(FILTERS)]) for i in range(40)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = draw_natively(logits, params, numbers)
        torch.set_num_threads(3)
        assert draw_natively(logits, params, numbers) == one
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("each_library")
def test_frequencies_are_the_probabilities():
    logits = torch.tensor([[1.0, 0.0, -torch.inf, 2.0, 0.5]])
    count = 20_000
    numbers = ((torch.arange(count) + 0.5) / count).tolist()
    for params, kept in ((SamplingParams(temperature=0.7), [0, 1, 3, 4]), (SamplingParams(top_k=2), [0, 3])):
        expected = torch.zeros(5, dtype=torch.float64)
        expected[kept] = (logits[0, kept].double() / params.temperature).softmax(-1)
        found = draw_natively(logits.expand(count, 5).contiguous(), [params] * count, numbers)
        # Numbers are evenly spaced: every token is off by one at most, and by rounding.
        torch.testing.assert_close(
            torch.bincount(torch.tensor(found), minlength=5).double() / count, expected, atol=2e-4, rtol=0
        )


@pytest.mark.usefixtures("each_library")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_give_some_token(bad):
    for column in (77, 4999, 5002):
        logits = torch.randn(1, 5003)
        logits[0, column] = bad
        for filters in FILTERS.values():
            assert 0 <= draw_natively(logits, [SamplingParams(**filters)], [0.5])[0] < 5003


def test_nothing_but_float32_rows_on_the_cpu():
    one = [Draw(0.5, 1.0, 1.0, 0.0, 0)]
    for logits in (torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(2, 8), torch.zeros(8, 1).T[:, ::2]):
        with pytest.raises(RuntimeError, match="logits must be float32"):
            draw(logits, one)
