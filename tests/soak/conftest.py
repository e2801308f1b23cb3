"""How long a soak takes, and what it draws from."""

import os
import random
from pathlib import Path

import pytest

from .contents import Content, make_contents
from .references import References, make_references


@pytest.fixture(scope="session")
def soak_seed() -> int:
    """LORIKEET_SOAK_SEED, or a fresh one. It fixes what every actor draws, not how their threads take turns."""
    seed = int(os.environ.get("LORIKEET_SOAK_SEED") or random.randrange(2**32))
    print(f"LORIKEET_SOAK_SEED={seed}", flush=True)
    return seed


@pytest.fixture(scope="session")
def soak_contents(tiny_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Content]:
    """What there is to serve."""
    return make_contents(tiny_adapters / "amber", tmp_path_factory.mktemp("soak-contents"))


@pytest.fixture(scope="session")
def soak_references(tiny_model: Path, soak_contents: list[Content]) -> References:
    """What each content answers."""
    return make_references(tiny_model, soak_contents)
