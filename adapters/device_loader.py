"""The thread that brings wanted versions to the device, and fails draining ones at their deadline.

Wishes are served oldest first: one that does not fit yet is not overtaken, or a large adapter could wait for ever.
Reading from disk happens on other threads meanwhile. Nothing here waits for work while it holds the lock.
"""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import structlog
import torch

from .background import start_pool
from .device_store import DeviceStore, Placement
from .errors import AdapterMemoryError, ServingError
from .info import Tier
from .packing import PackedAdapter
from .priority import low_priority, normal_priority
from .registry import Registry
from .version import AdapterVersion

# While something is wanted and does not fit, look again after this time: leases end without anyone saying so.
RETRY_S = 1.0

_log = structlog.get_logger(__name__)


class Events(NamedTuple):
    """Whom the loader tells and asks, without any lock held.

    Attributes:
        on_ready: a version is on the device or has failed, or step_work has something to do.
        on_version_dropped: a version that requests still hold passed its drain deadline.
        on_progress: evictions may have to be reported.
        on_dead: the thread ended by an unexpected error: nothing will come to the device any more.
        is_running: whether requests run now, which a copy on the CPU would take cores from.
    """

    on_ready: Callable[[], None]
    on_version_dropped: Callable[[AdapterVersion], None]
    on_progress: Callable[[], None]
    on_dead: Callable[[BaseException], None]
    is_running: Callable[[], bool]


class _Copy(NamedTuple):
    version: AdapterVersion
    packed: PackedAdapter
    placement: Placement


class DeviceLoader:
    """One thread; `start` and `close` it once.

    Args:
        changed: the manager's lock; notified when the registry changed.
        registry: guarded by `changed`.
        store: bookkeeping guarded by `changed`, see its module.
        read_again: starts to read a version whose host copy was just claimed, on another thread.
        events: whom to tell.

    Attributes:
        compaction_wanted: set under the lock when free memory is scattered; nothing is copied until the step thread has
            compacted the store and calls `compacted`.
    """

    def __init__(
        self,
        changed: threading.Condition,
        registry: Registry,
        store: DeviceStore,
        read_again: Callable[[AdapterVersion], object],
        events: Events,
    ) -> None:
        self.compaction_wanted = False
        self._changed = changed
        self._registry = registry
        self._store = store
        self._read_again = read_again
        self._events = events
        self._closed = False
        self._not_before = 0.0  # `time.monotonic()` second of the next copy, after one found no memory
        cuda = store.device.type == "cuda"
        # A copy on the CPU is work of the cores that the step thread's team runs on; on CUDA it is the device's.
        self._pool = start_pool(1, "adapter-device", normal_priority if cuda else low_priority)
        # While nothing runs all cores may copy, which takes less time than one thread takes.
        self._idle_pool = None if cuda else start_pool(1, "adapter-device-idle", low_priority, with_team=True)
        self._copy_stream = torch.cuda.Stream(store.device) if cuda else None
        # Where kernels that read the arena run; known once the step thread has called step_work.
        self.compute_stream = torch.cuda.default_stream(store.device) if cuda else None

    def start(self) -> None:
        """Start serving wishes."""
        self._pool.submit(self._run)

    def close(self) -> None:
        """End the thread, after the copy it is making."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.shutdown(wait=True)
        if self._idle_pool is not None:
            self._idle_pool.shutdown(wait=True)

    def compacted(self) -> None:
        """The store has been compacted; called with the lock held."""
        self.compaction_wanted = False
        self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            _log.exception("adapter_loader_died")
            self._tell(self._events.on_dead, error)

    def _serve(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                dropped = self._registry.expire(time.monotonic())
                compacting = self.compaction_wanted
                copy = self._next_copy()
                asks = self.compaction_wanted and not compacting
                if copy is None and not dropped and not asks:
                    self._changed.wait(self._patience())
                    continue
            if asks:
                self._tell(self._events.on_ready)
            for version in dropped:
                self._tell(self._events.on_version_dropped, version)
            if copy is not None:
                self._bring_in(copy)
            self._tell(self._events.on_progress)

    def _patience(self) -> float | None:
        """How long to wait for a change, in seconds."""
        deadline = self._registry.next_deadline()
        timeouts = [RETRY_S] if self._registry.wanted or self._registry.host_wanted else []
        if deadline is not None:
            timeouts.append(max(0.0, deadline - time.monotonic()))
        return min(timeouts, default=None)

    def _next_copy(self) -> _Copy | None:
        """Start reading wanted versions that are on disk; return the oldest wish in host memory if it fits."""
        registry = self._registry
        for version, record in registry.wanted.items():
            if record.host is None and not record.host_claimed:
                if not registry.claim_host(version, urgent=True):
                    break
                self._read_again(version)
        for version, record in list(registry.host_wanted.items()):
            if registry.claim_host(version, urgent=record.pinned is Tier.HOST):
                self._read_again(version)
        if self.compaction_wanted or time.monotonic() < self._not_before:
            return None
        head = next((r for r in registry.wanted.values() if r.host is not None and not r.device_claimed), None)
        if head is None or not registry.claim_device(head.version, time.monotonic()):
            return None
        packed = head.host
        assert isinstance(packed, PackedAdapter)
        placement = self._store.reserve(packed)
        if placement is None:
            registry.abandon_device(head.version)
            self.compaction_wanted = True
            return None
        return _Copy(head.version, packed, placement)

    def _bring_in(self, copy: _Copy) -> None:
        try:
            self._write(copy)
        except Exception as cause:
            # Whatever went wrong must neither end this thread nor reach the step loop.
            _log.exception("adapter_copy_failed", adapter=copy.version.adapter_id, digest=copy.version.digest)
            out_of_memory = isinstance(cause, torch.OutOfMemoryError | MemoryError)
            with self._changed:
                self._store.remove(copy.placement.slot)
                self._registry.abandon_device(copy.version)
                if out_of_memory:
                    self._not_before = time.monotonic() + RETRY_S
                    self._registry.fail_waiting(copy.version, _out_of_memory(copy.version.adapter_id))
                else:
                    self._registry.fail_version(copy.version, _not_copied(copy.version.adapter_id))
                self._changed.notify_all()
        else:
            with self._changed:
                self._registry.fill_device(copy.version, copy.placement.slot, time.monotonic())
                self._changed.notify_all()
        self._tell(self._events.on_ready)

    def _write(self, copy: _Copy) -> None:
        if self._copy_stream is None:
            if self._idle_pool is None or self._events.is_running():
                in_turns = True  # with the step's threads
                self._store.write(copy.placement, copy.packed, in_turns)
            else:
                self._idle_pool.submit(self._store.write, copy.placement, copy.packed).result()
            return
        # Kernels already launched may still read the extent's previous owner.
        assert self.compute_stream is not None
        self._copy_stream.wait_stream(self.compute_stream)
        try:
            with torch.cuda.stream(self._copy_stream):
                self._store.write(copy.placement, copy.packed)
        finally:  # also a copy of a failed write goes on until it has ended
            self._copy_stream.synchronize()

    def _tell(self, callback: Callable[..., None], *args: object) -> None:
        try:
            callback(*args)
        except Exception:
            _log.exception("adapter_callback_failed")


def _out_of_memory(adapter_id: str) -> AdapterMemoryError:
    return AdapterMemoryError(
        f"The device had no memory left while adapter {adapter_id!r} was copied to it. Try again, or lower what the "
        "server holds there (--kv-cache-bytes, --adapter-device-bytes).",
        {"adapter_id": adapter_id},
    )


def _not_copied(adapter_id: str) -> ServingError:
    return ServingError(f"Adapter {adapter_id!r} could not be copied to the device; the server's log has the details.")
