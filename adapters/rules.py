"""What the registry refuses, and what must always hold for it. Imports no torch; called under the manager's lock."""

from collections import Counter

from .errors import AdapterInUseError, AdapterMemoryError
from .info import Tier
from .lookup import not_found
from .record import Record
from .registry import MAX_FAILED, Registry


def check_unload(registry: Registry, adapter_id: str) -> None:
    """Raise unless an id may be unloaded.

    Raises:
        AdapterNotFoundError: nothing of that id is known.
        AdapterInUseError: it is pinned, or an alias leads to it.
    """
    if not (adapter_id in registry.current or adapter_id in registry.loading or adapter_id in registry.failed):
        raise not_found(adapter_id)
    names = registry.aliases.names_of_adapter(adapter_id)
    if names:
        raise AdapterInUseError(
            f"Adapter {adapter_id!r} is not unloaded: alias {names[0]!r} leads to it; move or delete the alias first.",
            {"alias": names[0]},
        )
    if adapter_id in registry.pins:
        raise AdapterInUseError(f"Adapter {adapter_id!r} is not unloaded: it is pinned; unpin it first.")


def check_room(registry: Registry, record: Record, pin: Tier | None, replaced: Record | None = None) -> None:
    """Raise AdapterMemoryError if a version could never come in beside what is pinned, or others beside it.

    What pins leave must hold the largest version that is not pinned, or requests for it would wait for ever. Versions
    that drain do not count: they are gone at the drain deadline at the latest.

    Args:
        registry: all versions.
        record: the version; the registry need not have it.
        pin: tier in which it would be kept, or None.
        replaced: the version that would no longer be current, or None.
    """
    memory = registry.memory
    for tier, budget in ((Tier.HOST, memory.host_budget), (Tier.DEVICE, memory.device_budget)):
        pinned = [registry.current[i] for i, t in registry.pins.items() if t is tier and i in registry.current]
        pinned = [r for r in pinned if r not in (record, replaced)] + ([record] if pin is tier else [])
        if not pinned:
            continue  # only the budget itself limits it, and that was checked when it was read
        kept = [r for r in registry.records.values() if r.is_kept and (r is not replaced or r.aliases)]
        others = [r for r in {*kept, record} if r not in pinned]
        held = sum(_size(r, tier) for r in pinned)
        largest = max((_size(r, tier) for r in others), default=0)
        slots = len(pinned) + bool(others)
        if held + largest > budget or (tier is Tier.DEVICE and slots > memory.max_slots):
            raise AdapterMemoryError(
                f"Adapter {record.version.adapter_id!r} needs {_size(record, tier)} bytes of {tier} memory; pinned "
                f"adapters would take {held} of {budget}, and the largest that is not pinned needs {largest} beside "
                f"them. Unpin one, or raise --adapter-{tier}-bytes (or --adapter-slots).",
                {"adapter_id": record.version.adapter_id},
            )


def check_integrity(registry: Registry) -> None:
    """Assert what must hold between any two calls."""
    registry.memory.check_integrity()
    assert len(registry.failed) <= MAX_FAILED
    for version, record in registry.records.items():
        _check_record(registry, record)
        assert version == record.version
    for versions in (registry.wanted, registry.host_wanted):
        assert all(registry.records.get(version) is record for version, record in versions.items())
    assert all(registry.records.get(record.version) is record for record in registry.draining)
    assert all(r.version.adapter_id == i and r.is_current for i, r in registry.current.items())
    assert all(versions for versions in registry.by_id.values())
    digests = [digest for versions in registry.by_id.values() for digest in versions]
    assert registry.digests == Counter(digests)


def _check_record(registry: Registry, record: Record) -> None:
    version = record.version
    held = record.in_flight or record.active or record.host_claimed or record.device_claimed
    assert record.is_kept or held, f"{version} leaked"
    known = registry.by_id.get(version.adapter_id, {}).get(version.digest)
    assert (known is record) == (record.error is None)
    assert record.is_current == (registry.current.get(version.adapter_id) is record)
    assert (record in registry.draining) == (not record.is_kept and record.error is None)
    assert record.error or (record.deadline is not None) == (record in registry.draining)
    names = registry.aliases.names_of(version.adapter_id, version.digest)
    assert record.aliases == (set() if record.error else names)
    assert record.pinned is (registry.pins.get(version.adapter_id) if record.is_current else None)
    assert 0 <= record.holds <= record.in_flight and not (record.active and record.slot is None)
    assert record.wanted == (registry.wanted.get(version) is record)
    assert not (record.wanted and (record.slot is not None or record.error))
    assert not record.wanted or record.in_flight or record.pinned is Tier.DEVICE
    if version in registry.host_wanted:
        assert record.host is None and (record.in_flight or record.pinned is Tier.HOST)


def _size(record: Record, tier: Tier) -> int:
    return record.host_bytes if tier is Tier.HOST else record.device_bytes
