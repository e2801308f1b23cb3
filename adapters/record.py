"""One version as the registry keeps it. Imports no torch."""

from dataclasses import dataclass, field
from typing import Final, Protocol

from .adapter_tokenizer import AdapterTokenizer
from .errors import ServingError
from .info import Tier
from .origin import Origin
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
        is_current: requests that name its id get it.
        candidacies: calls under way that may make it current or name it by an alias; it is kept for them, though no
            request can name it yet.
        aliases: names that lead to it.
        pinned: tier in which it is kept, while it is current.
        is_stored: its files are in the version store.
        proof: what its golden file proved, for people.
        tokenizer: its own, where that is not quite the base's.
        in_flight: requests that hold it, calls that wait for it included.
        holds: those of in_flight that are calls, not requests.
        active: running requests that use its slot.
        wanted: whether it waits to come to the device.
        host: the host copy, or None.
        slot: the device slot, or None.
        host_claimed, device_claimed: a copy into that tier is under way; its bytes are already accounted.
        leased_until: a device copy is kept for a waiting request until then (`time.monotonic()`).
        deadline: when requests that still hold it are failed, for a draining version; None while it is kept.
        error: why requests that hold it must fail, or None.
        replace_error: why the last load of its id failed, for the current version.
        last_used: for LRU.
    """

    version: AdapterVersion
    origin: Origin
    host_bytes: int
    device_bytes: int
    is_current: bool = False
    candidacies: int = 0
    aliases: set[str] = field(default_factory=set)
    pinned: Tier | None = None
    is_stored: bool = False
    proof: str = ""
    tokenizer: AdapterTokenizer | None = None
    in_flight: int = 0
    holds: int = 0
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
    def is_kept(self) -> bool:
        """Whether it stays although no request holds it."""
        return self.error is None and (self.is_current or self.candidacies > 0 or bool(self.aliases))

    @property
    def is_servable(self) -> bool:
        """Whether new requests may name it."""
        return self.error is None and (self.is_current or bool(self.aliases))

    @property
    def is_readable(self) -> bool:
        """Whether its files are still on a disk, as far as is known."""
        return self.is_current or self.is_stored

    @property
    def is_needed(self) -> bool:
        """Whether losing its last copy would matter, were it not on a disk."""
        return bool(self.in_flight) or bool(self.aliases) or self.pinned is not None

    @property
    def tier(self) -> Tier:
        """The fastest tier that holds it."""
        if self.slot is not None:
            return Tier.DEVICE
        return Tier.DISK if self.host is None else Tier.HOST
