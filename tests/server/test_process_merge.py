"""A merge on a real server: the same files as `lorikeet merge` writes, whatever happens to the adapter meanwhile."""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from lorikeet.protos.v1 import adapters_pb2
from lorikeet.protos.v1 import merges_pb2 as pb
from lorikeet.server.cli import run
from lorikeet.server.client import LorikeetClient
from lorikeet.server.client_merges import progress_of
from lorikeet.server.status import RemoteError

from .process import ServerProcess, eventually

NAME = "merging"


@pytest.fixture
def client(server):
    with LorikeetClient(server.address, timeout_s=200) as client:
        yield client


def version_of(client: LorikeetClient) -> str:
    """Of the adapter; empty while none is ready. One that is still being loaded is listed, too."""
    found = [each for each in client.list_adapters() if each.adapter_id == NAME]
    return next((each.version for each in found if each.state == adapters_pb2.ADAPTER_STATE_READY), "")


@contextmanager
def held_merge(server: ServerProcess) -> Iterator[None]:
    """The merge that has just been started gets no further, until the block ends."""

    def find() -> psutil.Process | None:
        children = psutil.Process(server.process.pid).children()
        return next((each for each in children if "lorikeet.server.merge_worker" in each.cmdline()), None)

    process = eventually(find)
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_merge_has_the_version_of_its_call_and_is_that_of_the_command(
    client, server, watched_folder, merge_folder, tiny_adapters, tiny_model, tmp_path, capsys
):
    """While it runs, its adapter is replaced under its id and unloaded; one that waits behind it is cancelled."""
    adapter, local = tmp_path / NAME, tmp_path / "local"
    shutil.copytree(tiny_adapters / "amber", adapter)
    shutil.copytree(adapter, watched_folder / NAME)
    first = eventually(lambda: version_of(client))
    operation = client.merges.start({NAME: 1.0}, "out", unverified=True)
    with held_merge(server):
        waiting = client.merges.start({f"{NAME}@{first[:8]}": 2.0}, "never", unverified=True)
        with pytest.raises(RemoteError, match="MERGE_OUTPUT_EXISTS"):
            client.merges.start({NAME: 1.0}, "out", unverified=True)
        assert progress_of(client.merges.get(operation.name)).state == pb.MERGE_STATE_RUNNING
        assert server.metric("lorikeet_merges_pending", state="queued") == 1
        client.merges.cancel(waiting.name)
        shutil.rmtree(watched_folder / NAME)
        shutil.copytree(tiny_adapters / "cedar", watched_folder / NAME)
        eventually(lambda: version_of(client) not in (first, ""))
        shutil.rmtree(watched_folder / NAME)
        eventually(lambda: not version_of(client))
        assert progress_of(client.merges.get(operation.name)).state == pb.MERGE_STATE_RUNNING

    seen: list[pb.MergeProgress] = []
    report = client.merges.follow(operation, seen.append)
    assert list(report.adapters) == [pb.MergedAdapter(id=NAME, version=first, weight=1.0)]
    assert (report.onto, report.to, report.output) == ("nf4", "bf16", "out")
    last = seen[-1]
    assert (last.state, last.stage, last.unit) == (pb.MERGE_STATE_SUCCEEDED, "Merging onto nf4", "bytes")
    assert last.done == last.total > 0
    assert [path.name for path in merge_folder.iterdir()] == ["out"]
    for outcome in ("ok", "merge_cancelled"):
        assert server.metric("lorikeet_merges_total", outcome=outcome) == 1

    local.mkdir()
    handler = signal.getsignal(signal.SIGTERM)
    command = ["merge", "--model", str(tiny_model), "--adapter", str(adapter), "--out", str(local / "out")]
    assert run([*command, "--unverified"]) == 0
    signal.signal(signal.SIGTERM, handler)
    assert contents(merge_folder / "out") == contents(local / "out")
