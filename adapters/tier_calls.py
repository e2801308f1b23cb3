"""Calls that bring adapters into a tier and wait until they are there: pin, prefetch. Thread-safe; they block."""

import dataclasses
import time
from typing import Final

from .core import ManagerCore
from .errors import AdapterIdError, AdapterMemoryError, AdapterNotReadyError
from .info import AdapterInfo, Tier
from .listing import find_info, record_info
from .loading import shutting_down
from .lookup import find_current, find_version
from .record import Record
from .reference import parse_reference
from .rules import check_room

# How long a call waits for a tier when it has no deadline of its own.
PATIENCE_S: Final = 300.0


class TierCalls:
    """See the module; AdapterManager has the same calls, with what they raise.

    Args:
        core: registry, locks and state.
    """

    def __init__(self, core: ManagerCore) -> None:
        self._core = core
        self._closed = False

    def pin(self, adapter_id: str, tier: Tier, timeout_s: float | None) -> AdapterInfo:
        """Keep an id's current version in a tier, and wait until it is there."""
        core = self._core
        deadline = _deadline(timeout_s)
        with core.admin:
            with core.changed:
                record = find_current(core.registry, adapter_id)
                check_room(core.registry, record, tier)
            self._save_pin(adapter_id, tier.value)
            with core.changed:
                core.registry.pin(adapter_id, tier)
                core.changed.notify_all()
        with core.changed:
            record = find_current(core.registry, adapter_id)
            core.registry.hold_for_call(record)
        return self._wait_for(record, tier, deadline)

    def unpin(self, adapter_id: str) -> AdapterInfo:
        """Let a pinned adapter be evicted again."""
        core = self._core
        with core.admin:
            with core.changed:
                if adapter_id not in core.registry.pins:  # else it may have failed since, and is still to be unpinned
                    find_current(core.registry, adapter_id)
            self._save_pin(adapter_id, "")
            with core.changed:
                core.registry.pin(adapter_id, None)
                core.changed.notify_all()
                return find_info(core.registry, adapter_id)

    def prefetch(self, text: str, tier: Tier, timeout_s: float | None) -> AdapterInfo:
        """Bring a version into a tier, and wait until it is there."""
        reference = parse_reference(text)
        deadline = _deadline(timeout_s)
        with self._core.changed:
            alias = self._core.registry.aliases.get(reference.name)
            if alias is not None and len(alias.targets) > 1:
                raise AdapterIdError(f"Alias {reference.name!r} leads to several versions; name one as `id@digest`.")
            record = find_version(self._core.registry, reference.name, reference.digest_prefix, "")
            self._core.registry.hold_for_call(record)
        return self._wait_for(record, tier, deadline)

    def close(self) -> None:
        """Let calls that wait for a tier fail."""
        with self._core.changed:
            self._closed = True
            self._core.changed.notify_all()

    def _save_pin(self, adapter_id: str, tier: str) -> None:
        saved = self._core.state.database.get(adapter_id)
        if saved is not None:
            self._core.state.database.save(dataclasses.replace(saved, pinned=tier))

    def _wait_for(self, record: Record, tier: Tier, deadline: float) -> AdapterInfo:
        """Wait until a held version is in a tier, and let it go."""
        core = self._core
        with core.changed:
            try:
                while record.slot is None if tier is Tier.DEVICE else record.tier is Tier.DISK:
                    if record.error is not None:
                        raise type(record.error)(record.error.message, record.error.metadata)
                    if self._closed:
                        raise shutting_down()
                    self._check_fits(record, tier)
                    (core.registry.want if tier is Tier.DEVICE else core.registry.want_host)(record)
                    core.changed.notify_all()
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        raise AdapterNotReadyError(
                            f"Adapter {record.version.adapter_id!r} did not come into {tier} memory in time; what is "
                            "there is in use or pinned. Try again later, or with a longer deadline.",
                            {"adapter_id": record.version.adapter_id},
                        )
                    core.changed.wait(remaining)
                return record_info(record)
            finally:
                core.registry.release_for_call(record)
                core.changed.notify_all()

    def _check_fits(self, record: Record, tier: Tier) -> None:
        size = record.device_bytes if tier is Tier.DEVICE else record.host_bytes
        memory = self._core.registry.memory
        budget = memory.device_budget if tier is Tier.DEVICE else memory.host_budget
        if size > budget:
            raise AdapterMemoryError(f"The adapter takes {size} bytes of {tier} memory; its budget is {budget}.")


def _deadline(timeout_s: float | None) -> float:
    return time.monotonic() + (PATIENCE_S if timeout_s is None else timeout_s)
