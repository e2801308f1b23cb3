"""Texts scored by a whole server in this process, held to PEFT's logits: mixed with each other and with generations."""

import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lorikeet.adapters.composition import Wish
from lorikeet.server.app import App
from lorikeet.server.engine.request import Delta, Event, Failed, Finished, FinishReason, Request, TokenLogprob
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.engine.scored_text import ScoredText
from torch import Tensor

from ..base.family_models import VOCAB, save_family
from .in_process import Call, greedy_params, serving
from .peft_oracle import Oracle, recipes

# (dtype fp32, tolerance): log probabilities of the same fp32 weights, matmuls grouped differently.
TOLERANCE = 2e-4
BLOCK = 16
NAMES = ("plain-all", "rslora", "patterns")


@dataclass(frozen=True)
class World:
    app: App
    oracle: Oracle


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One family with our own forward, and one with transformers' and a capped head.

    Steps of 24 tokens: most texts take several. Logits of 2 rows at a time. 14 blocks: not all texts fit at once.
    """
    root: Path = tmp_path_factory.mktemp(request.param)
    save_family(request.param, root / "model")
    oracle = Oracle(root / "model", [r for r in recipes(split=True) if r.name in NAMES], root / "adapters")
    token_bytes = 2 * 3 * 2 * (32 if request.param == "llama" else 48) * 4
    sizes = {"step_tokens": 24, "max_running": 8, "kv_cache_bytes": f"{14 * BLOCK * token_bytes}B"}
    with serving(root / "model", root / "adapters", **sizes) as app:
        for name in NAMES:
            app.manager.load(name, None)
        yield World(app, oracle)


class Score:
    """One text under way."""

    def __init__(self, app: App, name: str, members: str | Mapping[str, float], text: ScoredText) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        weights = {members: 1.0} if isinstance(members, str) else members
        wishes = [Wish(reference, weight, "adapters") for reference, weight in weights.items() if reference]
        adaptation = app.composition.resolve(wishes) if wishes else None
        prompt = text.prompt_token_ids
        self.request = Request(name, prompt, SamplingParams(), adaptation, self._events.put, scored=text)
        app.engine.submit(self.request)

    def result(self) -> tuple[list[TokenLogprob], Finished]:
        scores: list[TokenLogprob] = []
        while True:
            match self._events.get(timeout=120):
                case Delta() as delta:
                    assert not delta.text and delta.token_ids == tuple(each.token_id for each in delta.logprobs)
                    scores += delta.logprobs
                case Finished() as end:
                    return scores, end
                case Failed() as end:
                    raise end.error


def random_text(seed: int, length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(world: World, adapter: str, tokens: Sequence[int]) -> Tensor:
    """Log probabilities of every next token, float32 [len - 1, vocab]."""
    return world.oracle.logits(adapter, list(tokens[:-1])).log_softmax(-1)


def check(scores: Sequence[TokenLogprob], wanted: Tensor, tokens: Sequence[int], first: int, num_top: int) -> None:
    assert [each.token_id for each in scores] == list(tokens[first:])
    targets = torch.tensor(tokens[first:]).unsqueeze(-1)
    rows = wanted[first - 1 :]
    found = torch.tensor([each.logprob for each in scores])
    torch.testing.assert_close(found, rows.gather(-1, targets).squeeze(-1), atol=TOLERANCE, rtol=TOLERANCE)
    top = torch.tensor([[value for _, value in each.top] for each in scores]).view(len(scores), num_top)
    torch.testing.assert_close(top, rows.topk(num_top, -1).values, atol=TOLERANCE, rtol=TOLERANCE)
    ids = torch.tensor([[token for token, _ in each.top] for each in scores], dtype=torch.int64).view_as(top)
    torch.testing.assert_close(rows.gather(-1, ids), top, atol=TOLERANCE, rtol=TOLERANCE)


def test_mixed_with_generations_scores_are_pefts_and_outputs_do_not_change(world: World) -> None:
    asked = [("", 2, 1, 0), *((name, 20 + 17 * i, 1 + 9 * i, i) for i, name in enumerate(NAMES)), ("", 60, 50, 20)]
    texts = [random_text(seed, length) for seed, (_, length, _, _) in enumerate(asked)]
    prompts = [random_text(100 + i, 30) for i in range(3)]
    who = ["", "rslora", "plain-all"]
    alone = [
        Call(world.app, f"a{i}", adapter, prompt, greedy_params(20)).result()
        for i, (adapter, prompt) in enumerate(zip(who, prompts, strict=True))
    ]
    calls = [
        Call(world.app, f"m{i}", adapter, prompt, greedy_params(20))
        for i, (adapter, prompt) in enumerate(zip(who, prompts, strict=True))
    ]
    scores = [
        Score(world.app, f"s{i}", adapter, ScoredText(tokens, first, num_top))
        for i, ((adapter, _, first, num_top), tokens) in enumerate(zip(asked, texts, strict=True))
    ]
    assert [call.result().token_ids for call in calls] == [answer.token_ids for answer in alone]
    for score, tokens, (adapter, length, first, num_top) in zip(scores, texts, asked, strict=True):
        found, end = score.result()
        assert (end.reason, end.prompt_tokens, end.output_tokens) == (FinishReason.SCORED, length - 1, 0)
        check(found, expected(world, adapter, tokens), tokens, first, num_top)


def test_what_is_scored_is_computed_and_context_may_come_from_the_prefix_cache(world: World) -> None:
    tokens = random_text(7, 70)
    for _ in range(2):  # the second time everything is cached
        scores, end = Score(world.app, "all", "rslora", ScoredText(tokens, 1)).result()
        assert end.cached_tokens == 0
        check(scores, expected(world, "rslora", tokens), tokens, 1, 0)
    # Token 49 is scored by row 48, which has to be computed; the three blocks before need not be.
    for first, cached in ((49, 48), (48, 32), (69, 64)):
        scores, end = Score(world.app, "some", "rslora", ScoredText(tokens, first, 3)).result()
        assert end.cached_tokens == cached
        check(scores, expected(world, "rslora", tokens), tokens, first, 3)
    # A generation finds what a score has computed.
    answer = Call(world.app, "g", "rslora", tokens, greedy_params(2)).result()
    assert answer.finished is not None and answer.finished.cached_tokens == 64


def test_texts_that_do_not_fit_at_once_are_each_scored_once(world: World) -> None:
    calls = [Call(world.app, f"g{i}", "", random_text(200 + i, 30), greedy_params(60)) for i in range(2)]
    texts = [random_text(210 + i, 75) for i in range(4)]
    scores = [Score(world.app, f"p{i}", NAMES[i % 3], ScoredText(tokens, 1)) for i, tokens in enumerate(texts)]
    for i, (score, tokens) in enumerate(zip(scores, texts, strict=True)):
        check(score.result()[0], expected(world, NAMES[i % 3], tokens), tokens, 1, 0)
    assert all(call.result().finished for call in calls)


def test_a_sum_of_adapters_scores_as_the_sum_and_logits_can_be_had_whole(world: World) -> None:
    tokens = random_text(8, 40)
    pieces: dict[int, Tensor] = {}
    text = ScoredText(tokens, 5, on_logits=lambda index, rows: pieces.__setitem__(index, rows.clone()))
    scores, _ = Score(world.app, "sum", {"rslora": 1.0, "patterns": 0.0}, text).result()
    wanted = expected(world, "rslora", tokens)
    check(scores, wanted, tokens, 5, 0)
    whole = torch.cat([pieces[index] for index in sorted(pieces)])
    assert max(map(len, pieces.values())) == 2
    torch.testing.assert_close(whole.log_softmax(-1), wanted[4:], atol=TOLERANCE, rtol=TOLERANCE)
