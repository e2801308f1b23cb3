"""Which versions have a copy in host and device memory, within byte budgets. Imports no torch.

A version's copies come and go like this:

    disk ──claim_host──▶ (reading) ──fill_host──▶ host ──claim_device──▶ (copying) ──fill_device──▶ device

A claim reserves the budget before the work starts, evicting copies that are idle. What is never evicted: a device copy
that running requests use (`active`) or that has just been brought in for a waiting one (`leased_until`), a host copy
that is being copied from, and the last copy of a draining version that a request holds, because its folder no longer
has it. The rest goes in this order: versions that no request holds; versions that have another copy; then, only for a
waiting request, last copies of current versions, which can be read from disk again. Least recently used first.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from .errors import ServingError
from .info import Tier
from .report import Origin
from .version import AdapterVersion

# How long a device copy brought in for a waiting request is kept for it. A step must end before the request can run, so
# this is longer than a step; and it ends, so that a request that is not scheduled cannot keep others out for ever.
LEASE_S: Final = 5.0


class HostCopy(Protocol):
    """An adapter in host memory (a PackedAdapter)."""

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""


@dataclass(slots=True, eq=False)
class Record:
    """One version.

    Attributes:
        version: its identity.
        origin: where it was loaded from, and what was found.
        host_bytes, device_bytes: what a copy takes in each tier.
        in_flight: requests that hold it.
        active: running requests that use its slot.
        wanted: whether a request waits for it to come to the device.
        host: the host copy, or None.
        slot: the device slot, or None.
        host_claimed, device_claimed: a copy into that tier is under way; its bytes are already accounted.
        leased_until: a device copy is kept for a waiting request until then (`time.monotonic()`).
        deadline: when requests that still hold it are failed, for a draining version; None while it is current.
        error: why requests that hold it must fail, or None.
        replace_error: why the last load of its id failed, for the current version.
        last_used: for LRU.
    """

    version: AdapterVersion
    origin: Origin
    host_bytes: int
    device_bytes: int
    in_flight: int = 0
    active: int = 0
    wanted: bool = False
    host: HostCopy | None = None
    slot: int | None = None
    host_claimed: bool = False
    device_claimed: bool = False
    leased_until: float = 0.0
    deadline: float | None = None
    error: ServingError | None = None
    replace_error: ServingError | None = None
    last_used: int = 0

    @property
    def current(self) -> bool:
        """Whether new requests for its id get it."""
        return self.deadline is None and self.error is None

    @property
    def tier(self) -> Tier:
        """The fastest tier that holds it."""
        if self.slot is not None:
            return Tier.DEVICE
        return Tier.DISK if self.host is None else Tier.HOST


class Residency:
    """Budgets and evictions over the records of a registry.

    Args:
        records: all versions; read again at every call.
        host_budget: bytes of host copies.
        device_budget: bytes of device copies.
        max_slots: device copies at most.
        free_slot: told when a version leaves its device slot.
        on_evict: told the tier of each eviction.
    """

    def __init__(
        self,
        records: Callable[[], Iterable[Record]],
        *,
        host_budget: int,
        device_budget: int,
        max_slots: int,
        free_slot: Callable[[int], None],
        on_evict: Callable[[Tier], None],
    ) -> None:
        self.host_budget = host_budget
        self.device_budget = device_budget
        self.host_used = 0
        self.device_used = 0
        self._records = records
        self._max_slots = max_slots
        self._num_slots = 0  # taken or claimed
        self._free_slot = free_slot
        self._on_evict = on_evict

    def claim_host(self, record: Record, *, urgent: bool) -> bool:
        """Reserve host memory for a version without host copy; whether the caller may bring one in.

        After True the caller must call fill_host or abandon_host.

        Args:
            record: the version's.
            urgent: a request waits for it: last copies of current versions may be evicted, too.
        """
        if record.host is not None or record.host_claimed:
            return False

        def evictable(r: Record) -> bool:
            last = bool(r.in_flight) and r.slot is None
            spare = not last or (urgent and r.current and not r.wanted)
            return r.host is not None and not r.device_claimed and spare

        victims = self._victims(evictable, record.host_bytes - (self.host_budget - self.host_used), Tier.HOST)
        if victims is None:
            return False
        for victim in victims:
            self.drop_host(victim)
            self._on_evict(Tier.HOST)
        self.host_used += record.host_bytes
        record.host_claimed = True
        return True

    def fill_host(self, record: Record, copy: HostCopy) -> None:
        """The claimed host copy is there."""
        assert record.host_claimed
        record.host_claimed = False
        record.host = copy

    def abandon_host(self, record: Record) -> None:
        """The claimed host copy will not come."""
        assert record.host_claimed
        record.host_claimed = False
        self.host_used -= record.host_bytes

    def claim_device(self, record: Record, now: float) -> bool:
        """Reserve device bytes and a slot for a version with a host copy; whether that was possible.

        After True the caller must call fill_device or abandon_device.
        """
        assert record.host is not None and record.slot is None and not record.device_claimed

        def evictable(r: Record) -> bool:
            last = bool(r.in_flight) and r.host is None
            return r.slot is not None and not r.active and r.leased_until <= now and (not last or r.current)

        missing = record.device_bytes - (self.device_budget - self.device_used)
        victims = self._victims(evictable, missing, Tier.DEVICE)
        if victims == [] and self._num_slots >= self._max_slots:
            victims = self._victims(evictable, 1, Tier.DEVICE)
        if victims is None:
            return False
        for victim in victims:
            self.drop_device(victim)
            self._on_evict(Tier.DEVICE)
        self.device_used += record.device_bytes
        self._num_slots += 1
        record.device_claimed = True
        return True

    def fill_device(self, record: Record, slot: int, now: float) -> None:
        """The claimed device copy is there."""
        assert record.device_claimed
        record.device_claimed = False
        record.slot = slot
        record.leased_until = now + LEASE_S if record.wanted else now

    def abandon_device(self, record: Record) -> None:
        """The claimed device copy will not come; its slot, if one was taken, was freed by the caller."""
        assert record.device_claimed
        record.device_claimed = False
        self.device_used -= record.device_bytes
        self._num_slots -= 1

    def drop_host(self, record: Record) -> None:
        """Free the host copy, if there is one."""
        if record.host is not None:
            record.host = None
            self.host_used -= record.host_bytes

    def drop_device(self, record: Record) -> None:
        """Free the device copy, if there is one."""
        if record.slot is not None:
            self._free_slot(record.slot)
            record.slot = None
            self.device_used -= record.device_bytes
            self._num_slots -= 1

    def check_integrity(self) -> None:
        """Assert that what is accounted is what is there, and within the budgets."""
        in_host = [r for r in self._records() if r.host is not None or r.host_claimed]
        on_device = [r for r in self._records() if r.slot is not None or r.device_claimed]
        assert self.host_used == sum(r.host_bytes for r in in_host) <= self.host_budget
        assert self.device_used == sum(r.device_bytes for r in on_device) <= self.device_budget
        assert self._num_slots == len(on_device) <= self._max_slots
        slots = [r.slot for r in on_device if r.slot is not None]
        assert len(slots) == len(set(slots))

    def _victims(self, evictable: Callable[[Record], bool], missing: int, tier: Tier) -> list[Record] | None:
        """Copies to evict until `missing` bytes are free, or None when even all idle ones would not do."""
        victims: list[Record] = []
        if missing <= 0:
            return victims

        def order(r: Record) -> tuple[bool, bool, int]:
            other_copy = r.slot if tier is Tier.HOST else r.host
            return (bool(r.in_flight) and other_copy is None, r.in_flight > 0, r.last_used)

        for record in sorted(filter(evictable, self._records()), key=order):
            victims.append(record)
            missing -= record.host_bytes if tier is Tier.HOST else record.device_bytes
            if missing <= 0:
                return victims
        return None
