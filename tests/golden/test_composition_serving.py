"""Compositions in a whole server in this process: what answers, what the prefix cache shares, what is given back."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from lorikeet.adapters.composition import Wish
from lorikeet.adapters.errors import AdapterCompositionError, AdapterUnloadedError
from lorikeet.adapters.version import AdapterVersion
from lorikeet.server.app import App
from lorikeet.server.engine.runner import Runner
from lorikeet.server.engine.scheduler import ScheduledStep

from ..adapters.managing import Gate
from ..base.family_models import VOCAB, save_family
from .in_process import Answer, Call, greedy_params, serving
from .peft_oracle import Oracle, recipes

NUM_TOKENS = 24
BLOCK = 16


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    root: Path = tmp_path_factory.mktemp("composition")
    save_family("llama", root / "model")
    chosen = recipes(split=True)[:3]
    Oracle(root / "model", chosen, root / "adapters")
    with serving(root / "model", root / "adapters", step_tokens=24, max_running=6) as app:
        for name, recipe in zip("abc", chosen, strict=True):
            app.manager.load(name, recipe.name)
        yield app


def prompt(seed: int, length: int = 40) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(app: App, adapter: str | Mapping[str, float], tokens: list[int], name: str = "r") -> Answer:
    answer = Call(app, name, adapter, tokens, greedy_params(NUM_TOKENS)).result()
    assert answer.finished is not None, answer.failed
    return answer


def test_weight_one_is_the_adapter_and_zero_the_base(app: App) -> None:
    tokens = prompt(1)
    plain, base = ask(app, "a", tokens).token_ids, ask(app, "", tokens).token_ids
    assert ask(app, {"a": 1.0}, tokens).token_ids == plain != base
    assert ask(app, {"a": 0.0}, tokens).token_ids == base
    assert ask(app, {"a": 0.0, "b": 0.0}, tokens).token_ids == base
    assert ask(app, {"a": 1.0, "b": 0.0}, tokens).token_ids == plain


def test_a_sum_differs_from_its_members_and_not_by_order_or_company(app: App) -> None:
    tokens = prompt(2)
    wanted: list[str | dict[str, float]] = ["", "a", "b", {"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 1.0}, {"a": 2.0}]
    alone = [ask(app, adapter, tokens).token_ids for adapter in wanted]
    assert len({tuple(output) for output in alone}) == len(wanted)
    assert ask(app, {"b": 0.5, "a": 0.5}, tokens).token_ids == alone[3]
    calls = [Call(app, f"m{i}", adapter, tokens, greedy_params(NUM_TOKENS)) for i, adapter in enumerate(wanted)]
    assert [call.result().token_ids for call in calls] == alone


def test_prefix_cache_is_shared_by_the_same_composition_only(app: App) -> None:
    tokens = prompt(3, 3 * BLOCK + 5)
    compositions: list[str | dict[str, float]] = [
        "", "a", "b", {"a": 0.5}, {"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.25}, {"a": 0.5, "b": 0.5, "c": 1e-3},
    ]  # fmt: skip
    for adapter in compositions:
        cold = ask(app, adapter, tokens)
        assert cold.finished is not None and cold.finished.cached_tokens == 0, adapter
    for same in (*compositions, {"a": 1.0}, {"b": 0.5, "a": 0.5}):
        warm = ask(app, same, tokens)
        assert warm.finished is not None and warm.finished.cached_tokens == 3 * BLOCK, same


def test_dropping_a_member_drops_the_blocks_of_every_composition_with_it(app: App) -> None:
    tokens = prompt(4, 2 * BLOCK + 1)
    for adapter in ("c", {"c": 0.5, "a": 0.5}, {"b": 0.5, "a": 0.5}):
        ask(app, adapter, tokens)
    version = app.manager.resolve("c")
    app.engine.on_version_dropped(version)
    app.manager.release(version)
    ask(app, "", prompt(9))  # the step thread has heard of it by the end of this
    cached = {}
    for name, adapter in {"c": "c", "c+a": {"c": 0.5, "a": 0.5}, "b+a": {"b": 0.5, "a": 0.5}}.items():
        finished = ask(app, adapter, tokens).finished
        assert finished is not None
        cached[name] = finished.cached_tokens
    assert cached == {"c": 0, "c+a": 0, "b+a": 2 * BLOCK}


def test_request_whose_member_is_dropped_fails_and_gives_every_version_back(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: AdapterVersion = app.manager.resolve("b")
    forward = Runner.forward

    def held(runner: Runner, step: ScheduledStep) -> torch.Tensor:
        # It is in the middle of its answer, however late this test's thread has its turn.
        if step.requests[0].request.output_token_ids:
            gate.pass_through()
        return forward(runner, step)

    with Gate() as gate, monkeypatch.context() as patch:
        patch.setattr(Runner, "forward", held)
        call = Call(app, "long", {"a": 0.5, "b": 0.5}, prompt(5), greedy_params(200))
        gate.wait_reached()
        app.engine.on_version_dropped(dropped)
    failed = call.result().failed
    assert failed is not None and isinstance(failed.error, AdapterUnloadedError)
    app.manager.release(dropped)
    assert in_flight(app) == 0


def test_refused_composition_holds_nothing(app: App) -> None:
    with pytest.raises(AdapterCompositionError):
        app.composition.resolve([Wish("a", 1.0, "adapters"), Wish("b", 1.0, "adapters"), Wish("a", 0.5, "adapters")])
    assert in_flight(app) == 0


def in_flight(app: App) -> int:
    return sum(record.in_flight for record in app.manager._registry.records.values())
