"""What a load would do: `LoadAdapter` with `dry_run`."""

import time
from dataclasses import replace

from .core import ManagerCore
from .info import AdapterState, Eviction, LoadPlan, Tier
from .listing import record_info
from .reader import LoadedAdapter
from .record import Record
from .residency import Room
from .rules import check_room
from .version import AdapterVersion


def make_plan(core: ManagerCore, adapter_id: str, loaded: LoadedAdapter) -> LoadPlan:
    """What publishing an adapter that was read would do right now.

    Raises:
        AdapterMemoryError: pinned adapters leave no room for it.
    """
    host_bytes, device_bytes = loaded.packed.nbytes, core.device_store.extent_bytes(loaded.packed)
    record = Record(AdapterVersion(adapter_id, loaded.digest), loaded.origin, host_bytes, device_bytes)
    with core.changed:
        registry = core.registry
        pin = registry.pins.get(adapter_id)
        known = registry.by_id.get(adapter_id, {}).get(loaded.digest, record)
        current = registry.current.get(adapter_id)
        check_room(registry, known, pin, None if current is known else current)
        in_host, on_device = Room(True, ()), Room(True, ())
        if known.host is None:
            in_host = registry.memory.room_in_host(host_bytes)
        if known.slot is None:
            on_device = registry.memory.room_on_device(device_bytes, time.monotonic())
    return LoadPlan(
        adapter=replace(record_info(record), state=AdapterState.STORED),
        is_new=current is None or current.version.digest != loaded.digest,
        host_bytes=host_bytes,
        device_bytes=device_bytes,
        fits_host=in_host.fits,
        fits_device=on_device.fits,
        evictions=(*_evictions(in_host, Tier.HOST), *_evictions(on_device, Tier.DEVICE)),
    )


def _evictions(room: Room, tier: Tier) -> list[Eviction]:
    victims = room.victims if room.fits else ()  # what does not fit evicts nothing
    return [Eviction(record.version.adapter_id, record.version.digest, tier) for record in victims]
