"""Making a loaded version current: on disk first, then for requests. One durable change at a time."""

import dataclasses
from typing import NamedTuple

import structlog

from .core import ManagerCore
from .errors import AdapterExistsError, AdapterUnloadedError
from .info import AdapterInfo, LoadOptions, Tier
from .listing import find_info, record_info
from .origin import Origin
from .record import Record
from .rules import check_room
from .state.database import SavedAdapter

_log = structlog.get_logger(__name__)


class OverruledError(AdapterUnloadedError):
    """A load's result is not wanted any more, and nothing else of the id is served. The load has ended."""


class Intent(NamedTuple):
    """Who asked for a load, and what is to be remembered of it.

    Attributes:
        by_call: a client asked; else the adapter's watched folder appeared or changed.
        is_folder: it was read from the watched folder of its id.
        source: as the caller gave it; empty: the folder of its id.
        options: of the load.
    """

    by_call: bool
    is_folder: bool
    source: str
    options: LoadOptions


def publish(core: ManagerCore, record: Record, origin: Origin, ticket: int, intent: Intent) -> AdapterInfo:
    """Make a version current that the caller holds.

    A folder that a call has overruled (by a load from elsewhere, a rollback or an unload) is not published again until
    its content changes: it is what the call was meant to replace. So is content that was being read when the call came.

    Returns:
        What requests for the id get now.

    Raises:
        OverruledError: the id was unloaded, or the folder overruled, and nothing of the id is served.
        AdapterExistsError: the id is an alias.
        AdapterMemoryError: pinned adapters leave no room for it.
        AdapterStateError: the change cannot be written down; nothing has changed.
    """
    adapter_id, digest = record.version.adapter_id, record.version.digest
    with core.admin:
        saved = core.state.database.get(adapter_id)
        with core.changed:
            is_folder_now = intent.is_folder and core.registry.loading.note_folder(adapter_id, ticket)
            was_called_off = core.registry.loading.was_called_off(adapter_id, ticket)
            is_overruled = core.registry.loading.is_outdated(adapter_id, ticket) or _is_overruled(saved, digest, intent)
        if is_overruled:
            # A later load of the folder, which may have failed, outdates this one, too; but that is nobody's wish.
            if is_folder_now and (was_called_off or (saved is not None and saved.by_call)):
                core.state.database.save(dataclasses.replace(saved or _unknown(adapter_id), folder_digest=digest))
            return _end_overruled(core, adapter_id, ticket)
        with core.changed:
            check_is_no_alias(core, adapter_id)
            pin = core.registry.pins.get(adapter_id)
            if record.error is not None:  # it was proven, and then its copy to the device failed, say
                raise type(record.error)(record.error.message, record.error.metadata)
            before = core.registry.current.get(adapter_id)
            check_room(core.registry, record, pin, None if before is record else before)
        # Files are dropped only of versions that are not needed, and this one may just become one that is.
        is_stored = before is not None and core.state.store.get(before.version.digest) is not None
        core.state.database.save(_saved(saved, record, intent))
        with core.changed:
            if before is not None:
                before.is_stored = is_stored
        return _make_current(core, record, origin, ticket)


def check_is_no_alias(core: ManagerCore, adapter_id: str) -> None:
    """Raise AdapterExistsError if the name is an alias; called with the lock held."""
    if adapter_id in core.registry.aliases:
        raise AdapterExistsError(
            f"{adapter_id!r} is an alias; an adapter cannot have the same name. Delete the alias, or take another id.",
            {"alias": adapter_id},
        )


def _end_overruled(core: ManagerCore, adapter_id: str, ticket: int) -> AdapterInfo:
    """End a load whose result is not wanted; what requests for the id get."""
    with core.changed:
        core.registry.loading.end(adapter_id, ticket)
        if adapter_id in core.registry.current:
            return find_info(core.registry, adapter_id)
    raise OverruledError(f"Adapter {adapter_id!r} was unloaded while it was loaded, or before.")


def _make_current(core: ManagerCore, record: Record, origin: Origin, ticket: int) -> AdapterInfo:
    with core.changed:
        current = core.registry.finish_load(
            record.version,
            ticket,
            origin,
            host_bytes=record.host_bytes,
            device_bytes=record.device_bytes,
            drain_until=core.drain_until(),
        )
        assert current is not None, "loads of an id end under the admin lock"
        core.changed.notify_all()
        info = record_info(current)
    _log.info("adapter_loaded", adapter=info.adapter_id, digest=info.digest, bytes=info.bytes)
    if info.warning:
        _log.warning("adapter_warning", adapter=info.adapter_id, warning=info.warning)
    return info


def _is_overruled(saved: SavedAdapter | None, digest: str, intent: Intent) -> bool:
    if intent.by_call or saved is None or saved.folder_digest != digest:
        return False
    return saved.by_call or not saved.digest


def _saved(saved: SavedAdapter | None, record: Record, intent: Intent) -> SavedAdapter:
    """What the state directory holds of the id from now on."""
    digest = record.version.digest
    saved = saved or _unknown(record.version.adapter_id)
    return dataclasses.replace(
        saved,
        digest=digest,
        source=intent.source,
        by_call=intent.by_call,
        folder_digest=digest if intent.is_folder else saved.folder_digest,
        previous=saved.digest if saved.digest not in ("", digest) else saved.previous,
        allow_zero=intent.options.allow_zero,
        allow_other_base=intent.options.allow_other_base,
    )


def _unknown(adapter_id: str) -> SavedAdapter:
    """What is remembered of an id that nothing is known of."""
    return SavedAdapter(adapter_id, "", "", False, "", "", "", False, False)


def saved_pin(saved: SavedAdapter) -> Tier | None:
    """The tier that an adapter was pinned to."""
    return Tier(saved.pinned) if saved.pinned else None
