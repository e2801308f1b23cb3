"""`AdapterInfo` of what a registry holds. Imports no torch; called under the manager's lock."""

from .errors import ServingError
from .info import AdapterInfo, AdapterState, Tier
from .registry import Registry, not_found
from .residency import Record


def get_info(registry: Registry, adapter_id: str) -> AdapterInfo:
    """The current version of an id, or its load under way, or its failure.

    Raises:
        AdapterNotFoundError: nothing of that id is known.
    """
    record = registry.current.get(adapter_id)
    if record is not None:
        return record_info(record)
    if adapter_id in registry.loading:
        return _unloaded(adapter_id, AdapterState.LOADING, None)
    if adapter_id in registry.failed:
        return _unloaded(adapter_id, AdapterState.FAILED, registry.failed[adapter_id])
    raise not_found(adapter_id)


def list_infos(registry: Registry) -> list[AdapterInfo]:
    """Every version, and every id that is loading or failed without one; by id, the current version first."""
    infos = [record_info(record) for record in registry.records.values()]
    infos += [_unloaded(i, AdapterState.LOADING, None) for i in registry.loading if i not in registry.current]
    infos += [
        _unloaded(i, AdapterState.FAILED, error) for i, error in registry.failed.items() if i not in registry.loading
    ]
    order = {AdapterState.READY: 0, AdapterState.LOADING: 1, AdapterState.FAILED: 2, AdapterState.DRAINING: 3}
    return sorted(infos, key=lambda info: (info.adapter_id, order[info.state], info.loaded_at))


def record_info(record: Record) -> AdapterInfo:
    """One version."""
    origin, report = record.origin, record.origin.report
    if record.error is not None:
        state = AdapterState.FAILED
    else:
        state = AdapterState.READY if record.current else AdapterState.DRAINING
    error = record.error or record.replace_error
    return AdapterInfo(
        adapter_id=record.version.adapter_id,
        digest=record.version.digest,
        state=state,
        tier=record.tier,
        bytes=record.host_bytes,
        max_rank=report.max_rank,
        slices=report.slices,
        in_flight=record.in_flight,
        error=None if error is None else error.message,
        warning=origin.warning,
        loaded_at=origin.loaded_at,
        source=origin.directory.name,
        method=report.method,
    )


def _unloaded(adapter_id: str, state: AdapterState, error: ServingError | None) -> AdapterInfo:
    return AdapterInfo(
        adapter_id=adapter_id,
        digest="",
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
