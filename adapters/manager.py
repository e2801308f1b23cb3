"""The adapters of a server: loading, replacing, unloading, and bringing them to the device. Thread-safe.

Four kinds of threads meet here. Callers of `load` wait (in an executor); a small pool reads, checks and packs; one
thread copies to the device (`DeviceLoader`); the engine's step thread activates versions and compacts the arena between
steps. All of them share one lock, held for bookkeeping only: never while something is read, copied or waited for.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import structlog
import torch

from .device_loader import DeviceLoader, Events
from .device_store import DeviceStore
from .errors import AdapterMemoryError, AdapterUnloadedError, ServingError
from .fingerprint import BaseFingerprint
from .info import AdapterInfo, AdapterObserver, AdapterStats, SilentObserver, Tier
from .listing import get_info, list_infos, record_info
from .paths import adapter_directory, check_adapter_id
from .reader import AdapterReader, LoadedAdapter
from .registry import Registry
from .sites import SiteTable
from .version import AdapterVersion

# Adapters read from disk at a time. Reading is bound by the disk and by one core a thread for hashing. Those that
# requests wait for have threads of their own, so that a folder full of new adapters does not delay them.
LOAD_THREADS: Final = 4
REREAD_THREADS: Final = 2
DRAIN_DEADLINE_S: Final = 300.0

_log = structlog.get_logger(__name__)


def _ignore(*_: object) -> None:
    """Default of the callbacks."""


class AdapterManager:
    """See the module. `start` it before requests come; `close` it after the engine has stopped.

    Args:
        site_table: the base's sites.
        base: its name.
        dtype: compute type, of the arena.
        device: where the base runs.
        device_budget_bytes: size of the arena, allocated at once.
        host_budget_bytes: packed adapters kept in host memory.
        roots: directories that adapters may be loaded from.
        max_slots: adapters on the device at most.
        drain_deadline_s: how long requests may go on with a version after it was unloaded or replaced.
        observer: told of loads and evictions.
        allow_zero: accept adapters whose delta is zero, whoever loads them.

    Attributes:
        store: the arena and its tables, read by the LoRA layers.
        on_ready: called on a loader thread when a version came to the device or failed, or `step_work` has work: the
            engine should run its loop. Set by the engine.
        on_version_dropped: called on a loader thread when a version that requests still hold passed its drain deadline;
            the engine fails them and then deactivates and releases as usual. Set by the engine.
        on_dead: called on a loader thread that ends by an unexpected error: no adapter will come to the device any
            more, so the process should end.
    """

    def __init__(
        self,
        site_table: SiteTable,
        base: BaseFingerprint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        device_budget_bytes: int,
        host_budget_bytes: int,
        roots: Sequence[Path],
        max_slots: int = 1024,
        drain_deadline_s: float = DRAIN_DEADLINE_S,
        observer: AdapterObserver | None = None,
        allow_zero: bool = False,
    ) -> None:
        self.store = DeviceStore(site_table, dtype, device, device_budget_bytes, max_slots)
        self.on_ready: Callable[[], None] = _ignore
        self.on_version_dropped: Callable[[AdapterVersion], None] = _ignore
        self.on_dead: Callable[[BaseException], None] = _ignore
        self._roots = tuple(roots)
        self._drain_deadline_s = drain_deadline_s
        self._observer = observer or SilentObserver()
        self._allow_zero = allow_zero
        self._changed = threading.Condition()
        self._evictions: list[Tier] = []  # not yet reported; guarded by the lock
        self._registry = Registry(
            host_budget=host_budget_bytes,
            device_budget=self.store.capacity_bytes,
            max_slots=max_slots,
            free_slot=self.store.remove,
            on_evict=self._evictions.append,
        )
        self._reader = AdapterReader(
            site_table,
            base,
            dtype=dtype,
            pin_memory=device.type == "cuda",
            roots=self._roots,
            max_bytes=min(host_budget_bytes, self.store.capacity_bytes),
        )
        self._pool = ThreadPoolExecutor(LOAD_THREADS, thread_name_prefix="adapter-load")
        self._reread_pool = ThreadPoolExecutor(REREAD_THREADS, thread_name_prefix="adapter-reread")
        self._loader = DeviceLoader(
            self._changed,
            self._registry,
            self.store,
            read_again=lambda version: self._reread_pool.submit(self._read_again, version),
            events=Events(
                on_ready=lambda: self.on_ready(),
                on_version_dropped=lambda version: self.on_version_dropped(version),
                on_progress=self._report_evictions,
                on_dead=lambda error: self.on_dead(error),
            ),
        )

    def start(self) -> None:
        """Start bringing adapters to the device."""
        self._loader.start()

    def close(self) -> None:
        """End all threads; loads that have not begun fail."""
        self._loader.close()
        self._reread_pool.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)

    # For clients and the folder watcher; any thread.

    def load(self, adapter_id: str, path: Path | None = None, *, allow_zero: bool = False) -> AdapterInfo:
        """Read an adapter and make it the current version of its id; blocks until it is usable.

        The same content again changes nothing. Other content becomes a new version: later requests get it, earlier ones
        finish on theirs until the drain deadline.

        Args:
            adapter_id: what users name.
            path: directory inside a root, absolute or relative to a root; None means `<root>/<adapter_id>`.
            allow_zero: accept an adapter whose delta is zero everywhere.

        Raises:
            ServingError: AdapterIdError, AdapterNotFoundError (no such folder), AdapterInvalidError,
                AdapterIncompatibleError, AdapterMemoryError, AdapterUnloadedError (unloaded meanwhile, or shut down).
        """
        try:
            return self.load_in_background(adapter_id, path, allow_zero=allow_zero).result()
        except CancelledError:
            raise _shutting_down() from None

    def load_in_background(
        self, adapter_id: str, path: Path | None = None, *, allow_zero: bool = False
    ) -> Future[AdapterInfo]:
        """Like `load`, without waiting. The id and the path are checked at once."""
        directory = adapter_directory(self._roots, adapter_id, path)
        with self._changed:
            ticket = self._registry.begin_load(adapter_id)
        try:
            return self._pool.submit(self._load, adapter_id, directory, ticket, allow_zero or self._allow_zero)
        except RuntimeError:  # the pool was shut down
            raise _shutting_down() from None

    def note_failure(self, adapter_id: str, error: ServingError) -> None:
        """Show an id as failed although no load was tried, because its folder is not acceptable."""
        with self._changed:
            self._registry.fail_load(adapter_id, self._registry.begin_load(adapter_id), error)

    def unload(self, adapter_id: str) -> None:
        """Forget an id, and return at once. Requests that hold its version may finish until the drain deadline.

        Raises:
            AdapterIdError: malformed id.
            AdapterNotFoundError: nothing of that id is known.
        """
        check_adapter_id(adapter_id)
        with self._changed:
            self._registry.unload(adapter_id, time.monotonic() + self._drain_deadline_s)
            self._changed.notify_all()
        _log.info("adapter_unloaded", adapter=adapter_id)

    def unload_from(self, adapter_id: str, directory: Path) -> None:
        """Unload an id whose folder is gone, unless its current version was loaded from elsewhere since.

        Args:
            adapter_id: what users name; nothing happens if nothing of that id is known.
            directory: real path that it was loaded from.
        """
        with self._changed:
            record = self._registry.current.get(adapter_id)
            known = record is not None or adapter_id in self._registry.loading or adapter_id in self._registry.failed
            if not known or (record is not None and record.origin.directory != directory):
                return
            self._registry.unload(adapter_id, time.monotonic() + self._drain_deadline_s)
            self._changed.notify_all()
        _log.info("adapter_unloaded", adapter=adapter_id, why="its folder is gone")

    def get(self, adapter_id: str) -> AdapterInfo:
        """The current version of an id, or its load under way, or its failure.

        Raises:
            AdapterIdError: malformed id.
            AdapterNotFoundError: nothing of that id is known.
        """
        check_adapter_id(adapter_id)
        with self._changed:
            return get_info(self._registry, adapter_id)

    def list(self) -> list[AdapterInfo]:
        """All versions, draining ones included, and ids that are loading or failed; sorted by id."""
        with self._changed:
            return list_infos(self._registry)

    def snapshot(self) -> AdapterStats:
        """A consistent picture for metrics."""
        with self._changed:
            memory = self._registry.memory
            return AdapterStats(
                adapters=tuple(list_infos(self._registry)),
                bytes_used={Tier.HOST: memory.host_used, Tier.DEVICE: memory.device_used},
                bytes_budget={Tier.HOST: memory.host_budget, Tier.DEVICE: memory.device_budget},
                wanted=len(self._registry.wanted),
            )

    # For requests.

    def resolve(self, adapter_id: str) -> AdapterVersion:
        """Pin the current version for one request; never blocks on disk. Every resolve needs one release.

        Raises:
            AdapterIdError: malformed id.
            AdapterNotFoundError: unknown, still loading for the first time, or failed.
        """
        check_adapter_id(adapter_id)
        with self._changed:
            return self._registry.resolve(adapter_id)

    def release(self, version: AdapterVersion) -> None:
        """The request that pinned the version ended."""
        with self._changed:
            self._registry.release(version)
            self._notify_if_wanted()

    # For the engine's step thread.

    def try_activate(self, version: AdapterVersion) -> int | None:
        """The version's device slot, in use until `deactivate`; None when it is not there yet: it will be brought in.

        Raises:
            ServingError: the version failed, or was dropped at its drain deadline.
        """
        with self._changed:
            known = version in self._registry.wanted
            slot = self._registry.activate(version)
            if slot is None and not known:
                self._changed.notify_all()
            return slot

    def deactivate(self, version: AdapterVersion) -> None:
        """The request no longer runs on the version's slot (it ended, or was preempted)."""
        with self._changed:
            self._registry.deactivate(version)
            self._notify_if_wanted()

    def step_work(self) -> None:
        """Call between steps: compacts the arena when a version waits for contiguous memory. Else costs nothing."""
        loader = self._loader
        if loader.compute_stream is not None:
            loader.compute_stream = torch.cuda.current_stream(self.store.device)
        if not loader.compaction_wanted:
            return
        started = time.monotonic()
        with self._changed:
            moves = self.store.plan_compaction()
        # Outside the lock: the loader copies nothing meanwhile, and extents freed meanwhile are moved in vain, no more.
        self.store.move(moves)
        with self._changed:
            loader.compacted()
        _log.info("adapter_memory_compacted", moves=len(moves), seconds=time.monotonic() - started)

    # On the disk threads.

    def _load(self, adapter_id: str, directory: Path, ticket: int, allow_zero: bool) -> AdapterInfo:
        started = time.monotonic()
        outcome = "ok"
        try:
            try:
                loaded = self._read(adapter_id, directory, allow_zero)
            except ServingError as error:
                with self._changed:
                    self._registry.fail_load(adapter_id, ticket, error)
                raise
            return self._publish(AdapterVersion(adapter_id, loaded.digest), ticket, loaded)
        except ServingError as error:
            outcome = error.reason
            _log.warning("adapter_load_failed", adapter=adapter_id, reason=error.reason, message=error.message)
            raise
        finally:
            self._observer.on_load(adapter_id, outcome, time.monotonic() - started)
            self._report_evictions()

    def _publish(self, version: AdapterVersion, ticket: int, loaded: LoadedAdapter) -> AdapterInfo:
        """Make a loaded version current, and keep its host copy if the budget has room."""
        with self._changed:
            record = self._registry.finish_load(
                version,
                ticket,
                loaded.origin,
                host_bytes=loaded.packed.nbytes,
                device_bytes=self.store.extent_bytes(loaded.packed),
                drain_until=time.monotonic() + self._drain_deadline_s,
            )
            if record is None:
                if version.adapter_id in self._registry.current:
                    return get_info(self._registry, version.adapter_id)  # a later load was faster
                raise AdapterUnloadedError(f"Adapter {version.adapter_id!r} was unloaded while it was being loaded.")
            if self._registry.claim_host(version, urgent=False):
                self._registry.fill_host(version, loaded.packed)
            self._changed.notify_all()
            info = record_info(record)
        _log.info("adapter_loaded", adapter=version.adapter_id, digest=version.digest, bytes=info.bytes)
        if info.warning:
            _log.warning("adapter_base_name", adapter=version.adapter_id, warning=info.warning)
        return info

    def _read_again(self, version: AdapterVersion) -> None:
        """Bring back the host copy of a version that was evicted; its memory is already claimed."""
        started = time.monotonic()
        with self._changed:
            directory = self._registry.records[version].origin.directory
        outcome = "ok"
        try:
            loaded = self._read(version.adapter_id, directory, allow_zero=True)
            if loaded.digest != version.digest:
                raise AdapterUnloadedError("Its folder holds other content now.")
        except ServingError as cause:
            outcome = cause.reason
            error = AdapterUnloadedError(
                f"Adapter {version} had left memory and could not be read again. {cause.message}"
            )
            _log.warning(
                "adapter_reread_failed", adapter=version.adapter_id, digest=version.digest, message=cause.message
            )
            with self._changed:
                self._registry.abandon_host(version)
                self._registry.fail_version(version, error)
        else:
            with self._changed:
                self._registry.fill_host(version, loaded.packed)
                self._changed.notify_all()
        self._observer.on_load(version.adapter_id, outcome, time.monotonic() - started)
        self._report_evictions()
        if outcome != "ok":
            self.on_ready()

    def _read(self, adapter_id: str, directory: Path, allow_zero: bool) -> LoadedAdapter:
        """Read an adapter; whatever goes wrong becomes a ServingError."""
        try:
            return self._reader.read(directory, allow_zero=allow_zero)
        except ServingError:
            raise
        except MemoryError:
            raise AdapterMemoryError(f"The host has no memory left to read adapter {adapter_id!r}.") from None
        except Exception:
            _log.exception("adapter_read_failed", adapter=adapter_id)
            raise ServingError(f"Adapter {adapter_id!r} could not be read; the server's log has the details.") from None

    def _report_evictions(self) -> None:
        with self._changed:
            evictions = self._evictions.copy()
            self._evictions.clear()
        for tier in evictions:
            self._observer.on_evict(tier)

    def _notify_if_wanted(self) -> None:
        """Memory may have become free for a waiting version; called with the lock held."""
        if self._registry.wanted:
            self._changed.notify_all()


def _shutting_down() -> AdapterUnloadedError:
    return AdapterUnloadedError("The server is shutting down and loads no more adapters.")
