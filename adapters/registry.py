"""The state machine of adapters: ids, their versions, aliases and pins, and who holds them.

Pure: no torch, no IO, no thread, no clock of its own. The adapter manager owns it and calls it under its one lock;
every call is short. Copies in host and device memory are `Residency`'s part.

A version lives for as long as it is current, a candidate, named by an alias, held by a request or being copied. One
that was dropped by force (`error`) never comes back: the same content loaded again is another incarnation.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from .aliases import AliasTable
from .errors import AdapterUnloadedError, ServingError
from .info import AliasInfo, Tier
from .loads_under_way import LoadsUnderWay
from .lookup import find_version, not_found
from .origin import Origin
from .record import HostCopy, Record
from .residency import Residency
from .version import AdapterVersion

# Failed ids are kept for `list()`; a client can invent ids, so only the latest ones are.
MAX_FAILED: Final = 256


class Registry:
    """See the module.

    Args:
        host_budget: bytes of host copies.
        device_budget: bytes of device copies.
        max_slots: device copies at most.
        free_slot: told when a version leaves its device slot.
        on_evict: told the tier of each eviction.

    Attributes:
        records: every version.
        by_id: the versions of each id, by digest; those that were dropped by force are left out.
        digests: how many of those have each digest.
        current: what requests for an id get.
        failed: why the last load of an id without version failed.
        loading: loads that are under way, by id.
        draining: versions that nobody may name any more and requests still hold.
        wanted, host_wanted: versions that wait to come to the device, or to host memory; oldest wish first.
        pins: tier in which the current version of an id is kept.
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
        self.by_id: dict[str, dict[str, Record]] = {}
        self.digests: dict[str, int] = {}
        self.current: dict[str, Record] = {}
        self.failed: OrderedDict[str, ServingError] = OrderedDict()
        self.loading = LoadsUnderWay()
        self.wanted: OrderedDict[AdapterVersion, Record] = OrderedDict()
        self.host_wanted: OrderedDict[AdapterVersion, Record] = OrderedDict()
        self.draining: dict[Record, None] = {}
        self.aliases = AliasTable()
        self.pins: dict[str, Tier] = {}
        self.memory = Residency(
            host_budget=host_budget,
            device_budget=device_budget,
            max_slots=max_slots,
            free_slot=free_slot,
            on_evict=on_evict,
        )
        self._uses = 0
        self._incarnations = 0

    # Loading and unloading ids.

    def add_candidate(self, version: AdapterVersion, origin: Origin, *, host_bytes: int, device_bytes: int) -> Record:
        """A version that no request can name yet, held and kept by the caller until `drop_candidate`.

        Returns:
            Its record; the one that exists already when the content is known.
        """
        record = self._record(version, origin, host_bytes, device_bytes)
        record.candidacies += 1
        self._keep(record)
        self.hold_for_call(record)
        return record

    def drop_candidate(self, record: Record, drain_until: float) -> None:
        """The caller's hold ends: the candidate was refused, or has become something that is kept."""
        record.candidacies -= 1
        if not record.is_kept:
            self._drain(record, drain_until)
        self.release_for_call(record)

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

        Args:
            version: id and digest; the incarnation does not count.
            ticket: of `loading.begin`.
            origin: where it came from.
            host_bytes, device_bytes: what copies take.
            drain_until: `time.monotonic()` second.

        Returns:
            The version's record (also when the same content was current, or draining, already), or None when the id was
            unloaded, or a later load of it finished, since this one began.
        """
        if not self.loading.end(version.adapter_id, ticket):
            return None
        record = self._record(version, origin, host_bytes, device_bytes)
        record.origin = origin  # the same content may have moved
        record.replace_error = None
        self.failed.pop(version.adapter_id, None)
        before = self.current.get(version.adapter_id)
        self.current[version.adapter_id] = record
        record.is_current = True
        self._keep(record)
        if before is not None and before is not record:
            self._retire(before, drain_until)
        self._apply_pin(record)
        self._touch(record)
        return record

    def fail_load(self, adapter_id: str, ticket: int, error: ServingError) -> None:
        """A load ended with an error. A current version stays and keeps the error as a note."""
        if not self.loading.end(adapter_id, ticket):
            return
        if adapter_id in self.current:
            self.current[adapter_id].replace_error = error
        else:
            self._remember_failure(adapter_id, error)

    def unload(self, adapter_id: str, drain_until: float) -> None:
        """Forget an id. Its version drains unless an alias names it; loads of it under way will have no effect.

        Raises:
            AdapterNotFoundError: nothing of that id is known.
        """
        is_loading = self.loading.outdate(adapter_id)
        record = self.current.pop(adapter_id, None)
        failed = self.failed.pop(adapter_id, None)
        if record is not None:
            self._retire(record, drain_until)
        elif not is_loading and failed is None:
            raise not_found(adapter_id)

    # Aliases and pins.

    def set_alias(self, alias: AliasInfo, drain_until: float) -> None:
        """Create or move an alias; what it led to before drains unless something else keeps it."""
        before = self._targets_of(self.aliases.get(alias.name))
        self.aliases.set(alias)
        self._realias([*before, *self._targets_of(alias)], drain_until)

    def delete_alias(self, name: str, drain_until: float) -> None:
        """Forget an alias, if there is one of that name."""
        self._realias(self._targets_of(self.aliases.delete(name)), drain_until)

    def pin(self, adapter_id: str, tier: Tier | None) -> None:
        """Keep the current version of an id in a tier from now on, or in none."""
        if tier is None:
            self.pins.pop(adapter_id, None)
        else:
            self.pins[adapter_id] = tier
        record = self.current.get(adapter_id)
        if record is not None:
            self._apply_pin(record)

    # Requests.

    def resolve(self, name: str, digest_prefix: str, routing_key: str) -> AdapterVersion:
        """Hold a version for a request; stores nothing about an unknown name.

        Raises:
            AdapterNotFoundError, AdapterDigestError, AdapterIdError: see find_version.
        """
        record = find_version(self, name, digest_prefix, routing_key)
        self.hold(record.version)
        return record.version

    def hold(self, version: AdapterVersion) -> None:
        """One more request, or call, needs a version that someone holds or that is kept."""
        record = self.records[version]
        record.in_flight += 1
        self._touch(record)

    def release(self, version: AdapterVersion) -> None:
        """A request that held the version ended."""
        record = self.records[version]
        assert record.in_flight > 0, f"{version} released more often than resolved"
        record.in_flight -= 1
        if record.in_flight == 0:
            self._lose_interest(record)
        self._collect(record)

    def hold_for_call(self, record: Record) -> None:
        """A call, not a request, needs the version until `release_for_call`."""
        self.hold(record.version)
        record.holds += 1

    def release_for_call(self, record: Record) -> None:
        """The call has ended."""
        record.holds -= 1
        self.release(record.version)

    def activate(self, version: AdapterVersion) -> int | None:
        """Use the version's slot for a request, or wish for the version to be brought in.

        Raises:
            ServingError: the version failed or was dropped.
        """
        record = self.records[version]
        self._check_activation(record)
        if record.slot is None:
            self.want(record)
            return None
        return self._use(record)

    def activate_all(self, versions: Sequence[AdapterVersion], keep_until: float) -> list[int] | None:
        """Use the slots of several distinct versions for a request, or none and wish for those that are missing.

        Args:
            versions: held by the request.
            keep_until: `time.monotonic()` second until which those that are there are kept if others are missing.

        Raises:
            ServingError: one of them failed or was dropped.
        """
        records = [self.records[version] for version in versions]
        for record in records:
            self._check_activation(record)
        if all(record.slot is not None for record in records):
            return [self._use(record) for record in records]
        for record in records:
            if record.slot is None:
                self.want(record)
            else:
                record.leased_until = max(record.leased_until, keep_until)
        return None

    def deactivate(self, version: AdapterVersion) -> None:
        """A request stopped using the version's slot."""
        record = self.records[version]
        assert record.active > 0, f"{version} deactivated more often than activated"
        record.active -= 1
        self._touch(record)
        self._collect(record)

    def want(self, record: Record) -> None:
        """Wish for a device copy of a version that somebody needs."""
        if record.slot is None and record.error is None:
            record.wanted = True
            self.wanted.setdefault(record.version, record)

    def want_host(self, record: Record) -> None:
        """Wish for a host copy of a version that somebody needs."""
        if record.host is None and record.error is None:
            self.host_wanted.setdefault(record.version, record)

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next."""
        return min((r.deadline for r in self.draining if r.deadline is not None), default=None)

    def expire(self, now: float) -> list[AdapterVersion]:
        """Fail draining versions whose deadline has passed; returns those that requests still hold."""
        late = [r for r in self.draining if r.deadline is not None and r.deadline <= now]
        for record in late:
            message = f"Adapter {record.version.adapter_id!r} was unloaded or replaced, and its drain deadline passed."
            self._doom(record, AdapterUnloadedError(message, {"adapter_id": record.version.adapter_id}))
        return [record.version for record in late if record.in_flight]

    def fail_version(self, version: AdapterVersion, error: ServingError) -> None:
        """A version cannot be served any more (its folder changed, say): requests that hold it fail."""
        record = self.records.get(version)
        if record is None or record.error is not None:
            return
        if record.is_current:
            del self.current[version.adapter_id]
            self._remember_failure(version.adapter_id, error)
        self._doom(record, error)

    def fail_waiting(self, version: AdapterVersion, error: ServingError) -> None:
        """Like fail_version, but the trouble may pass: a kept version goes on as a new incarnation."""
        record = self.records.get(version)
        if record is None or record.error is not None:
            return
        if not record.is_servable:
            self._doom(record, error)
            return
        self._forget(record)
        heir = self._record(version, record.origin, record.host_bytes, record.device_bytes)
        heir.is_current, heir.is_stored, heir.last_used = record.is_current, record.is_stored, record.last_used
        heir.proof, heir.replace_error = record.proof, record.replace_error
        self.memory.hand_over(record, heir)
        if heir.is_current:
            self.current[version.adapter_id] = heir
            self._apply_pin(heir)
        self._doom(record, error)

    # Copies: like Residency's methods of the same name, and a version that nobody needs any more is freed.

    def claim_host(self, version: AdapterVersion, *, urgent: bool) -> bool:
        """Whether the caller may bring in a host copy; then it must call fill_host or abandon_host."""
        return self.memory.claim_host(self.records[version], urgent=urgent)

    def fill_host(self, version: AdapterVersion, copy: HostCopy) -> None:
        """The claimed host copy is there."""
        record = self.records[version]
        self.memory.fill_host(record, copy)
        self.host_wanted.pop(version, None)
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

    def _check_activation(self, record: Record) -> None:
        assert record.in_flight > 0, f"{record.version} activated without being resolved"
        if record.error is not None:
            # A new instance: one that is raised again and again would collect every traceback.
            raise type(record.error)(record.error.message, record.error.metadata)

    def _use(self, record: Record) -> int:
        assert record.slot is not None
        record.active += 1
        record.leased_until = 0.0
        self._touch(record)
        return record.slot

    def _record(self, version: AdapterVersion, origin: Origin, host_bytes: int, device_bytes: int) -> Record:
        """The live record of the content, or a new incarnation of it."""
        versions = self.by_id.setdefault(version.adapter_id, {})
        record = versions.get(version.digest)
        if record is None:
            self._incarnations += 1
            fresh = AdapterVersion(version.adapter_id, version.digest, self._incarnations)
            record = Record(fresh, origin, host_bytes, device_bytes)
            record.aliases = self.aliases.names_of(version.adapter_id, version.digest)
            self.records[fresh] = versions[version.digest] = record
            self.digests[version.digest] = self.digests.get(version.digest, 0) + 1
        return record

    def _targets_of(self, alias: AliasInfo | None) -> list[Record]:
        """Live records of what an alias leads to."""
        targets = alias.targets if alias else ()
        found = (self.by_id.get(target.adapter_id, {}).get(target.digest) for target in targets)
        return [record for record in found if record is not None]

    def _realias(self, records: list[Record], drain_until: float) -> None:
        for record in records:
            record.aliases = self.aliases.names_of(record.version.adapter_id, record.version.digest)
            if record.is_kept:
                self._keep(record)
            else:
                self._drain(record, drain_until)

    def _apply_pin(self, record: Record) -> None:
        record.pinned = self.pins.get(record.version.adapter_id)
        if record.pinned is Tier.DEVICE:
            self.want(record)
        elif not record.in_flight:
            self._unwant(record)
        if record.pinned is Tier.HOST:
            self.want_host(record)
        elif not record.in_flight:
            self.host_wanted.pop(record.version, None)

    def _remember_failure(self, adapter_id: str, error: ServingError) -> None:
        self.failed[adapter_id] = error
        self.failed.move_to_end(adapter_id)
        if len(self.failed) > MAX_FAILED:
            self.failed.popitem(last=False)

    def _keep(self, record: Record) -> None:
        record.deadline = None
        self.draining.pop(record, None)

    def _retire(self, record: Record, drain_until: float) -> None:
        """A version is current no more."""
        record.is_current = False
        record.pinned = None
        if not record.in_flight:
            self._lose_interest(record)
        if not record.is_kept:
            self._drain(record, drain_until)

    def _drain(self, record: Record, until: float) -> None:
        if record.error is None and record.deadline is None:
            record.deadline = until
            self.draining[record] = None
        self._collect(record)

    def _doom(self, record: Record, error: ServingError) -> None:
        """No request may use the version any more; its memory goes as soon as nothing reads it."""
        record.error = error
        record.is_current = False
        record.pinned = None
        record.aliases = set()
        self.draining.pop(record, None)
        self._forget(record)
        self._lose_interest(record)
        self._collect(record)

    def _forget(self, record: Record) -> None:
        """The record is not found by its content any more."""
        adapter_id, digest = record.version.adapter_id, record.version.digest
        versions = self.by_id.get(adapter_id, {})
        if versions.get(digest) is record:
            del versions[digest]
            if not versions:
                del self.by_id[adapter_id]
            self.digests[digest] -= 1
            if not self.digests[digest]:
                del self.digests[digest]

    def _lose_interest(self, record: Record) -> None:
        """No request waits for the version to come in, or to run on its slot."""
        if record.pinned is not Tier.DEVICE:
            self._unwant(record)
        if record.pinned is not Tier.HOST:
            self.host_wanted.pop(record.version, None)
        record.leased_until = 0.0

    def _unwant(self, record: Record) -> None:
        record.wanted = False
        self.wanted.pop(record.version, None)

    def _collect(self, record: Record) -> None:
        """Free what a version no longer needs: its copies once no request may run on it, then the record."""
        if record.is_kept or record.device_claimed or record.active or (record.in_flight and record.error is None):
            return
        self.memory.drop_host(record)
        self.memory.drop_device(record)
        if not record.in_flight and not record.host_claimed:
            self.draining.pop(record, None)
            self.host_wanted.pop(record.version, None)
            self._forget(record)
            self.records.pop(record.version, None)

    def _touch(self, record: Record) -> None:
        self._uses += 1
        record.last_used = self._uses
