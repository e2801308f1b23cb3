"""Real servers, shared by the tests of a module; and one with fakes below, for a test of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .fake_manager import FakeManager
from .fakes import FakeEngine, serve_on_thread
from .process import ServerProcess, running_server

# float32 wherever the tests run, so that greedy answers do not depend on what else is in the batch.
COMMON = ["--compute-dtype", "float32", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="session")
def server_arguments(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of every server in these tests."""
    return ["--model", str(tiny_model), "--cache-dir", str(tmp_path_factory.mktemp("cache")), *COMMON]


@pytest.fixture(scope="session")
def watched_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty directory that `server` watches too, for tests to put adapters into."""
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="session")
def merge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty directory that `server` writes merged models into."""
    return tmp_path_factory.mktemp("merged")


@pytest.fixture(scope="session")
def server(
    server_arguments: list[str],
    tiny_adapters: Path,
    watched_folder: Path,
    merge_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    """A server with all tiny adapters and room for everything; starting one takes ten seconds, so tests share it."""
    directories = ["--adapters", str(tiny_adapters), "--adapters", str(watched_folder)]
    # Not at the lowest priority: tests keep every core busy.
    merging = ["--merge-dir", str(merge_folder), "--merge-priority", "normal"]
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(log, *server_arguments, *directories, *merging, "--kv-cache-bytes", "32MiB") as server:
        yield server


@pytest.fixture
def engine() -> FakeEngine:
    """What `address` has below, for generation."""
    return FakeEngine()


@pytest.fixture
def manager() -> FakeManager:
    """What `address` has below, for calls about adapters."""
    return FakeManager()


@pytest.fixture
def address(engine: FakeEngine, manager: FakeManager) -> Iterator[str]:
    """Of a server with fakes below, on a thread of its own."""
    with serve_on_thread(engine=engine, manager=manager) as address:
        yield address
