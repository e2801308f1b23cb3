"""Disks, devices and databases that fail now and then: patched functions, each with a probability."""

import errno
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.state import version_files
from lorikeet.adapters.state.database import StateDatabase

from .contents import WEIGHTS

# kind -> probability a call.
PROBABILITIES: Final = {
    "read": 0.01,  # EIO in a read of a weights file
    "short read": 0.05,  # a read returns less than was asked for
    "device": 0.04,  # OutOfMemory while a version is copied to the device
    "store": 0.05,  # ENOSPC in the version store, after half of a file
    "slow commit": 0.1,
}
SLOW_COMMIT_S: Final = 0.05
# From a fault until every request that it fails has been failed: those too that came to wait meanwhile.
HANDLED_S: Final = 1.0


class Faults:
    """Patches the functions for as long as the test lasts; nothing happens while `enabled` is False.

    Args:
        monkeypatch: undoes it.
        seed: of the draws. Threads draw from it in the order in which they come.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.enabled = False
        self._rng = random.Random(f"{seed}/faults")
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._last: dict[str, float] = {}
        self._patch(monkeypatch)

    def counts(self) -> Counter[str]:
        """How often each kind has happened."""
        with self._lock:
            return self._counts.copy()

    def happened_since(self, kind: str, asked_at: float) -> bool:
        """Whether one happened after `time.monotonic()` was `asked_at`, or before and was still being dealt with."""
        with self._lock:
            return self._last.get(kind, -HANDLED_S) > asked_at - HANDLED_S

    def _happens(self, kind: str) -> bool:
        if not self.enabled:
            return False
        with self._lock:
            happens = self._rng.random() < PROBABILITIES[kind]
            self._counts[kind] += happens
            if happens:
                self._last[kind] = time.monotonic()
            return happens

    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        readv, write, write_durably = os.readv, DeviceStore.write, version_files.write_durably

        def failing_readv(descriptor: int, buffers: list[memoryview]) -> int:
            if not self.enabled or not os.readlink(f"/proc/self/fd/{descriptor}").endswith(WEIGHTS):
                return readv(descriptor, buffers)
            if self._happens("read"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if len(buffers[0]) > 1 and self._happens("short read"):
                buffers = [buffers[0][: len(buffers[0]) // 2]]
            return readv(descriptor, buffers)

        def failing_write(store: DeviceStore, *args: Any) -> None:
            if self._happens("device"):
                raise torch.OutOfMemoryError("no memory left on the device (injected)")
            write(store, *args)

        def failing_write_durably(path: Path, pieces: Iterable[memoryview]) -> None:
            if self._happens("store"):
                path.write_bytes(b"half of it")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_durably(path, pieces)

        def slowed(method: Callable[..., Any]) -> Callable[..., Any]:
            def slow(*args: Any) -> Any:
                if self._happens("slow commit"):
                    time.sleep(SLOW_COMMIT_S)
                return method(*args)

            return slow

        monkeypatch.setattr(os, "readv", failing_readv)
        monkeypatch.setattr(DeviceStore, "write", failing_write)
        monkeypatch.setattr(version_files, "write_durably", failing_write_durably)
        for name in ("save", "delete", "save_alias", "delete_alias"):
            monkeypatch.setattr(StateDatabase, name, slowed(getattr(StateDatabase, name)))
