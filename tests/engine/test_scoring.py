"""Texts that are scored, in an engine whose rounds are turned by hand. Real models: tests/golden/test_scoring.py."""

import random
from typing import Any

import pytest
import torch
from lorikeet.server.engine.limits import AdapterLimits
from lorikeet.server.engine.request import Delta, Finished, FinishReason, TokenLogprob
from lorikeet.server.engine.scheduler import ScheduledRequest, ScheduledStep
from lorikeet.server.engine.scored_text import ScoredText
from lorikeet.server.engine.scoring import Scorer, cut_step

from .fake_adapters import version
from .fake_world import VOCAB, Client, World, expected_scores, expected_tokens, greedy, prompt_of, reason_of

A, B = version("a"), version("b")


def scores_of(client: Client) -> list[TokenLogprob]:
    return [score for event in client.events if isinstance(event, Delta) for score in event.logprobs]


def check(client: Client, tokens: list[int], first: int = 1) -> None:
    scores = scores_of(client)
    assert isinstance(client.end, Finished) and client.end.reason is FinishReason.SCORED
    assert [score.token_id for score in scores] == tokens[first:] == client.tokens
    wanted = expected_scores(client.request.adapter, tokens)[first - 1 :]
    assert [score.logprob for score in scores] == pytest.approx(wanted, abs=1e-5)
    assert not client.request.output_token_ids


def test_chunks_of_texts_and_generations_share_steps():
    world = World(max_running=5, token_budget=7)
    texts = [prompt_of(i, 11 + 6 * i) for i in range(4)]
    clients = [world.score(ScoredText(text, 1), adapter) for text, adapter in zip(texts, (A, B, None, A), strict=True)]
    other = world.submit(prompt_of(9, 10), greedy(12), B)
    world.run()
    for client, text in zip(clients, texts, strict=True):
        check(client, text)
    assert other.tokens == expected_tokens(B, prompt_of(9, 10), 12)
    kinds = [{item.request.scored is None for item in step.requests} for step in world.runner.steps]
    assert {True, False} in kinds
    assert max(step.num_tokens for step in world.runner.steps) == 7
    world.check_nothing_is_held()


def test_the_last_token_is_not_computed_and_two_are_enough():
    world = World()
    client = world.score(ScoredText([3, 4], 1))
    world.run()
    check(client, [3, 4])
    assert [step.num_tokens for step in world.runner.steps] == [1]


def test_only_context_comes_from_the_prefix_cache():
    world = World()
    text = prompt_of(1, 23)
    world.submit(text, greedy(1), A)
    world.run()
    for first, cached in ((1, 0), (4, 0), (5, 4), (13, 12), (22, 20)):
        client = world.score(ScoredText(text, first), A)
        world.run()
        check(client, text, first)
        assert client.end.cached_tokens == cached
    # What a text has left there, a generation finds.
    other = prompt_of(2, 20)
    world.score(ScoredText(other, 1), A)
    world.run()
    found = world.submit(other, greedy(1), A)
    world.run()
    assert found.end.cached_tokens == 16


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_preempted_text_goes_on_where_it_was(prefix_cache: bool):
    world = World(num_blocks=12, max_running=3, token_budget=6, prefix_cache=prefix_cache)
    older = world.submit(prompt_of(1, 3), greedy(40))
    text = prompt_of(2, 30)
    client = world.score(ScoredText(text, 3), A)
    # Its first chunk was delivered, then the generation takes blocks away from it.
    for _ in range(3):
        world.engine.step()
    assert scores_of(client) and client.end is None
    world.scheduler._preempt(world.scheduler.running.pop())
    assert client.request.num_preemptions == 1
    world.run()
    check(client, text, 3)
    assert older.tokens == expected_tokens(None, prompt_of(1, 3), 40)
    world.check_nothing_is_held()


def test_random_worlds_score_every_token_once():
    rng = random.Random(3)
    for seed in range(6):
        world = World(
            num_blocks=14, num_slots=2, token_budget=rng.randint(3, 9), max_running=3, load_steps=1, seed=seed
        )
        asked: list[tuple[Client, list[int], int]] = []
        for i in range(9):
            text = prompt_of(100 * seed + rng.randrange(3), rng.randint(2, 40))
            adapter = rng.choice((None, A, B))
            if rng.random() < 0.3:
                world.submit(text, greedy(rng.randint(1, 12)), adapter)
            else:
                first = rng.randint(1, len(text) - 1)
                asked.append((world.score(ScoredText(text, first, i % 3), adapter), text, first))
        world.run()
        for client, text, first in asked:
            check(client, text, first)
            assert {len(score.top) for score in scores_of(client)} == {client.request.scored.num_top}
        world.check_nothing_is_held()


def test_ends_badly_like_any_other_request():
    world = World(max_running=4, token_budget=4)
    text = prompt_of(3, 30)
    late, cancelled, nan, gone, good = (
        world.score(ScoredText(text, 1), A, 101.0 if i == 0 else None) for i in range(5)
    )
    world.runner.nan_for = nan.request
    world.engine.step()
    world.engine.abort(cancelled.request.request_id)
    world.clock.now += 2
    world.run()
    reasons = [reason_of(client) for client in (late, cancelled, nan)]
    assert reasons == ["DEADLINE_EXCEEDED", "CANCELLED", "NON_FINITE_LOGITS"]
    check(gone, text)
    check(good, text)
    assert ("a", "scored") in [call[:2] for call in world.observer.of("finished")]
    assert not world.observer.of("first_token")
    world.check_nothing_is_held()


def test_out_of_device_memory_ends_one_and_repeats_no_token():
    world = World(token_budget=16)
    world.runner.oom_above = 11
    texts = [prompt_of(i, 10) for i in range(2)]
    clients = [world.score(ScoredText(text, 1)) for text in texts]
    world.run()
    check(clients[0], texts[0])
    assert reason_of(clients[1]) == "DEVICE_MEMORY"


def test_caps_hold_for_texts_too():
    world = World(limits={"a": AdapterLimits(max_running=1, tokens_per_minute=50)})
    text = prompt_of(4, 30)
    clients = [world.score(ScoredText(text, 1), A) for _ in range(2)]
    with pytest.raises(Exception, match="tokens a minute"):
        world.score(ScoredText(text, 1), A)
    world.adapters.port.release(A)
    world.clients.pop()
    world.run()
    for client in clients:
        check(client, text)
    assert max(len(step.requests) for step in world.runner.steps) == 1


def random_step(rng: random.Random) -> ScheduledStep:
    items: list[ScheduledRequest] = []
    for number in range(rng.randint(1, 6)):
        tokens = prompt_of(number, rng.randint(2, 20))
        text = ScoredText(tokens, rng.randint(1, len(tokens) - 1), rng.randrange(4))
        client: Any = World().client(text.prompt_token_ids, scored=text if rng.random() < 0.8 else None)
        start = rng.randint(0, len(tokens) - 2)
        count = rng.randint(1, len(tokens) - 1 - start)
        scored = text.num_rows(start, start + count) if client.request.scored else 0
        items.append(ScheduledRequest(client.request, start, count, False, scored))
    return ScheduledStep(items)


def test_pieces_are_bounded_and_give_what_the_whole_gives():
    rng = random.Random(5)
    for seed in range(30):
        step, most = random_step(rng), rng.randint(1, 7)
        torch.manual_seed(seed)
        logits = torch.randn(step.num_tokens, VOCAB) * 3
        logits[:, 20:][torch.rand(step.num_tokens, VOCAB - 20) < 0.1] = -torch.inf
        pieces, scorer = cut_step(step, most), Scorer()
        assert all(1 <= len(piece.rows) <= most for piece in pieces)
        scorer.begin(pieces)
        for piece in pieces:
            scorer.add(piece, logits[piece.rows].clone())
        found, row = scorer.take(), 0
        assert scorer.take() == {} and not scorer._runs
        for request, start, count, _, num_scored in step.requests:
            rows = logits[row + count - num_scored : row + count].log_softmax(-1)
            row += count
            if not num_scored:
                assert request not in found
                continue
            targets = torch.tensor(request.scored.token_ids[start + count - num_scored + 1 : start + count + 1])
            scores = found[request]
            assert scores is not None and [score.token_id for score in scores] == targets.tolist()
            wanted = rows.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(torch.tensor([score.logprob for score in scores]), wanted, atol=1e-5, rtol=1e-5)
            for score, values in zip(scores, rows, strict=True):
                assert [values[token].item() for token, _ in score.top] == pytest.approx(
                    values.topk(request.scored.num_top).values.tolist(), abs=1e-5
                )


def test_no_more_alternatives_than_the_vocabulary_has():
    text = ScoredText([1, 2, 3, 0], 1, 20)
    client: Any = World().client(text.prompt_token_ids, scored=text)
    [piece] = cut_step(ScheduledStep([ScheduledRequest(client.request, 0, 3, False, 3)]), 8)
    scorer = Scorer()
    scorer.begin([piece])
    scorer.add(piece, torch.randn(3, 5))
    scores = scorer.take()[client.request]
    assert scores is not None and [sorted(token for token, _ in score.top) for score in scores] == [list(range(5))] * 3
