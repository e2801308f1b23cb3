"""A tiny random model and adapters for it, made once a session: real files in the real formats, in about a second."""

import gc
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from .devices import HAS_GPU

# Without a GPU the Triton kernels run in Triton's interpreter. Triton reads this when a kernel is defined, and other
# libraries import Triton too, so it is set before anything else is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TINY_ADAPTERS = ("amber", "birch", "cedar", "dune")


def pytest_addoption(parser: pytest.Parser) -> None:
    """For `make sanitize-gpu`, where every case takes long."""
    parser.addoption("--sample", type=int, metavar="N", help="run at most N cases of each test, evenly chosen")


def pytest_configure(config: pytest.Config) -> None:
    """Known also where pytest-xdist is not installed."""
    config.addinivalue_line("markers", "xdist_group(name): tests that pytest-xdist keeps in one process")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`: golden tests of one family stay together, too, so that PEFT makes its adapters once."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    from .golden.conftest import FAMILIES

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            found = re.fullmatch(r"tests/golden/.*\[(\w+)\]", nodeid)
            return f"golden {found[1]}" if found and found[1] in FAMILIES else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device; what takes long as a whole begins first."""
    # Else one process would end with minutes of them while the others have nothing left.
    items.sort(key=lambda item: not item.path.match("soak/*.py") and item.path.name != "test_triton_compiles.py")
    most = config.getoption("--sample")
    if most is not None:
        items[:] = _sample(items, most)
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what all the modules hold, as a server does: it takes nearly a second."""
    gc.collect()
    gc.freeze()


def _sample(items: list[pytest.Item], most: int) -> list[pytest.Item]:
    cases: dict[tuple[str, bool], list[pytest.Item]] = {}
    for item in items:
        cases.setdefault((item.nodeid.split("[")[0], item.get_closest_marker("gpu") is not None), []).append(item)
    chosen: set[pytest.Item] = set()
    for same in cases.values():
        count = min(most, len(same))
        # The first and the last are the extremes of what a test is given.
        chosen |= {same[i * (len(same) - 1) // max(1, count - 1)] for i in range(count)}
    return [item for item in items if item in chosen]


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo base's quantized form is kept for all tests of this run, in whatever process."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "demo-cache"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a seeded 2-layer Llama in bf16 with a byte-level BPE tokenizer and a chat template."""
    from .tiny import save_tiny_model

    directory = tmp_path_factory.mktemp("tiny-model")
    save_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with one folder for each of TINY_ADAPTERS, of different ranks and targets, as PEFT saves them."""
    from .tiny import save_tiny_adapter

    directory = tmp_path_factory.mktemp("tiny-adapters")
    recipes = zip(TINY_ADAPTERS, (2, 4, 8, 16), strict=True)
    for seed, (name, rank) in enumerate(recipes):
        save_tiny_adapter(tiny_model, directory / name, seed=seed, rank=rank, attention_only=seed % 2 == 1)
    return directory
