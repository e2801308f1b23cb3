"""Which versions have a copy in host and device memory, within byte budgets. Imports no torch.

A version's copies come and go like this:

    disk ──claim_host──▶ (reading) ──fill_host──▶ host ──claim_device──▶ (copying) ──fill_device──▶ device

A claim reserves the budget before the work starts, evicting copies that are idle. What is never evicted: a copy in the
tier that its adapter is pinned to, a device copy that running requests use (`active`) or that has just been brought in
for a waiting one (`leased_until`), a host copy that is being copied from, and the last copy of a version that is needed
and cannot be read from disk again. The rest goes in this order: versions that no request holds; versions that have
another copy; then, only for a waiting request, last copies that can be read again. Least recently used first.
"""

from collections.abc import Callable
from typing import NamedTuple

from .info import Tier
from .record import LEASE_S, HostCopy, Record


class Room(NamedTuple):
    """What bringing in a copy would take.

    Attributes:
        fits: whether it would fit after the evictions.
        victims: whose copies would go, in this order.
    """

    fits: bool
    victims: tuple[Record, ...]


class Residency:
    """Budgets and evictions. Looks at resident versions only: its cost does not grow with those on disk.

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
        self.host_budget = host_budget
        self.device_budget = device_budget
        self.max_slots = max_slots
        self.host_used = 0
        self.device_used = 0
        # With a copy in the tier, or a claim to one.
        self._in_host: dict[Record, None] = {}
        self._on_device: dict[Record, None] = {}
        self._free_slot = free_slot
        self._on_evict = on_evict

    def claim_host(self, record: Record, *, urgent: bool) -> bool:
        """Reserve host memory for a version without host copy; whether the caller may bring one in.

        After True the caller must call fill_host or abandon_host.

        Args:
            record: the version's.
            urgent: a request waits for it: last copies that can be read again may be evicted, too.
        """
        if record.host is not None or record.host_claimed:
            return False
        room = self.room_in_host(record.host_bytes, urgent=urgent)
        if not room.fits:
            return False
        for victim in room.victims:
            self.drop_host(victim)
            self._on_evict(Tier.HOST)
        self.host_used += record.host_bytes
        record.host_claimed = True
        self._in_host[record] = None
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
        del self._in_host[record]

    def claim_device(self, record: Record, now: float) -> bool:
        """Reserve device bytes and a slot for a version with a host copy; whether that was possible.

        After True the caller must call fill_device or abandon_device.
        """
        assert record.host is not None and record.slot is None and not record.device_claimed
        room = self.room_on_device(record.device_bytes, now)
        if not room.fits:
            return False
        for victim in room.victims:
            self.drop_device(victim)
            self._on_evict(Tier.DEVICE)
        self.device_used += record.device_bytes
        record.device_claimed = True
        self._on_device[record] = None
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
        del self._on_device[record]

    def drop_host(self, record: Record) -> None:
        """Free the host copy, if there is one."""
        if record.host is not None:
            record.host = None
            self.host_used -= record.host_bytes
            del self._in_host[record]

    def drop_device(self, record: Record) -> None:
        """Free the device copy, if there is one."""
        if record.slot is not None:
            self._free_slot(record.slot)
            record.slot = None
            self.device_used -= record.device_bytes
            del self._on_device[record]

    def hand_over(self, record: Record, heir: Record) -> None:
        """Give the host copy of a version to a new incarnation of the same content."""
        assert heir.host_bytes == record.host_bytes and heir.host is None and not heir.host_claimed
        if record.host is not None:
            heir.host, record.host = record.host, None
            del self._in_host[record]
            self._in_host[heir] = None

    def room_in_host(self, size: int, *, urgent: bool = False) -> Room:
        """Whether a host copy of `size` bytes would fit, and what would go for it."""

        def evictable(r: Record) -> bool:
            if r.host is None or r.device_claimed or r.pinned is Tier.HOST:
                return False
            last = r.is_needed and r.slot is None
            return not last or (urgent and r.is_readable and not r.wanted)

        candidates = sorted(filter(evictable, self._in_host), key=lambda r: _order(r, r.slot is None))
        missing = size - (self.host_budget - self.host_used)
        return _enough(candidates, missing, lambda r: r.host_bytes)

    def room_on_device(self, size: int, now: float) -> Room:
        """Whether a device copy of `size` bytes would fit at `time.monotonic()` second `now`, and what would go."""

        def evictable(r: Record) -> bool:
            if r.slot is None or r.active or r.leased_until > now or r.pinned is Tier.DEVICE:
                return False
            return r.host is not None or not r.is_needed or r.is_readable

        candidates = sorted(filter(evictable, self._on_device), key=lambda r: _order(r, r.host is None))
        missing = size - (self.device_budget - self.device_used)
        if len(self._on_device) >= self.max_slots:
            missing = max(missing, 1)
        return _enough(candidates, missing, lambda r: r.device_bytes)

    def check_integrity(self) -> None:
        """Assert that what is accounted is what is there, and within the budgets."""
        assert all(r.host is not None or r.host_claimed for r in self._in_host)
        assert all(r.slot is not None or r.device_claimed for r in self._on_device)
        assert self.host_used == sum(r.host_bytes for r in self._in_host) <= self.host_budget
        assert self.device_used == sum(r.device_bytes for r in self._on_device) <= self.device_budget
        assert len(self._on_device) <= self.max_slots
        slots = [r.slot for r in self._on_device if r.slot is not None]
        assert len(slots) == len(set(slots))


def _order(record: Record, is_last: bool) -> tuple[bool, bool, int]:
    """Which goes first."""
    return record.is_needed and is_last, record.in_flight > 0, record.last_used


def _enough(candidates: list[Record], missing: int, size: Callable[[Record], int]) -> Room:
    """The first candidates that free `missing` bytes together."""
    victims: list[Record] = []
    for record in candidates:
        if missing <= 0:
            break
        victims.append(record)
        missing -= size(record)
    return Room(missing <= 0, tuple(victims))
