"""The adapters of a server: loading, replacing, unloading, and bringing them to the device. Thread-safe.

This is the face of the package: requests and the step thread are answered here, everything else is handed on to
`loading.py` (from a source to a published version), `administration.py` (aliases, rollback), `tier_calls.py` (pins),
`restoring.py` (after a restart) and `device_loader.py` (the thread that copies to the device). They share `core.py`:
one lock for bookkeeping, never held while something is read, copied or waited for, and one for durable changes.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Final

import structlog
import torch

from .adapter_tokenizer import AdapterVocabulary, TokenizerMaker
from .administration import AdapterAdministration
from .composition_rules import check_composition, check_together
from .core import ManagerCore, Prover
from .device_loader import DeviceLoader, Events
from .device_store import DeviceStore
from .errors import AdapterIdError, ServingError
from .fingerprint import BaseFingerprint
from .info import (
    DEFAULT_OPTIONS,
    AdapterDetails,
    AdapterInfo,
    AdapterObserver,
    AdapterStats,
    AliasInfo,
    LoadOptions,
    LoadPlan,
    SilentObserver,
    Tier,
)
from .listing import describe, find_all, find_info, list_infos, record_info
from .loading import AdapterLoads, shutting_down
from .lookup import find_version
from .modules import BaseWeights, ModuleTable
from .reader import AdapterReader
from .record import LEASE_S
from .reference import parse_reference
from .restoring import restore_called, restore_names, restore_targets
from .sites import SiteTable
from .source_reader import SourceReader
from .sources.fetch import Fetcher
from .sources.locate import SourcePolicy
from .state.state_dir import StateDir
from .tier_calls import TierCalls
from .version import AdapterVersion

DRAIN_DEADLINE_S: Final = 300.0
MAX_FETCH_BYTES: Final = 16 * 2**30
FETCH_TIMEOUT_S: Final = 600.0

_log = structlog.get_logger(__name__)


def _nothing_runs() -> bool:
    return False


def _ignore(*_: object) -> None:
    """Default of the callbacks."""


class AdapterManager:
    """See the module. `start` it before requests come; `close` it after the engine has stopped.

    Args:
        site_table: the base's sites.
        modules: its other modules.
        weights: its weights, for adapters that are compared or computed with them.
        base: what adapters may say of the base that they were trained for.
        dtype: compute type, of the arena.
        device: where the base runs.
        device_budget_bytes: size of the arena, allocated at once.
        host_budget_bytes: packed adapters kept in host memory.
        roots: directories that adapters may be loaded from.
        state: what survives a restart; closed by whoever opened it.
        max_slots: adapters on the device at most.
        drain_deadline_s: how long requests may go on with a version after it was unloaded or replaced.
        observer: told of loads and evictions.
        allowed_sources: prefixes of URIs that adapters may be fetched from.
        max_fetch_bytes, fetch_timeout_s: largest remote adapter, and how long fetching one may take.
        allow_zero: accept adapters whose delta is zero, whoever loads them.
        allow_other_base: accept adapters that were trained for another base, whoever loads them.
        settle_s: how long a local folder's files must have been left alone when it is loaded.

    Attributes:
        store: the arena and its tables, read by the LoRA layers.
        on_ready: called on a loader thread when a version came to the device or failed, or `step_work` has work: the
            engine should run its loop. Set by the engine.
        on_version_dropped: called on a loader thread when a version that requests still hold passed its drain deadline;
            the engine fails them and then deactivates and releases as usual. Set by the engine.
        on_dead: called on a loader thread that ends by an unexpected error: no adapter will come to the device any
            more, so the process should end.
        is_running: whether requests run now; while none do, copies on a CPU may use every core. Set by the server.
    """

    def __init__(
        self,
        site_table: SiteTable,
        modules: ModuleTable,
        weights: BaseWeights,
        base: BaseFingerprint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        device_budget_bytes: int,
        host_budget_bytes: int,
        roots: Sequence[Path],
        state: StateDir,
        max_slots: int = 1024,
        drain_deadline_s: float = DRAIN_DEADLINE_S,
        observer: AdapterObserver | None = None,
        allowed_sources: Sequence[str] = (),
        max_fetch_bytes: int = MAX_FETCH_BYTES,
        fetch_timeout_s: float = FETCH_TIMEOUT_S,
        allow_zero: bool = False,
        allow_other_base: bool = False,
        settle_s: float = 0.0,
    ) -> None:
        self.store = DeviceStore(site_table, dtype, device, device_budget_bytes, max_slots)
        self.on_ready: Callable[[], None] = _ignore
        self.on_version_dropped: Callable[[AdapterVersion], None] = _ignore
        self.on_dead: Callable[[BaseException], None] = _ignore
        self.is_running: Callable[[], bool] = _nothing_runs
        self._roots = tuple(roots)
        self._options = LoadOptions(allow_zero, allow_other_base)
        self._core = ManagerCore(
            self.store,
            host_budget_bytes=host_budget_bytes,
            state=state,
            observer=observer or SilentObserver(),
            drain_deadline_s=drain_deadline_s,
        )
        self._changed, self._registry = self._core.changed, self._core.registry
        self._sources = SourcePolicy(self._roots, tuple(allowed_sources))
        reader = AdapterReader(
            site_table,
            modules,
            weights,
            base,
            dtype=dtype,
            pin_memory=device.type == "cuda",
            max_bytes=min(host_budget_bytes, self.store.capacity_bytes),
        )
        fetcher = Fetcher(state.incoming, max_bytes=max_fetch_bytes, timeout_s=fetch_timeout_s)
        source_reader = SourceReader(self._core, reader, self._sources, fetcher, settle_s=settle_s)
        self._loads = AdapterLoads(self._core, source_reader, self._sources, on_failed=lambda: self.on_ready())
        self._administration = AdapterAdministration(self._core, self._loads)
        self._tiers = TierCalls(self._core)
        self._loader = DeviceLoader(
            self._changed,
            self._registry,
            self.store,
            read_again=self._loads.read_again,
            events=Events(
                on_ready=lambda: self.on_ready(),
                on_version_dropped=lambda version: self.on_version_dropped(version),
                on_progress=self._core.report_evictions,
                on_dead=lambda error: self.on_dead(error),
                is_running=lambda: self.is_running(),
            ),
        )
        restore_names(self._core)

    @property
    def prover(self) -> Prover | None:
        """What replays golden files; None: they are not replayed. Set by the server before anything is loaded."""
        return self._core.prover

    @prover.setter
    def prover(self, prover: Prover) -> None:
        self._core.prover = prover

    @property
    def make_tokenizer(self) -> TokenizerMaker | None:
        """What reads adapters' own tokenizers; None: the base's serves all. Set by the server likewise."""
        return self._core.make_tokenizer

    @make_tokenizer.setter
    def make_tokenizer(self, make_tokenizer: TokenizerMaker) -> None:
        self._core.make_tokenizer = make_tokenizer

    def start(self) -> None:
        """Start bringing adapters to the device."""
        self._loader.start()

    def restore(self) -> None:
        """Load what calls had loaded before the restart, and wait for it. Before the folders are loaded."""
        restore_called(self._core, self._loads, self._sources)

    def finish_restore(self) -> None:
        """Bring back what aliases lead to, once the folders have been loaded."""
        restore_targets(self._core, self._loads, self._roots)

    def close(self) -> None:
        """End all threads; loads that have not begun, and calls that wait for a tier, fail."""
        self._tiers.close()
        self._loader.close()
        self._loads.close()

    # For clients and the folder watcher; any thread.

    def load(
        self, adapter_id: str, source: str | Path | None = None, options: LoadOptions = DEFAULT_OPTIONS
    ) -> AdapterInfo:
        """Read an adapter and make it the current version of its id; blocks until it is usable.

        The same content again changes nothing. Other content becomes a new version: later requests get it, earlier ones
        finish on theirs until the drain deadline.

        Args:
            adapter_id: what users name.
            source: directory inside a root, absolute or relative to a root, or a URI; None means `<root>/<adapter_id>`.
            options: what to accept, and what to insist on.

        Raises:
            ServingError: AdapterIdError, AdapterSourceError, AdapterNotFoundError (no such folder),
                AdapterInvalidError, AdapterIncompatibleError, AdapterMismatchError, AdapterProofError,
                AdapterMemoryError, AdapterExistsError (an alias), AdapterUnreadableError, AdapterUnloadedError
                (unloaded meanwhile, or shut down), AdapterStateError.
        """
        return _result(self._loads.start(adapter_id, source, self._with_defaults(options), by_call=True))

    def load_folder(self, adapter_id: str, directory: Path) -> Future[AdapterInfo]:
        """Load the watched folder of an id, without waiting. The id and the path are checked at once."""
        return self._loads.start(adapter_id, directory, self._options, by_call=False)

    def plan_load(
        self, adapter_id: str, source: str | Path | None = None, options: LoadOptions = DEFAULT_OPTIONS
    ) -> LoadPlan:
        """Read and check an adapter as `load` would, and say what loading it would do; changes nothing.

        Raises:
            ServingError: as `load`.
        """
        return self._loads.plan(adapter_id, source, self._with_defaults(options))

    def note_failure(self, adapter_id: str, error: ServingError) -> None:
        """Show an id as failed although no load was tried, because its folder is not acceptable."""
        with self._changed:
            ticket = self._registry.loading.begin(adapter_id)
        self._core.fail_load(adapter_id, ticket, error)

    def unload(self, adapter_id: str) -> None:
        """Forget an id, and return at once. Requests that hold its version may finish until the drain deadline.

        Raises:
            AdapterIdError: malformed id.
            AdapterNotFoundError: nothing of that id is known.
            AdapterInUseError: it is pinned, or an alias leads to it.
        """
        self._administration.unload(adapter_id)

    def folder_gone(self, adapter_id: str, directory: Path) -> None:
        """Unload an id whose watched folder is gone, unless its current version came from elsewhere.

        A pinned or aliased adapter stays, from its kept files.

        Args:
            adapter_id: what users name; nothing happens if nothing of that id is known.
            directory: real path that it was loaded from.
        """
        self._administration.folder_gone(adapter_id, directory)

    def rollback(self, adapter_id: str, digest_prefix: str = "") -> AdapterInfo:
        """Make an earlier version current again; blocks until it is usable.

        Args:
            adapter_id: what users name.
            digest_prefix: of the version; empty: the one that was current before.

        Raises:
            AdapterNoVersionError: there is none, or its files are not kept any more.
            ServingError: as `load`.
        """
        try:
            return self._administration.rollback(adapter_id, digest_prefix)
        except CancelledError:
            raise shutting_down() from None

    def pin(self, adapter_id: str, tier: Tier, timeout_s: float | None = None) -> AdapterInfo:
        """Keep an id's current version, whichever it is, in a tier; blocks until it is there.

        Args:
            adapter_id: what users name.
            tier: HOST or DEVICE.
            timeout_s: seconds to wait; the pin stays when they are over.

        Raises:
            AdapterNotFoundError, AdapterIdError.
            AdapterMemoryError: the pins would leave no room for the largest other adapter.
            AdapterNotReadyError: it did not come in time.
        """
        return self._tiers.pin(adapter_id, tier, timeout_s)

    def unpin(self, adapter_id: str) -> AdapterInfo:
        """Let a pinned adapter be evicted again; nothing happens if it was not pinned.

        Raises:
            AdapterNotFoundError, AdapterIdError.
        """
        return self._tiers.unpin(adapter_id)

    def prefetch(self, reference: str, tier: Tier, timeout_s: float | None = None) -> AdapterInfo:
        """Bring a version into a tier (HOST or DEVICE), from where it may be evicted again; blocks until it is there.

        Raises:
            AdapterNotFoundError, AdapterIdError, AdapterDigestError.
            AdapterNotReadyError: it did not come in time.
        """
        return self._tiers.prefetch(reference, tier, timeout_s)

    def set_alias(self, name: str, targets: Sequence[tuple[str, float]]) -> AliasInfo:
        """Create an alias or move it, at once: later requests get the new targets, earlier ones keep their versions.

        Args:
            name: matches the pattern of adapter ids.
            targets: (reference, weight), 1 to 8; `id` means its current version, and stays with that version.

        Raises:
            AdapterExistsError: the name is an adapter's.
            AdapterNotFoundError, AdapterIdError, AdapterDigestError, AdapterNoVersionError: of a target.
        """
        return self._administration.set_alias(name, targets)

    def delete_alias(self, name: str) -> None:
        """Make an alias unknown to later requests.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        self._administration.delete_alias(name)

    def list_aliases(self) -> list[AliasInfo]:
        """Every alias, by name."""
        with self._changed:
            return self._registry.aliases.all()

    def get(self, reference: str) -> AdapterInfo:
        """The version that a reference means, or the load under way, or the failure, of an id.

        Raises:
            AdapterIdError, AdapterDigestError: malformed.
            AdapterNotFoundError: nothing of that id is known.
        """
        return self.describe(reference).adapter

    def describe(self, reference: str) -> AdapterDetails:
        """Like `get`, with all versions of the id."""
        name, digest_prefix = parse_reference(reference)
        with self._changed:
            alias = self._registry.aliases.get(name)
            if alias is not None and len(alias.targets) > 1:
                raise AdapterIdError(f"Alias {name!r} leads to several versions; see ListAliases.", {"alias": name})
            if alias is None and not digest_prefix:
                adapter = find_info(self._registry, name)
            else:
                adapter = record_info(find_version(self._registry, name, digest_prefix, ""))
            records = list(self._registry.by_id.get(adapter.adapter_id, {}).values())
        saved = self._core.state.database.get(adapter.adapter_id)
        previous = saved.previous if saved is not None else ""
        is_kept = bool(previous) and self._core.state.store.get(previous) is not None
        return describe(adapter, records, previous if is_kept else "")

    def list(self) -> list[AdapterInfo]:
        """All versions, draining ones included, and ids that are loading or failed; sorted by id."""
        with self._changed:
            found = find_all(self._registry)
        return list_infos(found)

    def snapshot(self) -> AdapterStats:
        """A picture for metrics."""
        with self._changed:
            found = find_all(self._registry)
            memory = self._registry.memory
            used = {Tier.HOST: memory.host_used, Tier.DEVICE: memory.device_used}
            wanted, num_aliases = len(self._registry.wanted), len(self._registry.aliases.all())
        return AdapterStats(
            adapters=tuple(list_infos(found)),
            bytes_used=used,
            bytes_budget={Tier.HOST: memory.host_budget, Tier.DEVICE: memory.device_budget},
            wanted=wanted,
            num_aliases=num_aliases,
        )

    # For requests.

    def resolve(self, reference: str, routing_key: str = "") -> AdapterVersion:
        """Hold a version for one request; never blocks on disk. Every resolve needs one release.

        Args:
            reference: id, alias or `id@digest-prefix`.
            routing_key: the same key gets the same target of an alias; empty: one is drawn.

        Raises:
            AdapterIdError, AdapterDigestError: malformed or ambiguous.
            AdapterNotFoundError: unknown, still loading for the first time, or failed.
        """
        name, digest_prefix = parse_reference(reference)
        with self._changed:
            return self._registry.resolve(name, digest_prefix, routing_key)

    def check_composition(self, members: Sequence[tuple[AdapterVersion, float]]) -> None:
        """Raise unless versions that the caller holds can answer one request together, with these weights.

        Raises:
            AdapterCompositionError, AdapterMemoryError: see composition_rules.py.
        """
        with self._changed:
            check_composition(self._registry, members)

    def vocabulary(self, versions: Iterable[AdapterVersion]) -> AdapterVocabulary:
        """What token ids mean to versions that the caller holds and that can answer together."""
        with self._changed:
            records = [self._registry.records[version] for version in versions]
        tokenizers = [record.tokenizer for record in records if record.tokenizer is not None]
        sizes = [size for record in records if (size := record.origin.report.vocab_size) is not None]
        return AdapterVocabulary(next(iter(tokenizers), None), next(iter(sizes), None))

    def hold(self, version: AdapterVersion) -> None:
        """One more request for a version that the caller holds already; needs one release."""
        with self._changed:
            self._registry.hold(version)

    def release(self, version: AdapterVersion) -> None:
        """A request that held the version ended."""
        with self._changed:
            self._registry.release(version)
            self._notify_if_wanted()

    def copy_files(self, version: AdapterVersion, target: Path) -> None:
        """Put the files of a version that the caller holds into a directory of their own; blocks.

        They stay as they are whatever becomes of the version, and cost no room where the version store has them.

        Args:
            version: which one.
            target: made here, with its parents.

        Raises:
            AdapterNoVersionError: its files are not kept, and where they came from is other content by now.
            ServingError: as `load`.
            OSError: the disk is full, or failed.
        """
        self._loads.copy_files(version, target)

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

    def try_activate_all(self, versions: Sequence[AdapterVersion], *, keep: bool) -> Sequence[int] | None:
        """The device slots of several versions, each in use until its `deactivate`.

        Args:
            versions: distinct, held by a request.
            keep: those that are there stay for LEASE_S if others are missing.

        Returns:
            None when one is not there yet: nothing is in use then, and the missing ones will be brought in.

        Raises:
            AdapterMemoryError: pins leave no room for all of them at the same time.
            ServingError: one failed, or was dropped at its drain deadline.
        """
        with self._changed:
            num_wanted = len(self._registry.wanted)
            slots = self._registry.activate_all(versions, time.monotonic() + LEASE_S if keep else 0.0)
            if slots is None:
                check_together(self._registry, versions)
                if len(self._registry.wanted) > num_wanted:
                    self._changed.notify_all()
            return slots

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

    def _with_defaults(self, options: LoadOptions) -> LoadOptions:
        return LoadOptions(
            options.allow_zero or self._options.allow_zero,
            options.allow_other_base or self._options.allow_other_base,
            options.expected_digest,
        )

    def _notify_if_wanted(self) -> None:
        """Memory may have become free for a waiting version; called with the lock held."""
        if self._registry.wanted or self._registry.host_wanted:
            self._changed.notify_all()


def _result(future: Future[AdapterInfo]) -> AdapterInfo:
    try:
        return future.result()
    except CancelledError:
        raise shutting_down() from None
