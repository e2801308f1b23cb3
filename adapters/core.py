"""What the parts of the adapter manager share: a lock for bookkeeping, one for durable changes, what they guard."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from .adapter_tokenizer import TokenizerMaker
from .card import CARD_FILE
from .carried_text import CARRIED_FILE
from .device_store import DeviceStore
from .errors import AdapterMismatchError, ServingError
from .golden import GOLDEN_FILE, Golden
from .info import AdapterObserver, Tier
from .registry import Registry
from .state.state_dir import StateDir
from .version import AdapterVersion

# Replays a golden file for a version that no request can name yet; returns a sentence for people. The number is that of
# the token ids that the adapter knows; None: as many as the base has.
Prover = Callable[[AdapterVersion, Golden, int | None], str]
# Files of a version that its digest says nothing about; a later load of the same content may bring others.
_UNHASHED: Final = (GOLDEN_FILE, CARD_FILE, CARRIED_FILE)


class ManagerCore:
    """See the module.

    Lock order: `admin` before `changed`. Every change that must survive a restart is made under `admin`: first on disk,
    then in the registry, then it is acknowledged. `changed` is held for bookkeeping only, because the step thread
    takes it: never while something is read, written, copied or waited for. The step thread never takes `admin`.

    Args:
        device_store: the arena.
        host_budget_bytes: of host copies.
        state: the durable half of the registry, and the kept files of versions.
        observer: told of loads and evictions.
        drain_deadline_s: how long requests may go on with a version that was unloaded or replaced.

    Attributes:
        changed: notified when something that a thread may wait for has happened.
        registry: guarded by `changed`.
        prover: set by the server; None: golden files are not replayed.
        make_tokenizer: set by the server; None: adapters' own tokenizers are not used.
        reserved: digests that the state directory refers to since before the start; never changes after that.
    """

    def __init__(
        self,
        device_store: DeviceStore,
        *,
        host_budget_bytes: int,
        state: StateDir,
        observer: AdapterObserver,
        drain_deadline_s: float,
    ) -> None:
        self.changed = threading.Condition()
        self.admin = threading.RLock()
        self.device_store = device_store
        self.state = state
        self.observer = observer
        self.prover: Prover | None = None
        self.make_tokenizer: TokenizerMaker | None = None
        self.reserved: frozenset[str] = frozenset()
        self._storing: Counter[str] = Counter()
        self._drain_deadline_s = drain_deadline_s
        self._evictions: list[Tier] = []  # not yet reported
        self.registry = Registry(
            host_budget=host_budget_bytes,
            device_budget=device_store.capacity_bytes,
            max_slots=device_store.max_slots,
            free_slot=device_store.remove,
            on_evict=self._evictions.append,
        )

    def drain_until(self) -> float:
        """The `time.monotonic()` second at which what is retired now is dropped by force."""
        return time.monotonic() + self._drain_deadline_s

    def fail_load(self, adapter_id: str, ticket: int, error: ServingError) -> None:
        """A load ended with an error. That a caller expected other content says nothing about the adapter."""
        with self.admin, self.changed:
            if isinstance(error, AdapterMismatchError) and adapter_id in self.registry.current:
                self.registry.loading.end(adapter_id, ticket)
            else:
                self.registry.fail_load(adapter_id, ticket, error)

    def keep_files(self, digest: str, files: Mapping[str, Sequence[bytes | memoryview]], *, must: bool) -> bool:
        """Put a version's files into the version store; whether they are there. Nothing in use has to go for it.

        To be called in `storing(digest)`.
        """
        if not must and not self.state.store.budget_bytes:
            return False
        return self.state.store.put(digest, files, self._needed(), must=must)

    def refresh_files(self, digest: str, files: Mapping[str, Sequence[bytes | memoryview]]) -> None:
        """Bring those files of a kept version up to date that its digest, and so `keep_files`, ignores."""
        self.state.store.replace(digest, {name: files.get(name) for name in _UNHASHED}, self._needed())

    def _needed(self) -> set[str]:
        """Digests of versions whose kept files may not go."""
        with self.changed:
            return {*self.registry.digests, *self.reserved, *self._storing}

    @contextlib.contextmanager
    def storing(self, digest: str) -> Iterator[None]:
        """Protects the files of a version in the store until the registry, too, knows that they are needed."""
        with self.changed:
            self._storing[digest] += 1
        try:
            yield
        finally:
            with self.changed:
                self._storing[digest] -= 1
                self._storing += Counter()  # forgets those at zero

    def report_evictions(self) -> None:
        """Tell the observer what was evicted; with no lock held."""
        with self.changed:
            evictions = self._evictions.copy()
            self._evictions.clear()
        for tier in evictions:
            self.observer.on_evict(tier)
