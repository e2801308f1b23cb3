"""Each sampling parameter by its effect, and that rows of a batch do not disturb each other."""

import math
import warnings
from collections import Counter

import pytest
import torch
from lorikeet.server.engine.random_draws import uniform
from lorikeet.server.engine.request import Request
from lorikeet.server.engine.sampler import SampledToken, Sampler
from lorikeet.server.engine.sampling_params import SamplingParams

EOS = 2
VOCAB = 1000  # no multiple of the run length that draws work in


def request_of(prompt=(1,), output=(), **params) -> Request:
    request = Request("r", list(prompt), SamplingParams(**params), None, lambda _: None)
    request.output_token_ids = list(output)
    return request


def sample(logits, requests) -> list[SampledToken]:
    results = Sampler([EOS]).sample(logits, requests)
    assert all(result is not None for result in results)
    return results


def logits_of(probabilities: dict[int, float], vocab: int = VOCAB) -> torch.Tensor:
    """One row; what is not named is impossible."""
    row = torch.full((1, vocab), -torch.inf)
    for token, probability in probabilities.items():
        row[0, token] = math.log(probability)
    return row


def drawn(logits: torch.Tensor, n: int = 500, **params) -> Counter[int]:
    """How often each token is drawn with n seeds."""
    requests = [request_of(seed=seed, **params) for seed in range(n)]
    return Counter(result.token_id for result in sample(logits.expand(n, -1), requests))


FLAT = {3: 0.4, 5: 0.3, 500: 0.2, 999: 0.1}


def test_temperature_zero_takes_the_likeliest():
    torch.manual_seed(0)
    logits = torch.randn(5, VOCAB)
    results = sample(logits, [request_of(temperature=0.0) for _ in range(5)])
    assert [result.token_id for result in results] == logits.argmax(-1).tolist()


def test_draws_follow_the_distribution():
    n = 5000
    counts = drawn(logits_of(FLAT), n)
    assert set(counts) == set(FLAT)
    chi_square = sum((counts[token] - n * p) ** 2 / (n * p) for token, p in FLAT.items())
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001; seeds are fixed


def test_draws_follow_a_large_distribution():
    torch.manual_seed(1)
    vocab, n = 2000, 5000
    logits = torch.randn(1, vocab)
    counts = drawn(logits, n)
    observed = torch.zeros(vocab, dtype=torch.float64)
    for token, count in counts.items():
        observed[token] = count
    expected = n * logits[0].double().softmax(-1)
    # Sorted by probability into 20 bins of equal mass.
    order = expected.argsort()
    bins = (expected[order].cumsum(0) / n * 20).long().clamp(max=19)
    seen, due = (torch.zeros(20, dtype=torch.float64).scatter_add_(0, bins, x[order]) for x in (observed, expected))
    assert ((seen - due) ** 2 / due).sum() < 43.8  # 19 degrees of freedom, p = 0.001


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_or_flattens(temperature):
    n = 5000
    counts = drawn(logits_of(FLAT), n, temperature=temperature)
    weights = {token: p ** (1 / temperature) for token, p in FLAT.items()}
    for token, weight in weights.items():
        assert counts[token] / n == pytest.approx(weight / sum(weights.values()), abs=0.03)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 5e-324])
def test_tiniest_temperature_is_greedy(temperature):
    assert set(drawn(logits_of(FLAT), 50, temperature=temperature)) == {3}


def test_top_k_keeps_the_k_likeliest():
    assert set(drawn(logits_of(FLAT), top_k=2)) == {3, 5}
    assert set(drawn(logits_of(FLAT), top_k=1)) == {3}
    assert set(drawn(logits_of(FLAT), top_k=10**6)) == set(FLAT)


def test_top_k_keeps_ties():
    assert set(drawn(logits_of({3: 0.4, 5: 0.2, 7: 0.2, 9: 0.2}), top_k=2)) == {3, 5, 7, 9}


def test_top_p_keeps_the_smallest_set_with_that_mass():
    assert set(drawn(logits_of(FLAT), top_p=0.39)) == {3}
    assert set(drawn(logits_of(FLAT), top_p=0.41)) == {3, 5}
    assert set(drawn(logits_of(FLAT), top_p=0.75)) == {3, 5, 500}
    assert set(drawn(logits_of(FLAT), top_p=1.0)) == set(FLAT)
    assert set(drawn(logits_of(FLAT), top_p=1e-9)) == {3}


def test_top_p_is_of_what_top_k_leaves():
    # Of 3 and 5 alone, 3 has 0.57.
    assert set(drawn(logits_of(FLAT), top_k=2, top_p=0.56)) == {3}
    assert set(drawn(logits_of(FLAT), top_k=2, top_p=0.58)) == {3, 5}


def test_min_p_drops_what_is_unlikely_beside_the_likeliest():
    assert set(drawn(logits_of(FLAT), min_p=0.3)) == {3, 5, 500}
    assert set(drawn(logits_of(FLAT), min_p=0.6)) == {3, 5}
    assert set(drawn(logits_of(FLAT), min_p=1.0)) == {3}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([[3.0, 2.0, 1.9, -1.0, -1.5]])
    assert sample(logits, [request_of([0], temperature=0.0, repetition_penalty=1.4)])[0].token_id == 0
    assert sample(logits, [request_of([0], temperature=0.0, repetition_penalty=1.6)])[0].token_id == 1
    assert sample(logits, [request_of([4], [0, 1], temperature=0.0, repetition_penalty=1.6)])[0].token_id == 2
    negative = torch.tensor([[-1.0, -1.2]])
    assert sample(negative, [request_of([0], temperature=0.0, repetition_penalty=1.3)])[0].token_id == 1


def test_smallest_repetition_penalty_stays_finite():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    for penalty in (1e-30, 1e-300):
        request = request_of([1], seed=1, repetition_penalty=penalty)
        assert sample(logits, [request])[0].token_id == 1


def test_presence_penalty_counts_output_once_and_prompt_not():
    logits = torch.tensor([[1.0, 0.5, 0.0]])
    assert sample(logits, [request_of([0, 0], temperature=0.0, presence_penalty=0.6)])[0].token_id == 0
    assert sample(logits, [request_of([0], [0, 0, 0], temperature=0.0, presence_penalty=0.6)])[0].token_id == 1
    assert sample(logits, [request_of([0], [0, 0, 0], temperature=0.0, presence_penalty=0.4)])[0].token_id == 0


def test_frequency_penalty_counts_every_occurrence_in_the_output():
    logits = torch.tensor([[1.0, 0.5, 0.0]])
    assert sample(logits, [request_of([0], [0, 0], temperature=0.0, frequency_penalty=0.2)])[0].token_id == 0
    assert sample(logits, [request_of([0], [0, 0, 0], temperature=0.0, frequency_penalty=0.2)])[0].token_id == 1
    assert sample(logits, [request_of([0], [2], temperature=0.0, frequency_penalty=-2.0)])[0].token_id == 2


def test_counts_grow_with_the_output():
    torch.manual_seed(2)
    request = request_of(range(40), temperature=0.0, frequency_penalty=1.0, repetition_penalty=1.1)
    for _ in range(100):
        logits = torch.randn(1, 60)
        fresh = request_of(range(40), request.output_token_ids, temperature=0.0, frequency_penalty=1.0,
                           repetition_penalty=1.1)  # fmt: skip
        token = sample(logits, [request])[0].token_id
        assert token == sample(logits, [fresh])[0].token_id
        request.output_token_ids.append(token)


def test_min_tokens_masks_what_would_end_the_request():
    logits = torch.tensor([[0.0, 0.1, 3.0, 2.0, 1.0]])
    params = {"temperature": 0.0, "max_tokens": 9}
    assert sample(logits, [request_of(**params)])[0].token_id == EOS
    assert sample(logits, [request_of(min_tokens=1, **params)])[0].token_id == 3
    assert sample(logits, [request_of(min_tokens=1, stop_token_ids=(3, 10**9), **params)])[0].token_id == 4
    assert sample(logits, [request_of(output=[4], min_tokens=1, **params)])[0].token_id == EOS
    assert sample(logits, [request_of(min_tokens=1, ignore_eos=True, **params)])[0].token_id == EOS
    assert set(drawn(logits, 200, min_tokens=1, stop_token_ids=(0, 1, 3))) == {4}


def test_seed_repeats_and_another_seed_differs():
    torch.manual_seed(3)
    logits = torch.randn(1, VOCAB)
    first, again, other = (
        [sample(logits, [request_of(output=[0] * i, seed=seed)])[0].token_id for i in range(10)] for seed in (7, 7, 8)
    )
    assert first == again != other
    assert len(set(first)) > 5, "the index of the token counts"


def test_without_a_seed_requests_differ():
    torch.manual_seed(3)
    logits = torch.randn(1, VOCAB)
    assert len({sample(logits, [request_of()])[0].token_id for _ in range(8)}) > 1
    request = request_of()
    assert len({sample(logits, [request])[0].token_id for _ in range(8)}) == 1


def test_numbers_of_neighbouring_seeds_and_indices_are_independent():
    numbers = [uniform(seed, index) for seed in range(100) for index in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) >= 0.0 and max(numbers) < 1.0
    bins = Counter(int(number * 100) for number in numbers)
    assert sum((bins[i] - 100) ** 2 / 100 for i in range(100)) < 149  # 99 degrees of freedom, p = 0.001
    assert uniform(2**64 - 1, 10**6) != uniform(0, 10**6)


ROWS = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "top_k": 3},
    {"seed": 3, "top_p": 0.5, "temperature": 1.7},
    {"seed": 4, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.0, "repetition_penalty": 1.5, "presence_penalty": 0.5},
    {"seed": 6, "frequency_penalty": 1.5, "min_p": 0.2},
    {"temperature": 0.0, "min_tokens": 5, "max_tokens": 6, "logprobs": 3},
    {"seed": 8, "logprobs": 0, "temperature": 0.7},
    {"temperature": 0.0, "logprobs": 20},
]


def test_a_row_does_not_depend_on_its_batch_and_logits_stay_as_they_were():
    torch.manual_seed(4)
    logits = torch.randn(len(ROWS), VOCAB) * 3
    logits[7, EOS] = 100.0
    untouched = logits.clone()

    def requests():
        return [request_of([1, 2, 3], [5, 5, 6], **params) for params in ROWS]

    together = sample(logits, requests())
    assert torch.equal(logits, untouched)
    alone = [sample(logits[i : i + 1], [request])[0] for i, request in enumerate(requests())]
    assert [result.token_id for result in together] == [result.token_id for result in alone]
    backwards = sample(logits.flip(0), requests()[::-1])[::-1]
    assert [result.token_id for result in together] == [result.token_id for result in backwards]


def test_logprobs_are_of_the_raw_distribution():
    torch.manual_seed(5)
    logits = torch.randn(3, VOCAB)
    expected = logits.double().log_softmax(-1)
    requests = [
        request_of([1], [4], logprobs=5, temperature=3.0, top_k=1, repetition_penalty=5.0, seed=1),
        request_of(),
        request_of(logprobs=0, seed=2),
    ]
    first, silent, chosen_only = sample(logits, requests)
    assert silent.logprob is None
    for row, result in ((0, first), (2, chosen_only)):
        assert result.logprob.token_id == result.token_id
        assert result.logprob.logprob == pytest.approx(expected[row, result.token_id].item(), abs=1e-5)
    assert chosen_only.logprob.top == ()
    values, ids = expected[0].topk(5)
    assert [token for token, _ in first.logprob.top] == ids.tolist()
    assert [logprob for _, logprob in first.logprob.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("params", ROWS, ids=str)
def test_logits_that_are_not_finite_are_reported_and_harm_no_other_row(bad, params):
    torch.manual_seed(6)
    logits = torch.randn(3, VOCAB)
    clean = sample(logits, [request_of(**params) for _ in range(3)])
    logits[1, 77] = bad
    results = Sampler([EOS]).sample(logits, [request_of(**params) for _ in range(3)])
    assert results[1] is None
    assert [results[0].token_id, results[2].token_id] == [clean[0].token_id, clean[2].token_id]


def test_everything_masked_still_gives_a_token_of_the_vocabulary():
    request = request_of(seed=1, min_tokens=3, stop_token_ids=tuple(range(VOCAB)))
    assert 0 <= sample(torch.zeros(1, VOCAB), [request])[0].token_id < VOCAB


def test_number_next_to_one_draws_the_last_possible_token(monkeypatch):
    monkeypatch.setattr("lorikeet.server.engine.sampler.uniform", lambda seed, index: 1.0 - 2.0**-53)
    assert set(drawn(logits_of(FLAT), 3)) == {999}
    assert set(drawn(logits_of({3: 0.7, 5: 0.3}), 3)) == {5}
    monkeypatch.setattr("lorikeet.server.engine.sampler.uniform", lambda seed, index: 0.0)
    assert set(drawn(logits_of(FLAT), 3)) == {3}


@pytest.mark.gpu
@pytest.mark.parametrize("params", ROWS, ids=str)
def test_a_step_waits_for_the_device_once(params, monkeypatch):
    logits = torch.randn(4, VOCAB, device="cuda")
    requests = [request_of(**params) for _ in range(4)]
    sample(logits, requests)
    waits = []  # for events, of which torch does not warn
    wait = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda self: (waits.append(self), wait(self))[1])
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample(logits, requests)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) + sum("synchronizing" in str(warning.message) for warning in caught) == 1


@pytest.mark.gpu
def test_device_and_host_choose_the_same_tokens():
    torch.manual_seed(7)
    logits = torch.randn(len(ROWS), VOCAB)
    host, device = (
        sample(logits.to(place), [request_of([1, 2, 3], [5, 5, 6], **params) for params in ROWS])
        for place in ("cpu", "cuda")
    )
    assert [result.token_id for result in host] == [result.token_id for result in device]
