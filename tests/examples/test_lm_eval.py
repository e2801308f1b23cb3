"""The model class for lm-evaluation-harness, on a server with fakes below; the harness itself where it is installed."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lorikeet.server.client import LorikeetClient

from ..server.fakes import FakeEngine, serve_on_thread
from ..server.test_score_service import scores

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lm_eval_lorikeet.py"
HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None


@dataclass
class Call:
    """The part of the harness' Instance that a model reads."""

    args: tuple[Any, ...]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not HAS_HARNESS:
        for name, member in (("api.instance", "Instance"), ("api.model", "LM"), ("tasks", "TaskManager")):
            module = ModuleType(f"lm_eval.{name}")
            setattr(module, member, type(member, (), {}))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for name in ("lm_eval", "lm_eval.api"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    spec = importlib.util.spec_from_file_location("lm_eval_lorikeet", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scoring() -> Iterator[tuple[FakeEngine, LorikeetClient]]:
    engine = FakeEngine(script=scores)
    with serve_on_thread(engine=engine) as address, LorikeetClient(address) as client:
        yield engine, client


def test_continuations_get_the_tokens_behind_their_context(example, scoring):
    engine, client = scoring
    model = example.LorikeetLM(client, "kjv")
    found = model.loglikelihood([Call(("ab ", "cd")), Call(("", "cd")), Call(("abc", "d"))])
    # Log probabilities are the negative index: <bos> a b _ c d.
    assert [score for score, _ in found] == [-(3 + 4 + 5), -(1 + 2), -4]
    assert all(greedy for _, greedy in found)
    assert {request.adapter_id for request in engine.submitted} == {"kjv"}


def test_what_is_longer_than_the_context_is_cut_at_the_front(example, scoring):
    engine, client = scoring
    [(score, _)] = example.LorikeetLM(client).loglikelihood([Call(("x" * 100, "yz"))])
    [request] = engine.submitted
    assert len(request.scored.token_ids) == 64
    assert score == -(62 + 63)


def test_long_texts_are_scored_in_windows(example, scoring):
    _, client = scoring
    [total] = example.LorikeetLM(client).loglikelihood_rolling([Call(("x" * 99,))])
    # Windows of 64, 32 apart: tokens 1 to 63, 64 to 95, 96 to 99 of the text, by their index in the window.
    assert total == -(sum(range(1, 64)) + sum(range(32, 64)) + sum(range(60, 64)))


def test_generations_stop_where_they_shall(example):
    engine = FakeEngine()
    with serve_on_thread(engine=engine) as address, LorikeetClient(address) as client:
        model = example.LorikeetLM(client)
        calls = [Call(("ab", {"until": ["\n"], "max_gen_toks": 5})), Call(("x" * 90, {"do_sample": True}))]
        assert model.generate_until(calls) == ["Hello world"] * 2
    short, long = sorted(engine.submitted, key=lambda request: len(request.prompt_token_ids))
    assert len(long.prompt_token_ids) + long.params.max_tokens <= 64 and not long.params.greedy
    assert (short.params.stop, short.params.max_tokens, short.params.greedy) == (("\n",), 5, True)


@pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval is not installed")
def test_the_harness_runs_a_local_task(example, scoring, tmp_path):
    (tmp_path / "docs.jsonl").write_text(
        '{"q": "ab", "good": "c", "bad": "cc"}\n{"q": "b", "good": "d", "bad": "dd"}\n'
    )
    (tmp_path / "local.yaml").write_text(
        f"task: local_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/docs.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: 0\n"
        "doc_to_choice: '{{[good, bad]}}'\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    import lm_eval
    from lm_eval.tasks import TaskManager

    model = example.LorikeetLM(scoring[1], "kjv")
    tasks = TaskManager(include_path=str(tmp_path))
    found = lm_eval.simple_evaluate(model=model, tasks=["local_choice"], task_manager=tasks)
    assert found["results"]["local_choice"]["acc,none"] == 1.0
