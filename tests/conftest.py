"""A tiny random model and adapters for it, made once a session: real files in the real formats, in about a second."""

import os
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. Triton reads this when a kernel is defined, and other
# libraries import Triton too, so it is set before anything else is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TINY_ADAPTERS = ("amber", "birch", "cedar", "dune")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
