"""Prompts take what decodes can spare, on a clock that only the test moves."""

import itertools
import random

import pytest
from lorikeet.server.engine.chunk_budget import ChunkBudget

from .test_scheduler import Bench


def run(budget, cost, steps, decodes=16, wanted=10**6):
    """Steps with as many tokens of prompts as there may be; how many each had, and what it took."""
    found = []
    for _ in range(steps):
        tokens = min(wanted, budget.allow(decodes))
        seconds = cost(decodes, tokens)
        budget.record(decodes, tokens, seconds)
        found.append((tokens, seconds))
    return found


def linear(fixed, each, alone=0.010):
    return lambda decodes, tokens: alone + (fixed + each * tokens if tokens else 0.0)


@pytest.mark.parametrize(("fixed", "each"), [(0.0, 40e-6), (0.004, 20e-6), (0.0, 1e-6), (0.009, 1e-5)])
def test_step_takes_what_the_bound_leaves(fixed, each):
    budget = ChunkBudget(2.0, 512)
    found = run(budget, linear(fixed, each), 300)[150:]
    fitting = min(512, round((0.010 - fixed) / each))
    assert all(tokens == 0 or abs(tokens - fitting) <= 0.1 * fitting for tokens, _ in found)
    assert max(seconds for _, seconds in found) < 0.0205


def test_noise_does_not_break_the_bound_much():
    rng = random.Random(1)
    cost = linear(0.002, 30e-6)
    budget = ChunkBudget(2.0, 512)
    found = run(budget, lambda *args: cost(*args) * rng.uniform(0.9, 1.1), 400)[40:]
    assert sorted(seconds for _, seconds in found)[-4] < 0.026
    assert 150 < sum(tokens for tokens, _ in found) / len(found) < 350


def test_prompts_get_a_sixteenth_however_slow_and_decodes_alone_single_steps():
    budget = ChunkBudget(1.5, 512)
    found = [tokens for tokens, _ in run(budget, linear(1.0, 1e-3), 300)]
    assert set(found[1:]) <= {0, 32}
    zeros = [number for number, tokens in enumerate(found) if not tokens]
    assert zeros[0] == 0 and all(b - a > 60 for a, b in itertools.pairwise(zeros))


SIZES = [64, 128, 192, 256, 384, 512]


def padded(costs, alone=0.004):
    """Seconds of a step whose tokens are padded: what its size costs, whatever part of it is used."""
    by_size = dict(zip(SIZES, costs, strict=True))
    return lambda decodes, tokens: by_size[next(s for s in SIZES if s >= decodes + tokens)] if tokens else alone


@pytest.mark.parametrize(
    ("costs", "size"),
    [
        ((0.005, 0.0075, 0.010, 0.012, 0.016, 0.020), 128),
        ((0.0075, 0.0078, 0.009, 0.012, 0.016, 0.020), 128),  # much of it is there for any number
        ((0.0042, 0.0079, 0.0081, 0.012, 0.016, 0.020), 128),  # the next one is just too much
        ((0.009, 0.012, 0.015, 0.018, 0.021, 0.024), 64),  # none is within the bound: the least
        ((0.004, 0.004, 0.0041, 0.0045, 0.006, 0.0075), 512),
    ],
)
def test_padded_step_fills_the_largest_size_that_the_bound_leaves(costs, size):
    budget = ChunkBudget(2.0, 512, SIZES)
    found = run(budget, padded(costs), 2000)
    tokens = [count for count, _ in found[40:] if count]
    assert tokens.count(size - 16) >= 0.99 * len(tokens) and set(tokens) <= {s - 16 for s in SIZES}
    # Larger ones are tried, but rarely: the 99th of a hundred is within the bound.
    seconds = sorted(taken for _, taken in found[40:])
    assert seconds[len(seconds) * 99 // 100] <= max(0.008, costs[0])


def test_padded_sizes_that_took_too_long_once_are_tried_again():
    costs = (0.005, 0.006, 0.007, 0.0078, 0.016, 0.020)
    budget = ChunkBudget(2.0, 512, SIZES)
    slow = run(budget, lambda *args: 3 * padded(costs)(*args) if args[1] else 0.004, 100)
    assert {tokens for tokens, _ in slow} == {0, 48}
    later = [tokens for tokens, _ in run(budget, padded(costs), 3000)][1500:]
    assert set(later) <= {0, 240, 368} and later.count(240) > 0.95 * len(later)


def test_ends_of_prompts_count_for_the_size_that_they_are_padded_to():
    budget = ChunkBudget(2.0, 512, SIZES)
    cost = padded((0.005, 0.007, 0.0095, 0.012, 0.016, 0.020))
    rng = random.Random(4)
    for _ in range(300):
        tokens = min(budget.allow(16), rng.choice([1, 30, 1000]))
        budget.record(16, tokens, cost(16, tokens))
    assert {budget.allow(16) for _ in range(5)} <= {0, 112}


def test_sizes_leave_a_sixteenth_beside_any_number_of_decodes_and_none_exceeds_the_step():
    for decodes in range(1, 520):
        budget = ChunkBudget(2.0, 300, SIZES)
        found = [tokens for tokens, _ in run(budget, lambda *_: 0.01, 20, decodes)]
        assert found[0] == 0 and min(found[1:]) >= 300 // 16
        assert max(found) + decodes <= 256 or found[1:] == [18] * 19


def test_nothing_is_bounded_without_decodes_or_a_bound():
    assert ChunkBudget(2.0, 512).allow(0) == 512
    off = ChunkBudget(0, 512)
    assert [tokens for tokens, _ in run(off, linear(1.0, 1.0), 5)] == [512] * 5
    for wrong in (1.0, 0.5, -2.0, float("nan")):
        with pytest.raises(ValueError, match="above 1, or 0"):
            ChunkBudget(wrong, 512)


def test_step_for_which_something_was_compiled_is_forgotten():
    budget = ChunkBudget(2.0, 512)
    budget.record(16, 0, 5.0)
    for _ in range(12):
        budget.record(16, 0, 0.010)
    found = run(budget, linear(0.0, 40e-6), 60)
    assert all(seconds < 0.024 for _, seconds in found[10:])


def test_other_numbers_of_decodes_are_measured_on_their_own():
    budget = ChunkBudget(2.0, 512)
    run(budget, linear(0.0, 40e-6), 30, decodes=16)
    assert budget.allow(200) == 0  # not known yet
    assert budget.allow(200) == 32
    budget.record(200, 0, 0.040)
    run(budget, linear(0.0, 40e-6, alone=0.040), 10, decodes=200)
    assert budget.allow(200) == 512


def test_scheduler_cuts_prompts_to_what_is_allowed():
    bench = Bench(token_budget=64, max_slowdown=2.0)
    bench.add(3, name="decodes")
    bench.step()
    bench.add(200, name="long")
    chunks = []
    for _ in range(12):
        plan = bench.step()
        tokens = plan.step.num_tokens - 1
        bench.scheduler.measured(plan.step, 0.010 + 1e-3 * tokens)
        chunks.append(tokens)
    assert chunks[:2] == [0, 4]
    assert min(chunks[1:]) >= 4 and max(chunks) <= 11


def test_scheduler_fills_padded_steps():
    bench = Bench(token_budget=256, max_slowdown=2.0, padded_sizes=[64, 128, 192, 256], num_blocks=400)
    for name in ("one", "two", "three"):
        bench.add(3, name=name)
    bench.step()
    bench.add(1000, name="long")
    totals = []
    for _ in range(6):
        plan = bench.step()
        total = plan.step.num_tokens
        bench.scheduler.measured(plan.step, 0.010 if total == 3 else 0.010 + 0.004 * -(-total // 64))
        totals.append(total)
    assert totals == [3, 64, 128, 192, 128, 128]  # 192 rows are more than twice as long
