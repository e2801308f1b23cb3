"""What the adapter manager tells about its adapters, and whom it tells about events. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from .scaling import Scaling


class AdapterState(StrEnum):
    """Where a version is in its life: LOADING -> READY -> DRAINING -> gone, or LOADING -> FAILED."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"  # replaced or unloaded; requests admitted before may finish on it
    FAILED = "failed"
    STORED = "stored"  # not served: its files are kept, and a rollback or an alias brings it back


class Tier(StrEnum):
    """The fastest memory that holds a version."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One version of one adapter; or an id whose load is under way or failed (then without digest).

    Attributes:
        adapter_id: what users name.
        digest: identity of the version; empty while an id's first load is under way or when it failed.
        state: where it is in its life.
        tier: fastest memory that holds it.
        bytes: of its packed weights.
        max_rank: largest rank of a module.
        slices: `q_proj` -> (rank, scaling), or full module paths where layers differ.
        in_flight: requests that hold the version.
        error: why it failed; for a ready version, why its last replacement failed.
        warning: something an operator should know, such as a base of another name.
        loaded_at: Unix seconds.
        source: name of the folder it came from.
        method: LoRA, rsLoRA or AdaLoRA.
        current: whether requests that name the id alone get this version.
        pinned: tier in which it is kept, or None.
        aliases: names that lead to this version, sorted.
        proof: what was checked at load, for people; empty: it carries no golden file.
        trained_for: the base that its config names; may be empty.
        num_modules: adapted linears.
    """

    adapter_id: str
    digest: str
    state: AdapterState
    tier: Tier
    bytes: int
    max_rank: int
    slices: Mapping[str, Scaling]
    in_flight: int
    error: str | None
    warning: str | None
    loaded_at: float
    source: str
    method: str
    current: bool = False
    pinned: Tier | None = None
    aliases: tuple[str, ...] = ()
    proof: str = ""
    trained_for: str = ""
    num_modules: int = 0


@dataclass(frozen=True, slots=True)
class AdapterDetails:
    """Everything about one id.

    Attributes:
        adapter: its current version, or its load under way, or its failure.
        versions: all versions that are known, the current one first: aliased and draining ones, and the one that a
            rollback would bring back (`AdapterState.STORED` when only its files are kept).
    """

    adapter: AdapterInfo
    versions: tuple[AdapterInfo, ...]


@dataclass(frozen=True, slots=True)
class AliasTarget:
    """One version that an alias leads to.

    Attributes:
        adapter_id: what users name.
        digest: full digest of the version.
        weight: its share of the requests, relative to the other targets' weights; above 0.
    """

    adapter_id: str
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class AliasInfo:
    """An alias: a name that requests may use like an adapter id.

    Attributes:
        name: matches the pattern of adapter ids.
        targets: at least one.
    """

    name: str
    targets: tuple[AliasTarget, ...]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a load may accept or insist on.

    Attributes:
        allow_zero: accept an adapter whose delta is zero everywhere.
        allow_other_base: accept one whose config or card names another base, if its shapes fit.
        expected_digest: refuse other content; empty: take what is there.
    """

    allow_zero: bool = False
    allow_other_base: bool = False
    expected_digest: str = ""


DEFAULT_OPTIONS: Final = LoadOptions()


@dataclass(frozen=True, slots=True)
class Eviction:
    """A copy that would have to go."""

    adapter_id: str
    digest: str
    tier: Tier


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load would do, found out by reading and checking everything and changing nothing.

    Attributes:
        adapter: as it would be shown after the load; its state is STORED.
        is_new: whether the content differs from the current version's.
        host_bytes, device_bytes: what its copies take.
        fits_host, fits_device: whether copies would fit right now, after the evictions.
        evictions: idle copies that would go, in this order.
    """

    adapter: AdapterInfo
    is_new: bool
    host_bytes: int
    device_bytes: int
    fits_host: bool
    fits_device: bool
    evictions: tuple[Eviction, ...]


@dataclass(frozen=True, slots=True)
class AdapterStats:
    """A consistent picture for metrics.

    Attributes:
        adapters: every version and every loading or failed id, sorted by id.
        bytes_used: by tier (host and device), evictable memory included.
        bytes_budget: by tier (host and device).
        wanted: versions that wait to come to the device.
        num_aliases: aliases.
    """

    adapters: tuple[AdapterInfo, ...]
    bytes_used: Mapping[Tier, int]
    bytes_budget: Mapping[Tier, int]
    wanted: int
    num_aliases: int = 0

    def names_by_tier(self) -> dict[Tier, list[str]]:
        """Ids of ready adapters by tier."""
        names: dict[Tier, list[str]] = {tier: [] for tier in Tier}
        for info in self.adapters:
            if info.state is AdapterState.READY:
                names[info.tier].append(info.adapter_id)
        return names


class AdapterObserver(Protocol):
    """Told of events, on loader threads and without any lock held; must be cheap and thread-safe."""

    def on_load(self, adapter_id: str, outcome: str, seconds: float) -> None:
        """A load from disk ended: outcome is "ok" or the error's reason."""

    def on_evict(self, tier: str) -> None:
        """An idle version lost its copy in that tier ("host" or "device") to make room for another."""


class SilentObserver:
    """Ignores every event."""

    def on_load(self, adapter_id: str, outcome: str, seconds: float) -> None:
        """Ignore it."""

    def on_evict(self, tier: str) -> None:
        """Ignore it."""
