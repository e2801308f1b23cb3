"""Merges on a server in this process, over gRPC, one after the other for as long as somebody measures."""

import asyncio
import itertools
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorikeet.protos.v1.adapters_pb2_grpc import AdapterServiceServicer
from lorikeet.protos.v1.generation_pb2_grpc import GenerationServiceServicer
from lorikeet.server.app import App
from lorikeet.server.client import LorikeetClient
from lorikeet.server.client_merges import MergeOptions
from lorikeet.server.grpc_server import GrpcServer
from lorikeet.server.merge_service import MergePlace, MergeService
from lorikeet.server.operations_service import OperationsService
from lorikeet.server.status import RemoteError


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


class ContinuousMerges:
    """Merges that follow each other from `start` to `stop`.

    Args:
        client: from `merge_client`.
        directory: the server's `--merge-dir`.
        adapter_id: what is merged.
        options: of each merge.

    Attributes:
        seconds: that each whole merge took.
    """

    def __init__(self, client: LorikeetClient, directory: Path, adapter_id: str, options: MergeOptions) -> None:
        self.seconds: list[float] = []
        self._client, self._directory, self._adapter_id, self._options = client, directory, adapter_id, options
        self._trouble: RemoteError | None = None
        self._stopping = threading.Event()
        self._name = ""
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

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
                self.seconds.append(time.perf_counter() - begin)
                shutil.rmtree(self._directory / output)
        except RemoteError as error:
            if not self._stopping.is_set():
                self._trouble = error
