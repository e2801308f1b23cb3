"""A whole server answers the same with captured decode steps as without, while adapters come, go and are replaced."""

import shutil
from pathlib import Path

import pytest
import torch
from lorikeet.server.app import App, capture_backend
from lorikeet.server.config import ServerConfig
from lorikeet.server.engine.graph_capture import CaptureBackend

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
