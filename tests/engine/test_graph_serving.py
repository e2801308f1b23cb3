"""A whole server answers the same with captured steps as without, while adapters and long prompts come and go."""

import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lorikeet.server.app import App, capture_backend
from lorikeet.server.config import ServerConfig
from lorikeet.server.engine.graph_capture import CaptureBackend
from lorikeet.server.engine.runner import Runner
from lorikeet.server.engine.scheduler import ScheduledStep

from ..conftest import TINY_ADAPTERS
from ..devices import CPU, GPU
from ..golden.in_process import Call, greedy_params, serving
from .graph_world import Rerun

PROMPTS = [[5, 9, 40, 7], [3], list(range(20, 51)), [100, 4, 4, 8, 60, 61]]


def answers(app: App) -> list[list[int]]:
    """Greedy tokens of prompts of every adapter and of the base, all at once."""
    names = ["", *TINY_ADAPTERS]
    calls = [
        Call(app, f"{number}-{name}", name, prompt, greedy_params(12 + number))
        for number, prompt in enumerate(PROMPTS)
        for name in names
    ]
    return [call.result().token_ids for call in calls]


def beside_decodes(app: App, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Greedy tokens of streams that decode while long prompts come in, and of these."""
    draw = random.Random(2)
    prompts = [[draw.randrange(3, 250) for _ in range(length)] for length in (3, 17, 5, 9, 260, 130, 64, 331)]
    names = ["", *TINY_ADAPTERS]
    calls: list[Call] = []
    begun, decoding, submitted = threading.Event(), threading.Event(), threading.Event()
    forward = Runner.forward

    def held(runner: Runner, step: ScheduledStep) -> torch.Tensor:
        # However late this test's thread has its turn, no stream is far ahead of another or of the long prompts.
        assert begun.wait(60)
        if all(call.request.output_token_ids for call in calls):
            decoding.set()
            assert submitted.wait(60)
        return forward(runner, step)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "forward", held)
        calls += [Call(app, f"d{i}", names[i], prompt, greedy_params(150)) for i, prompt in enumerate(prompts[:4])]
        begun.set()
        assert decoding.wait(60)
        late = [Call(app, f"p{i}", names[i], prompt, greedy_params(25)) for i, prompt in enumerate(prompts[4:])]
        submitted.set()
    calls += late
    found = [call.result().token_ids for call in reversed(calls)]
    # Begins as the first long one does, which is in the prefix cache by then.
    return [*found, Call(app, "again", names[0], prompts[4][:200] + prompts[0], greedy_params(3)).result().token_ids]


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.gpu, id="cuda")])
@pytest.mark.parametrize(
    "settings", [{}, {"max_slowdown": 2.0}, {"kv_cache_bytes": "416KiB"}], ids=["all", "bound", "preempted"]
)
def test_greedy_tokens_of_decodes_beside_long_prompts(
    settings: dict[str, Any],
    device: torch.device,
    tiny_model: Path,
    tiny_adapters: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorikeet.server.app.capture_backend", lambda config, device: backend_of(config, device))
    eager: list[int] = []
    run = Runner._run_eagerly
    monkeypatch.setattr(Runner, "_run_eagerly", lambda self, step: (eager.append(step.num_tokens), run(self, step))[1])
    found = {}
    for graphs in (False, True):
        eager.clear()
        sizes = {"step_tokens": 128, "max_running": 12, "cuda_graphs": graphs}
        with serving(tiny_model, tiny_adapters, device=device, **sizes, **settings) as app:
            for name in TINY_ADAPTERS:
                app.manager.load(name)
            found[graphs] = beside_decodes(app, monkeypatch)
            preempted = app.engine.stats().num_preemptions
    assert found[True] == found[False]
    assert (preempted > 0) == ("kv_cache_bytes" in settings)
    assert not eager, "every step is captured, prompts included"


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.gpu, id="cuda")])
def test_greedy_tokens_with_and_without_graphs(
    device: torch.device, tiny_model: Path, tiny_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorikeet.server.app.capture_backend", lambda config, device: backend_of(config, device))
    replaced = TINY_ADAPTERS[0]
    found: dict[bool, list[list[list[int]]]] = {}
    for graphs in (False, True):
        folder = tmp_path / str(graphs)
        shutil.copytree(tiny_adapters, folder)
        # Room for two adapters at a time: the others are brought in between steps.
        with serving(tiny_model, folder, device=device, cuda_graphs=graphs, max_running=12, adapter_slots=2) as app:
            for name in TINY_ADAPTERS:
                app.manager.load(name)
            first = answers(app)
            shutil.rmtree(folder / replaced)
            shutil.copytree(tiny_adapters / TINY_ADAPTERS[3], folder / replaced)
            app.manager.load(replaced)
            found[graphs] = [first, answers(app)]
            graph_stats = app.engine._loop._runner.graph_stats
    assert found[True] == found[False]
    assert found[True][0] != found[True][1]
    assert graph_stats.num_replays > 20 and not graph_stats.failure


def backend_of(config: ServerConfig, device: torch.device) -> CaptureBackend | None:
    if device.type == "cuda":
        return capture_backend(config, device)
    return Rerun() if config.cuda_graphs else None
