"""The state machine of adapters: ids, their versions, and who holds them.

Pure: no torch, no IO, no thread, no clock of its own. The adapter manager owns it and calls it under its one lock;
every call is short. Copies in host and device memory are `Residency`'s part.

A version lives from `finish_load` until it is neither current nor held by a request nor being copied.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from .errors import AdapterNotFoundError, AdapterUnloadedError, ServingError
from .info import Tier
from .report import Origin
from .residency import HostCopy, Record, Residency
from .version import AdapterVersion

# Failed ids are kept for `list()`; a client can invent ids, so only the latest ones are.
MAX_FAILED: Final = 256


@dataclass(slots=True)
class _Loading:
    """Loads of one id that are under way."""

    count: int = 0
    barrier: int = 0  # results of loads that began before this ticket are outdated


class Registry:
    """See the module.

    Args:
        host_budget: bytes of host copies.
        device_budget: bytes of device copies.
        max_slots: device copies at most.
        free_slot: told when a version leaves its device slot.
        on_evict: told the tier of each eviction.
    """

    def __init__(
        self,
        *,
        host_budget: int,
        device_budget: int,
        max_slots: int,
        free_slot: Callable[[int], None],
        on_evict: Callable[[Tier], None],
    ) -> None:
        self.records: dict[AdapterVersion, Record] = {}
        self.current: dict[str, Record] = {}
        self.failed: OrderedDict[str, ServingError] = OrderedDict()
        self.wanted: OrderedDict[AdapterVersion, Record] = OrderedDict()  # oldest wish first
        self.loading: dict[str, _Loading] = {}
        self.memory = Residency(
            self.records.values,
            host_budget=host_budget,
            device_budget=device_budget,
            max_slots=max_slots,
            free_slot=free_slot,
            on_evict=on_evict,
        )
        self._tickets = 0
        self._uses = 0

    # Loading and unloading ids.

    def begin_load(self, adapter_id: str) -> int:
        """A load of an id starts; returns the ticket to finish it with."""
        self._tickets += 1
        self.loading.setdefault(adapter_id, _Loading()).count += 1
        return self._tickets

    def finish_load(
        self,
        version: AdapterVersion,
        ticket: int,
        origin: Origin,
        *,
        host_bytes: int,
        device_bytes: int,
        drain_until: float,
    ) -> Record | None:
        """A load ended well: its version becomes current, the version before it drains until `drain_until`.

        Returns:
            The version's record (also when the same content was current, or draining, already), or None when the id was
            unloaded, or a later load of it finished, since this one began.
        """
        if not self._end_load(version.adapter_id, ticket):
            return None
        record = self.records.get(version)
        if record is None:
            record = self.records[version] = Record(version, origin, host_bytes, device_bytes)
        record.origin = origin  # the same content may have moved
        before = self.current.get(version.adapter_id)
        self.current[version.adapter_id] = record
        self.failed.pop(version.adapter_id, None)
        record.deadline = record.error = record.replace_error = None
        self._touch(record)
        if before is not None and before is not record:
            self._drain(before, drain_until)
        return record

    def fail_load(self, adapter_id: str, ticket: int, error: ServingError) -> None:
        """A load ended with an error. A current version stays and keeps the error as a note."""
        if not self._end_load(adapter_id, ticket):
            return
        if adapter_id in self.current:
            self.current[adapter_id].replace_error = error
        else:
            self._remember_failure(adapter_id, error)

    def unload(self, adapter_id: str, drain_until: float) -> None:
        """Forget an id. Its version drains; loads of it that are under way will have no effect.

        Raises:
            AdapterNotFoundError: nothing of that id is known.
        """
        loading = self.loading.get(adapter_id)
        if loading is not None:
            self._tickets += 1
            loading.barrier = self._tickets
        record = self.current.pop(adapter_id, None)
        failed = self.failed.pop(adapter_id, None)
        if record is not None:
            self._drain(record, drain_until)
        elif loading is None and failed is None:
            raise not_found(adapter_id)

    # Requests.

    def resolve(self, adapter_id: str) -> AdapterVersion:
        """Pin the current version for a request; stores nothing about an unknown id.

        Raises:
            AdapterNotFoundError: unknown, still loading, or failed.
        """
        record = self.current.get(adapter_id)
        if record is None:
            if adapter_id in self.loading:
                raise AdapterNotFoundError(f"Adapter {adapter_id!r} is still being loaded; try again.")
            if adapter_id in self.failed:
                raise AdapterNotFoundError(f"Adapter {adapter_id!r} failed to load: {self.failed[adapter_id].message}")
            raise not_found(adapter_id)
        record.in_flight += 1
        self._touch(record)
        return record.version

    def release(self, version: AdapterVersion) -> None:
        """A request that pinned the version ended."""
        record = self.records[version]
        assert record.in_flight > 0, f"{version} released more often than resolved"
        record.in_flight -= 1
        if record.in_flight == 0:
            self._lose_interest(record)
        self._collect(record)

    def activate(self, version: AdapterVersion) -> int | None:
        """Use the version's slot for a request, or wish for the version to be brought in.

        Raises:
            ServingError: the version failed or was dropped.
        """
        record = self.records[version]
        assert record.in_flight > 0, f"{version} activated without being resolved"
        if record.error is not None:
            # A new instance: one that is raised again and again would collect every traceback.
            raise type(record.error)(record.error.message, record.error.metadata)
        if record.slot is None:
            record.wanted = True
            self.wanted.setdefault(version, record)
            return None
        record.active += 1
        record.leased_until = 0.0
        self._touch(record)
        return record.slot

    def deactivate(self, version: AdapterVersion) -> None:
        """A request stopped using the version's slot."""
        record = self.records[version]
        assert record.active > 0, f"{version} deactivated more often than activated"
        record.active -= 1
        self._touch(record)
        self._collect(record)

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next."""
        return min(
            (r.deadline for r in self.records.values() if r.deadline is not None and r.error is None), default=None
        )

    def expire(self, now: float) -> list[AdapterVersion]:
        """Fail draining versions whose deadline has passed; returns those that requests still hold."""
        late = [r for r in self.records.values() if r.deadline is not None and r.deadline <= now and r.error is None]
        for record in late:
            message = f"Adapter {record.version.adapter_id!r} was unloaded or replaced, and its drain deadline passed."
            self._doom(record, AdapterUnloadedError(message))
        return [record.version for record in late if record.in_flight]

    def fail_version(self, version: AdapterVersion, error: ServingError) -> None:
        """A version cannot be served any more (its folder changed, say): requests that hold it fail."""
        record = self.records.get(version)
        if record is None:
            return
        if self.current.get(version.adapter_id) is record:
            del self.current[version.adapter_id]
            self._remember_failure(version.adapter_id, error)
        self._doom(record, error)

    # Copies: like Residency's methods of the same name, and a version that nobody needs any more is freed.

    def claim_host(self, version: AdapterVersion, *, urgent: bool) -> bool:
        """Whether the caller may bring in a host copy; then it must call fill_host or abandon_host."""
        return self.memory.claim_host(self.records[version], urgent=urgent)

    def fill_host(self, version: AdapterVersion, copy: HostCopy) -> None:
        """The claimed host copy is there."""
        record = self.records[version]
        self.memory.fill_host(record, copy)
        self._collect(record)

    def abandon_host(self, version: AdapterVersion) -> None:
        """The claimed host copy will not come."""
        record = self.records[version]
        self.memory.abandon_host(record)
        self._collect(record)

    def claim_device(self, version: AdapterVersion, now: float) -> bool:
        """Whether the caller may bring in a device copy; then it must call fill_device or abandon_device."""
        return self.memory.claim_device(self.records[version], now)

    def fill_device(self, version: AdapterVersion, slot: int, now: float) -> None:
        """The claimed device copy is there."""
        record = self.records[version]
        self.memory.fill_device(record, slot, now)
        self._unwant(record)
        self._touch(record)
        self._collect(record)

    def abandon_device(self, version: AdapterVersion) -> None:
        """The claimed device copy will not come; its slot, if one was taken, was freed by the caller."""
        record = self.records[version]
        self.memory.abandon_device(record)
        self._collect(record)

    def check_integrity(self) -> None:
        """Assert what must hold between any two calls."""
        self.memory.check_integrity()
        assert len(self.failed) <= MAX_FAILED
        assert [r.version for r in self.wanted.values()] == list(self.wanted)
        for version, record in self.records.items():
            is_current = self.current.get(version.adapter_id) is record
            held = record.in_flight or record.active or record.host_claimed or record.device_claimed
            assert version == record.version and (is_current or held), f"{version} leaked"
            assert is_current == record.current
            assert record.in_flight >= 0 and record.active >= 0 and not (record.active and record.slot is None)
            assert record.wanted == (self.wanted.get(version) is record)
            assert not (record.wanted and (record.slot is not None or record.error or not record.in_flight))
        assert all(self.records.get(version) is record for version, record in self.wanted.items())
        assert all(self.records[r.version] is r and r.version.adapter_id == i for i, r in self.current.items())

    def _end_load(self, adapter_id: str, ticket: int) -> bool:
        """Whether the result of the load may still be used."""
        loading = self.loading[adapter_id]
        valid = ticket > loading.barrier
        if valid:
            loading.barrier = ticket
        loading.count -= 1
        if loading.count == 0:
            del self.loading[adapter_id]
        return valid

    def _remember_failure(self, adapter_id: str, error: ServingError) -> None:
        self.failed[adapter_id] = error
        self.failed.move_to_end(adapter_id)
        if len(self.failed) > MAX_FAILED:
            self.failed.popitem(last=False)

    def _drain(self, record: Record, until: float) -> None:
        record.deadline = until
        self._collect(record)

    def _doom(self, record: Record, error: ServingError) -> None:
        """No request may use the version any more; its memory goes as soon as nothing reads it."""
        record.error = error
        self._lose_interest(record)
        self._collect(record)

    def _lose_interest(self, record: Record) -> None:
        """No request waits for the version to come in, or to run on its slot."""
        self._unwant(record)
        record.leased_until = 0.0

    def _unwant(self, record: Record) -> None:
        record.wanted = False
        self.wanted.pop(record.version, None)

    def _collect(self, record: Record) -> None:
        """Free what a version no longer needs: its copies once no request may run on it, then the record."""
        if record.current or record.device_claimed or record.active or (record.in_flight and record.error is None):
            return
        self.memory.drop_host(record)
        self.memory.drop_device(record)
        if not record.in_flight and not record.host_claimed:
            del self.records[record.version]

    def _touch(self, record: Record) -> None:
        self._uses += 1
        record.last_used = self._uses


def not_found(adapter_id: str) -> AdapterNotFoundError:
    """The error for an id of which nothing is known."""
    return AdapterNotFoundError(
        f"Adapter {adapter_id[:128]!r} is not known to this server; load it, or see ListAdapters for those it has."
    )
