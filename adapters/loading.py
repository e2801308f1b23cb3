"""From a source to a published version: fetch, read, check, prove, keep, publish. On disk threads of low priority."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from .background import start_pool
from .core import ManagerCore
from .errors import AdapterUnloadedError, ServingError
from .info import AdapterInfo, LoadOptions, LoadPlan
from .origin import Origin
from .planning import make_plan
from .priority import idle_priority, low_priority
from .publishing import Intent, OverruledError, check_is_no_alias, publish
from .reader import LoadedAdapter
from .record import Record
from .source_reader import Source, SourceReader, StoredSource, trusting
from .sources.locate import LocalSource, RemoteSource, SourcePolicy, locate
from .version import AdapterVersion
from .version_copies import link_files, write_files

# Adapters read from disk at a time. Reading is bound by the disk and by one core a thread for hashing. Those that
# requests wait for have threads of their own, so that a folder full of new adapters does not delay them; so have kept
# versions, so that a rollback does not wait for slow downloads.
LOAD_THREADS: Final = 4
KEPT_THREADS: Final = 2
REREAD_THREADS: Final = 2

_log = structlog.get_logger(__name__)


class _Job(NamedTuple):
    adapter_id: str
    source: Source
    ticket: int
    intent: Intent


class AdapterLoads:
    """Loads under way. Thread-safe.

    Args:
        core: registry, locks and state.
        reader: reads and packs, from wherever they are.
        sources: where adapters may come from.
        on_failed: called when a version that requests wait for cannot come.
    """

    def __init__(
        self,
        core: ManagerCore,
        reader: SourceReader,
        sources: SourcePolicy,
        on_failed: Callable[[], None],
    ) -> None:
        self._core = core
        self._on_failed = on_failed
        self._reader = reader
        self._sources = sources
        self._pool = start_pool(LOAD_THREADS, "adapter-load", idle_priority)
        self._kept_pool = start_pool(KEPT_THREADS, "adapter-kept", idle_priority)
        self._reread_pool = start_pool(REREAD_THREADS, "adapter-reread", low_priority)

    def close(self) -> None:
        """End the threads; loads that have not begun fail, downloads are broken off."""
        self._reader.close()
        self._reread_pool.shutdown(wait=True, cancel_futures=True)
        self._kept_pool.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(
        self, adapter_id: str, source: str | Path | None, options: LoadOptions, *, by_call: bool
    ) -> Future[AdapterInfo]:
        """Begin to load an id and to make what is found current. The id and the source are checked at once.

        Raises:
            AdapterIdError, AdapterSourceError, AdapterNotFoundError, AdapterExistsError: it is not even tried.
        """
        located = locate(self._sources, adapter_id, source)
        text = str(source) if by_call and source is not None else ""
        return self.start_from(
            adapter_id, located, Intent(by_call, self._is_folder(adapter_id, located), text, options)
        )

    def start_from(self, adapter_id: str, source: Source, intent: Intent) -> Future[AdapterInfo]:
        """Begin to load an id from a located source."""
        with self._core.changed:
            check_is_no_alias(self._core, adapter_id)
            ticket = self._core.registry.loading.begin(adapter_id)
        try:
            return self._pool_for(source).submit(self._load, _Job(adapter_id, source, ticket, intent))
        except RuntimeError:  # the pool was shut down
            self._core.fail_load(adapter_id, ticket, shutting_down())
            raise shutting_down() from None

    def plan(self, adapter_id: str, source: str | Path | None, options: LoadOptions) -> LoadPlan:
        """Read and check an adapter, and find out what loading it would do.

        Raises:
            ServingError: as loading it would.
        """
        located = locate(self._sources, adapter_id, source)
        with self._core.changed:
            check_is_no_alias(self._core, adapter_id)
        loaded = self._wait_for(self._pool, self._reader.read, adapter_id, located, options)
        return make_plan(self._core, adapter_id, loaded)

    def hold_stored(self, adapter_id: str, digest: str) -> Record:
        """Have a version of an id in the registry, without making it current, for whoever will name it.

        The caller ends with `registry.drop_candidate`.

        Raises:
            AdapterNoVersionError: it is neither in memory nor in the version store.
        """
        record = self._hold_live(adapter_id, digest)
        if record is not None:
            return record
        source = StoredSource(digest)
        with self._core.storing(digest):
            loaded = self._wait_for(self._kept_pool, self._reader.read, adapter_id, source, trusting(digest))
            return self._add_candidate(adapter_id, loaded, is_stored=True)

    def keep(self, record: Record) -> None:
        """Have the files of a held version in the version store, so that an alias can rely on them after a restart.

        Raises:
            AdapterMemoryError: the store has no room.
            ServingError: they cannot be read any more.
        """
        store = self._core.state.store
        if store.get(record.version.digest) is None:
            loaded = self._wait_for(self._kept_pool, self._reader.read_kept, record.version)
            self._core.keep_files(loaded.digest, loaded.files, must=True)
        with self._core.changed:
            record.is_stored = True

    def copy_files(self, version: AdapterVersion, target: Path) -> None:
        """Put the files of a held version into a directory of their own; see AdapterManager."""
        with self._core.storing(version.digest):
            kept = self._core.state.store.get(version.digest)
            if kept is not None:
                link_files(kept, target)
                return
        write_files(self._wait_for(self._kept_pool, self._reader.read_kept, version).files, target)

    def read_again(self, version: AdapterVersion) -> None:
        """Bring back, on another thread, a host copy that was evicted; its memory is already claimed."""
        self._reread_pool.submit(self._read_again, version)

    def _wait_for(self, pool: ThreadPoolExecutor, read: Callable[..., LoadedAdapter], *args: object) -> LoadedAdapter:
        """Read on another thread, and wait for it."""
        try:
            future = pool.submit(read, *args)
        except RuntimeError:  # the pool was shut down
            raise shutting_down() from None
        try:
            return future.result()
        except CancelledError:
            raise shutting_down() from None

    def _pool_for(self, source: Source) -> ThreadPoolExecutor:
        """Slow remote loads must not hold up a rollback, so versions that are kept here do not wait for them."""
        return self._kept_pool if isinstance(source, StoredSource) else self._pool

    def has_folder(self, adapter_id: str) -> bool:
        """Whether there is a folder of this id right now, which would be found again at the next start."""
        return any((root / adapter_id).is_dir() for root in self._sources.roots)

    def _is_folder(self, adapter_id: str, source: Source) -> bool:
        """Whether that is the folder that is watched under this id."""
        return isinstance(source, LocalSource) and any(
            source.directory == (root / adapter_id).resolve() for root in self._sources.roots
        )

    # On the disk threads.

    def _load(self, job: _Job) -> AdapterInfo:
        started = time.monotonic()
        outcome = "ok"
        try:
            with self._prepared(job) as (record, origin):
                return publish(self._core, record, origin, job.ticket, job.intent)
        except OverruledError as error:
            outcome = error.reason
            raise
        except ServingError as error:
            outcome = error.reason
            self._core.fail_load(job.adapter_id, job.ticket, error)
            _log.warning("adapter_load_failed", adapter=job.adapter_id, reason=error.reason, message=error.message)
            raise
        except Exception:
            # A bug of ours: without this the id would stay "loading" for ever.
            _log.exception("adapter_load_failed", adapter=job.adapter_id)
            failure = ServingError(f"Adapter {job.adapter_id!r} could not be loaded; the server's log has the details.")
            outcome = failure.reason
            self._core.fail_load(job.adapter_id, job.ticket, failure)
            raise failure from None
        finally:
            self._core.observer.on_load(job.adapter_id, outcome, time.monotonic() - started)
            self._core.report_evictions()

    @contextlib.contextmanager
    def _prepared(self, job: _Job) -> Iterator[tuple[Record, Origin]]:
        """A version that is read, checked, kept and proven, held in the registry meanwhile; and where it came from."""
        if isinstance(job.source, StoredSource):
            known = self._hold_live(job.adapter_id, job.source.digest)
            if known is not None:
                with self._dropping(known):
                    if not known.is_current:  # it must survive evictions and restarts, so memory is not enough
                        self._reader.find_kept(job.source.digest)
                    yield known, known.origin
                return
        loaded = self._reader.read(job.adapter_id, job.source, job.intent.options)
        origin = (
            replace(loaded.origin, name=_shown_name(job)) if isinstance(job.source, StoredSource) else loaded.origin
        )
        with self._core.storing(loaded.digest):
            is_remote = isinstance(job.source, RemoteSource)
            is_stored = self._core.keep_files(loaded.digest, loaded.files, must=is_remote)
            if is_remote:
                directory = self._core.state.store.get(loaded.digest)
                assert directory is not None, "what must be stored is"
                origin = replace(origin, directory=directory)
            record = self._add_candidate(job.adapter_id, loaded, is_stored=is_stored)
        with self._dropping(record):
            if loaded.golden is not None and self._core.prover is not None:
                record.proof = self._core.prover(record.version, loaded.golden, loaded.packed.vocab_size)
            if not isinstance(job.source, StoredSource):
                self._core.refresh_files(loaded.digest, loaded.files)
            yield record, origin

    def _hold_live(self, adapter_id: str, digest: str) -> Record | None:
        with self._core.changed:
            record = self._core.registry.by_id.get(adapter_id, {}).get(digest)
            if record is None:
                return None
            return self._core.registry.add_candidate(
                record.version, record.origin, host_bytes=record.host_bytes, device_bytes=record.device_bytes
            )

    def _add_candidate(self, adapter_id: str, loaded: LoadedAdapter, *, is_stored: bool) -> Record:
        with self._core.changed:
            record = self._core.registry.add_candidate(
                AdapterVersion(adapter_id, loaded.digest),
                loaded.origin,
                host_bytes=loaded.packed.nbytes,
                device_bytes=self._core.device_store.extent_bytes(loaded.packed),
            )
            record.is_stored = is_stored
            record.tokenizer = loaded.tokenizer
            if self._core.registry.claim_host(record.version, urgent=False):
                self._core.registry.fill_host(record.version, loaded.packed)
            return record

    @contextlib.contextmanager
    def _dropping(self, record: Record) -> Iterator[None]:
        try:
            yield
        finally:
            with self._core.changed:
                self._core.registry.drop_candidate(record, self._core.drain_until())
                self._core.changed.notify_all()

    def _read_again(self, version: AdapterVersion) -> None:
        started = time.monotonic()
        outcome = "ok"
        try:
            loaded = self._reader.read_kept(version)
        except Exception as cause:
            # Also a bug of ours ends the claim, or requests would wait for the copy for ever.
            known = cause if isinstance(cause, ServingError) else ServingError("The server's log has the details.")
            outcome = known.reason
            error = AdapterUnloadedError(
                f"Adapter {version} had left memory and could not be read again. {known.message}"
            )
            _log.warning(
                "adapter_reread_failed", version=str(version), message=known.message, exc_info=known is not cause
            )
            with self._core.changed:
                self._core.registry.abandon_host(version)
                self._core.registry.fail_version(version, error)
                self._core.changed.notify_all()
        else:
            with self._core.changed:
                self._core.registry.fill_host(version, loaded.packed)
                self._core.changed.notify_all()
        self._core.observer.on_load(version.adapter_id, outcome, time.monotonic() - started)
        self._core.report_evictions()
        if outcome != "ok":
            self._on_failed()


def _shown_name(job: _Job) -> str:
    """What to call the source of kept files: where they came from first."""
    source = job.intent.source
    return source if "://" in source else Path(source).name or job.adapter_id


def shutting_down() -> AdapterUnloadedError:
    """The error of loads that come too late."""
    return AdapterUnloadedError("The server is shutting down and loads no more adapters.")
