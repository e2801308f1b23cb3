"""What soaks have found, each as the smallest test that shows it."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lorikeet.adapters.manager import AdapterManager

from ..golden.in_process import serving
from .contents import CONFIG, WEIGHTS, Content

# Files of two small contents, not of three.
STORE_BYTES = 80 * 2**10


@pytest.fixture
def manager(tiny_model: Path, tmp_path: Path, soak_contents: list[Content]) -> Iterator[AdapterManager]:
    """With a version store that holds two of the small contents."""
    root = tmp_path / "adapters"
    shutil.copytree(soak_contents[0].directory.parent, root)
    with serving(tiny_model, root, state_dir=tmp_path / "state", adapter_store_bytes=STORE_BYTES) as app:
        yield app.manager


@pytest.mark.parametrize("call", ["rollback", "set_alias"])
def test_kept_version_is_not_evicted_while_it_is_read(
    manager: AdapterManager, soak_contents: list[Content], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    old, new, other = soak_contents[:3]
    manager.load("x", old.directory.name)
    manager.load("x", new.directory.name)
    stored = manager._core.state.store.digests()
    assert old.digest in stored and sum(stored.values()) + min(stored.values()) > STORE_BYTES
    files = {name: (other.directory / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    opens, kept = os.open, []

    def open_and_evict(path: str, *args: int, **kwargs: int) -> int:
        if str(path).endswith(f"{old.digest}/{CONFIG}") and not kept:
            kept.append(manager._core.keep_files(other.digest, {n: (f,) for n, f in files.items()}, must=False))
        return opens(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_and_evict)
    calls: dict[str, Callable[[], object]] = {
        "rollback": lambda: manager.rollback("x"),
        "set_alias": lambda: manager.set_alias("prod", [(f"x@{old.digest[:12]}", 1.0)]),
    }
    calls[call]()
    assert kept == [False]
    assert old.digest in manager._core.state.store.digests()
