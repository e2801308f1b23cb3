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


def test_prompts_get_an_eighth_however_slow_and_decodes_alone_single_steps():
    budget = ChunkBudget(1.5, 512)
    found = [tokens for tokens, _ in run(budget, linear(1.0, 1e-3), 300)]
    assert set(found[1:]) <= {0, 64}
    zeros = [number for number, tokens in enumerate(found) if not tokens]
    assert zeros[0] == 0 and all(b - a > 60 for a, b in itertools.pairwise(zeros))


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
    assert budget.allow(200) == 64
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
    assert chunks[:2] == [0, 8]
    assert min(chunks[1:]) >= 8 and max(chunks) <= 11
