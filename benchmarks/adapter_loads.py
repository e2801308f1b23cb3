"""Loading large adapters: without pause on a thread of its own, or one by one beside the plain work it contains."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from adapter_files import LargeAdapter
from lorikeet.adapters.info import Tier
from lorikeet.server.app import App

READ_BYTES = 8 * 2**20


class ContinuousLoads:
    """Disk to device and away again, over and over, each time another version. `start` it, then `stop` it.

    Args:
        server: loads them.
        adapter: its content changes with every load.
    """

    def __init__(self, server: App, adapter: LargeAdapter) -> None:
        self._server = server
        self._adapter = adapter
        self._stopping = threading.Event()
        self._spans: list[tuple[float, float]] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="continuous-loads", daemon=True)

    def start(self) -> None:
        """Begin the first load."""
        self._thread.start()

    def stop(self) -> None:
        """Wait for the load under way, and start no other.

        Raises:
            RuntimeError: a load failed; then there were too few.
        """
        self._stopping.set()
        self._thread.join()
        if self._error is not None:
            raise RuntimeError("a load failed while streams were running") from self._error

    def loads_during(self, begin: float, end: float) -> float:
        """How many loads fell into a time; one that was cut counts as the part of it that lies inside."""
        return sum(max(0.0, min(b, end) - max(a, begin)) / (b - a) for a, b in self._spans)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._adapter.renew()
                begin = time.perf_counter()
                self._server.manager.load("incoming", self._adapter.name)
                self._server.manager.prefetch("incoming", Tier.DEVICE)
                self._spans.append((begin, time.perf_counter()))
                self._server.manager.unload("incoming")
        except BaseException as error:
            self._error = error


@dataclass(slots=True)
class LoadTimes:
    """Seconds of each, one for each load; the lists go together.

    Attributes:
        bare_read: reading the weights file into memory and hashing it, and nothing else.
        load: `manager.load`: read, hashed, checked, packed, its files kept on disk, published.
        read_again: a version whose copies were evicted comes back to host memory.
        plain_copy: bytes of the packed adapter from host memory to the device.
        activate: `prefetch` of a version in host memory to the device.
    """

    bare_read: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    read_again: list[float] = field(default_factory=list)
    plain_copy: list[float] = field(default_factory=list)
    activate: list[float] = field(default_factory=list)


def time_loads(server: App, adapters: Sequence[LargeAdapter], loads: int) -> LoadTimes:
    """Load two adapters in turn, of which only one fits into host memory and one on the device.

    Each step is timed right beside the plain work that it contains, now before and now after it.

    Args:
        server: has nothing else to do.
        adapters: two, of one size.
        loads: of each; one more comes first and is not timed.
    """
    manager, dtype = server.manager, server.manager.store.arena.dtype
    source = torch.ones(adapters[0].num_elements, dtype=dtype, pin_memory=manager.store.device.type == "cuda")
    target = torch.zeros(adapters[0].num_elements, dtype=dtype, device=manager.store.device)
    times = LoadTimes()
    for number in range(loads + 1):
        timed = times if number else LoadTimes()
        for i, adapter in enumerate(adapters):
            this, other = f"incoming-{i}", f"incoming-{1 - i}"
            adapter.renew()
            _side_by_side(
                (timed.bare_read, lambda path=adapter.weights: _read_and_hash(path)),
                (timed.load, lambda name=this, source=adapter.name: manager.load(name, source)),
                turn=number,
            )
            _side_by_side(
                (timed.plain_copy, lambda: _copy(source, target)),
                (timed.activate, lambda name=this: manager.prefetch(name, Tier.DEVICE)),
                turn=number,
            )
            if number:
                assert manager.get(other).tier is Tier.DISK, "its copies were to make room"
                _clock(timed.read_again, lambda name=other: manager.prefetch(name, Tier.HOST))
    for i in range(len(adapters)):
        manager.unload(f"incoming-{i}")
    return times


def _side_by_side(*timed: tuple[list[float], Callable[[], object]], turn: int) -> None:
    for seconds, work in timed if turn % 2 else timed[::-1]:
        _clock(seconds, work)


def _clock(seconds: list[float], work: Callable[[], object]) -> None:
    begin = time.perf_counter()
    work()
    seconds.append(time.perf_counter() - begin)


def _read_and_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        data = memoryview(bytearray(os.fstat(file.fileno()).st_size))
        filled = 0
        while count := file.readinto(data[filled : filled + READ_BYTES]):
            digest.update(data[filled : filled + count])
            filled += count
    return digest.hexdigest()


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
    if target.is_cuda:
        torch.cuda.synchronize()
