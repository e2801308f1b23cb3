"""Merges on a server in this process, over gRPC, one after the other for as long as somebody measures."""

import asyncio
import contextlib
import itertools
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from lorikeet.protos.v1.adapters_pb2_grpc import AdapterServiceServicer
from lorikeet.protos.v1.generation_pb2_grpc import GenerationServiceServicer
from lorikeet.server.app import App
from lorikeet.server.client import LorikeetClient
from lorikeet.server.client_merges import MergeOptions, progress_of
from lorikeet.server.grpc_server import GrpcServer
from lorikeet.server.merge_service import MergePlace, MergeService
from lorikeet.server.operations_service import OperationsService
from lorikeet.server.status import RemoteError

STAGE_TIMEOUT_S = 600.0
_POLL_S = 0.02


@contextmanager
def merge_client(app: App) -> Iterator[LorikeetClient]:
    """A client of the merges of a server that `local_server` made."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[GrpcServer, MergeService, int]:
        place = MergePlace(app.config, app.base.fingerprint, app.state.incoming)
        merges = MergeService(app.manager, place, app.metrics)
        others = GenerationServiceServicer(), AdapterServiceServicer()
        server = GrpcServer(2**22, app.metrics.on_call)
        port = await server.start("127.0.0.1", 0, *others, merges, OperationsService(merges.operations))
        return server, merges, port

    server, merges, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        with LorikeetClient(f"127.0.0.1:{port}") as client:
            yield client
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result()
        asyncio.run_coroutine_threadsafe(merges.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@dataclass(frozen=True, slots=True)
class MergeWork:
    """What merges did in a window.

    Attributes:
        core_share: processor seconds of their processes for each second.
        ended_s: seconds that each took which ended.
        begin, end: stage of the merge that ran when the window began and ended, and how much of it was done, 0 to 1.
    """

    core_share: float
    ended_s: list[float]
    begin: tuple[str, float]
    end: tuple[str, float]

    def __str__(self) -> str:
        ended = f", {len(self.ended_s)} ended" if self.ended_s else ""
        places = " -> ".join(f"{stage} {done:.0%}" for stage, done in (self.begin, self.end))
        return f"{self.core_share:.0%} of a core, {places}{ended}"


class ContinuousMerges:
    """Merges that follow each other from `start` to `stop`.

    Args:
        client: from `merge_client`.
        directory: the server's `--merge-dir`.
        adapter_id: what is merged.
        options: of each merge.
    """

    def __init__(self, client: LorikeetClient, directory: Path, adapter_id: str, options: MergeOptions) -> None:
        self._seconds: list[float] = []
        self._client, self._directory, self._adapter_id, self._options = client, directory, adapter_id, options
        self._trouble: RemoteError | None = None
        self._stopping = threading.Event()
        self._name = ""
        self._mark = 0.0, 0.0, ("", 0.0)
        self._thread = threading.Thread(target=self._run)

    def start(self, stage: str = "") -> None:
        """Begin, and wait until a stage of the first one whose name begins so.

        Raises:
            RuntimeError: it does not come to it.
        """
        self._thread.start()
        deadline = time.monotonic() + STAGE_TIMEOUT_S
        while stage and not self._place()[0].startswith(stage):
            if time.monotonic() > deadline or not self._thread.is_alive():
                raise RuntimeError(f"the merge did not come to the stage {stage!r}")
            time.sleep(_POLL_S)

    def mark(self) -> None:
        """A window begins: what `work` says is from here on."""
        self._seconds.clear()
        self._mark = time.perf_counter(), _processor_s(), self._place()

    def work(self) -> MergeWork:
        """What was done since `mark`."""
        then, used, begin = self._mark
        share = (_processor_s() - used) / (time.perf_counter() - then)
        return MergeWork(round(share, 4), [round(s, 3) for s in self._seconds], begin, self._place())

    def stop(self) -> None:
        """Cancel the one that runs, and begin no more.

        Raises:
            RemoteError: a merge failed.
        """
        self._stopping.set()
        if self._name:
            self._client.merges.cancel(self._name)
        self._thread.join()
        if self._trouble is not None:
            raise self._trouble

    def _place(self) -> tuple[str, float]:
        if not self._name:
            return "", 0.0
        progress = progress_of(self._client.merges.get(self._name))
        return progress.stage, round(progress.done / progress.total, 4) if progress.total else 0.0

    def _run(self) -> None:
        try:
            for number in itertools.count():
                if self._stopping.is_set():
                    return
                begin = time.perf_counter()
                output = f"merged-{time.monotonic_ns()}-{number}"
                operation = self._client.merges.start({self._adapter_id: 1.0}, output, **self._options)
                self._name = operation.name
                self._client.merges.follow(operation)
                self._seconds.append(time.perf_counter() - begin)
                shutil.rmtree(self._directory / output)
        except RemoteError as error:
            if not self._stopping.is_set():
                self._trouble = error


def _processor_s() -> float:
    """Of all processes that this one has started, and that those have."""
    own = psutil.Process()
    total = sum(own.cpu_times()[2:4])  # of those that have ended
    for child in own.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += sum(child.cpu_times()[:4])
    return total
