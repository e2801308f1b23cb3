"""`AdapterInfo` of what a registry holds. Imports no torch.

`find_*` are called under the manager's lock; the rest works on what they returned, without it: reading a record that
changes meanwhile gives an info of some moment, and thousands of infos take longer than a step may wait for the lock.
"""

from typing import NamedTuple

from .errors import ServingError
from .info import AdapterDetails, AdapterInfo, AdapterState, Tier
from .lookup import not_found
from .record import Record
from .registry import Registry


class Found(NamedTuple):
    """Versions, and ids that are loading or failed without one."""

    records: list[Record]
    loading: list[str]
    failed: list[tuple[str, ServingError]]


def find_all(registry: Registry) -> Found:
    """Everything there is."""
    return Found(
        list(registry.records.values()),
        [i for i in registry.loading if not any(r.is_kept for r in registry.by_id.get(i, {}).values())],
        [(i, error) for i, error in registry.failed.items() if i not in registry.loading],
    )


def list_infos(found: Found) -> list[AdapterInfo]:
    """Sorted by id, the current version first."""
    infos = [record_info(record) for record in found.records]
    infos += [unloaded_info(adapter_id, AdapterState.LOADING) for adapter_id in found.loading]
    infos += [unloaded_info(adapter_id, AdapterState.FAILED, error) for adapter_id, error in found.failed]
    return sorted(infos, key=_order)


def find_info(registry: Registry, adapter_id: str) -> AdapterInfo:
    """The current version of an id, or its load under way, or its failure.

    Raises:
        AdapterNotFoundError: nothing of that id is known.
    """
    record = registry.current.get(adapter_id)
    if record is not None:
        return record_info(record)
    if adapter_id in registry.loading:
        return unloaded_info(adapter_id, AdapterState.LOADING)
    if adapter_id in registry.failed:
        return unloaded_info(adapter_id, AdapterState.FAILED, registry.failed[adapter_id])
    raise not_found(adapter_id)


def describe(adapter: AdapterInfo, records: list[Record], previous: str) -> AdapterDetails:
    """An id with all its versions.

    Args:
        adapter: what was asked for.
        records: versions of the id that are in the registry.
        previous: digest of the version that a rollback brings back; empty: none.
    """
    infos = [record_info(record) for record in records]
    if previous and all(info.digest != previous for info in infos):
        infos.append(unloaded_info(adapter.adapter_id, AdapterState.STORED, digest=previous))
    return AdapterDetails(adapter, tuple(sorted(infos, key=_order)))


def record_info(record: Record) -> AdapterInfo:
    """One version."""
    origin, report = record.origin, record.origin.report
    if record.error is not None:
        state = AdapterState.FAILED
    elif record.is_servable:
        state = AdapterState.READY
    else:
        state = AdapterState.LOADING if record.candidacies else AdapterState.DRAINING
    error = record.error or record.replace_error
    return AdapterInfo(
        adapter_id=record.version.adapter_id,
        digest=record.version.digest,
        state=state,
        tier=record.tier,
        bytes=record.host_bytes,
        max_rank=report.max_rank,
        slices=report.slices,
        in_flight=record.in_flight - record.holds,
        error=None if error is None else error.message,
        warning=origin.warning,
        loaded_at=origin.loaded_at,
        source=origin.name,
        method=report.method,
        current=record.is_current,
        pinned=record.pinned,
        aliases=tuple(sorted(record.aliases)),
        proof=record.proof,
        trained_for=report.trained_for,
        num_modules=report.num_modules,
    )


def unloaded_info(
    adapter_id: str, state: AdapterState, error: ServingError | None = None, digest: str = ""
) -> AdapterInfo:
    """An id, or a version, of which nothing is in memory."""
    return AdapterInfo(
        adapter_id=adapter_id,
        digest=digest,
        state=state,
        tier=Tier.DISK,
        bytes=0,
        max_rank=0,
        slices={},
        in_flight=0,
        error=None if error is None else error.message,
        warning=None,
        loaded_at=0.0,
        source="",
        method="",
    )


_ORDER = (
    AdapterState.READY,
    AdapterState.LOADING,
    AdapterState.FAILED,
    AdapterState.DRAINING,
    AdapterState.STORED,
)


def _order(info: AdapterInfo) -> tuple[str, bool, int, float]:
    return info.adapter_id, not info.current, _ORDER.index(info.state), info.loaded_at
