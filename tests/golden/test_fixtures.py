"""Adapters that an earlier PEFT saved are served as it answered, and the installed PEFT still saves the same.

Where the last test fails after PEFT was updated, look at what its files have that is new, see that the server accounts
for it, and write the fixtures anew (make_fixtures.py).
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lorikeet.server.app import App
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from .format_oracle import FormatOracle
from .format_requests import TOLERANCE, ask
from .formats import CONFIG, WEIGHTS
from .in_process import serving
from .make_fixtures import EXPECTED, FIXTURES, PROMPT, fixture_formats, make_all, save_base

NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
# What a release of PEFT may change without another format.
INFORMATIONAL = {"peft_version"}

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's hints for training


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(EXPECTED)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    root = tmp_path_factory.mktemp("fixtures")
    for name in NAMES:
        shutil.copytree(FIXTURES / name, root / "adapters" / name)
    with serving(save_base(root), root / "adapters", step_tokens=7, max_running=4) as app:
        yield app


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory) -> FormatOracle:
    """The installed PEFT, which made all of them."""
    return make_all(tmp_path_factory.mktemp("today"))


def test_there_is_one_for_each_format_and_they_are_small(expected: dict[str, Tensor]) -> None:
    assert set(NAMES) == set(fixture_formats()) == set(expected)
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) < 150_000


@pytest.mark.parametrize("name", NAMES)
def test_answers_as_peft_did(name: str, app: App, expected: dict[str, Tensor]) -> None:
    app.manager.load(name, None)
    call = ask(app, name, ((name, 1.0),), PROMPT, tokens=1)
    call.wait()
    assert_close(call.logits[0], expected[name], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_installed_peft_answers_as_peft_did(name: str, today: FormatOracle, expected: dict[str, Tensor]) -> None:
    logits = today.logits_of(fixture_formats()[name], FIXTURES / name, PROMPT)[-1]
    assert_close(logits, expected[name], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_installed_peft_saves_the_same_keys(name: str, today: FormatOracle) -> None:
    assert header(today.out / name) == header(FIXTURES / name)
    assert config(today.out / name) == config(FIXTURES / name)


def header(directory: Path) -> dict[str, tuple[Any, ...]]:
    """Name -> type and shape of every tensor."""
    return {name: (tensor.dtype, *tensor.shape) for name, tensor in load_file(directory / WEIGHTS).items()}


def config(directory: Path) -> dict[str, Any]:
    raw = json.loads((directory / CONFIG).read_text())
    return {key: value for key, value in raw.items() if key not in INFORMATIONAL}
