"""Real servers, shared by the tests of a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest

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
def server(
    server_arguments: list[str], tiny_adapters: Path, watched_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server with all tiny adapters and room for everything; starting one takes ten seconds, so tests share it."""
    directories = ["--adapters", str(tiny_adapters), "--adapters", str(watched_folder)]
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(log, *server_arguments, *directories, "--kv-cache-bytes", "32MiB") as server:
        yield server
