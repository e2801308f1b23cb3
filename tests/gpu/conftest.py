"""Only on a CUDA device: what the tests here compare, and the report of `make test-gpu`."""

import pytest
import torch
from lorikeet.server.engine import step_graphs

from .report import GpuReport


def pytest_configure(config: pytest.Config) -> None:
    """The report, for `-m gpu`, in the one process that prints."""
    if config.option.markexpr == "gpu" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(GpuReport())


@pytest.fixture(autouse=True)
def eager_to_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are short: graphs for what has just come are captured at once, in the midst of everything."""
    monkeypatch.setattr(step_graphs, "_SIGHTINGS", 1)
    monkeypatch.setattr(step_graphs, "_SIGHTINGS_COVERED", 6)
    monkeypatch.setattr(step_graphs, "_CAPTURE_EVERY_S", 0.0)


@pytest.fixture(autouse=True, scope="session")
def exact_fp32() -> None:
    """What is stated for fp32 does not hold for TF32, which torch leaves off by default."""
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
