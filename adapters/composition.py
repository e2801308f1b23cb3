"""Adapters as requests use them: one version, one with a strength, or a weighted sum of several. Imports no torch.

The adapter manager knows versions and their device slots. The scheduler knows *batch slots*: rows with the same one are
adapted alike. One adapter as it was trained has its device slot for a batch slot; everything else gets a number from
`max_slots` on for as long as requests run on it, and the runner asks `expand` which device slots and weights it stands
for. Nothing is computed or copied for a composition, and nothing is kept of one that no request uses.

The promises of the engine's `AdapterPort` hold for compositions as for single versions:

1. A composition with an activation has one of each of its members, so by the manager's own promise their device slots
   stay, and with them the batch slot.
2. When no other adaptation has an activation and none but X is asked for any more, X comes or raises. An activation is
   all members or none, so no other composition waits while it holds a part of what X needs. The members of X must be on
   the device at the same time, however. One composition at a time is the *front*: with every ask of it, those of its
   members that are there are kept for LEASE_S. X becomes the front when the others were not asked for that long. After
   TURN_S without success nothing is kept for REST_S: whoever wished for a version before X did, and has no room beside
   what is kept, is served then, as without compositions. Nobody wishes for another one any more, so after finitely many
   rests only the wishes of X are left, and only its members, leases that end and pins stand against them. Together they
   fit, or the ask raises AdapterMemoryError (pins can come after the request was accepted). So every missing member
   comes in, none that is there goes, as nothing else is brought in, and the ask after the last one came succeeds.

So two compositions that do not fit together take turns, and single versions are kept out for TURN_S + LEASE_S at most;
from twice the scheduler's starvation bound on only the oldest request asks.
"""

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from .adaptation import Adaptation
from .adapter_tokenizer import AdapterVocabulary
from .errors import AdapterDigestError, AdapterIdError
from .record import LEASE_S
from .version import AdapterVersion

TURN_S: Final = 2 * LEASE_S
REST_S: Final = 2 * LEASE_S  # leases end in it


class Wish(NamedTuple):
    """One adapter that a request names.

    Attributes:
        reference: an id, an alias or `id@digest-prefix`.
        weight: finite, in float32 precision.
        field: of the request, where the reference was given.
    """

    reference: str
    weight: float
    field: str


class VersionPort(Protocol):
    """What is used of the adapter manager, which documents it."""

    on_ready: Callable[[], None]

    def resolve(self, reference: str, routing_key: str) -> AdapterVersion:
        """Hold a version."""
        ...

    def check_composition(self, members: Sequence[tuple[AdapterVersion, float]]) -> None:
        """Raise unless these versions, held by the caller, can answer together with these weights."""
        ...

    def vocabulary(self, versions: Iterable[AdapterVersion]) -> AdapterVocabulary:
        """The token ids that versions, held by the caller, know together."""
        ...

    def release(self, version: AdapterVersion) -> None:
        """One hold less."""
        ...

    def try_activate(self, version: AdapterVersion) -> int | None:
        """Its device slot, in use until `deactivate`; None: it will be brought in."""
        ...

    def try_activate_all(self, versions: Sequence[AdapterVersion], *, keep: bool) -> Sequence[int] | None:
        """Their device slots, each in use until its `deactivate`; None: nothing is in use, the rest is brought in."""
        ...

    def deactivate(self, version: AdapterVersion) -> None:
        """One use less of the slot."""
        ...

    def step_work(self) -> None:
        """Work that may not happen during a step."""
        ...


@dataclass(slots=True)
class _Active:
    batch_slot: int
    users: int


class CompositionPort:
    """The engine's `AdapterPort`. `resolve` and `release` may be called on any thread, the rest on the step thread.

    Args:
        versions: the adapter manager.
        max_slots: its device slots; batch slots of compositions begin there.
        clock: seconds, the manager's.
    """

    def __init__(self, versions: VersionPort, max_slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._versions = versions
        self._max_slots = max_slots
        self._clock = clock
        self._active: dict[Adaptation, _Active] = {}
        self._expansions: dict[int, tuple[tuple[int, float], ...]] = {}
        self._free: list[int] = []  # a heap of numbers below max_slots + num_slots that are not in use
        self._num_slots = 0
        self._front: Adaptation | None = None
        self._front_since = 0.0
        self._front_asked = 0.0
        self._rests_until = 0.0

    @property
    def on_ready(self) -> Callable[[], None]:
        """Called when a `try_activate` that returned None may have another outcome now."""
        return self._versions.on_ready

    @on_ready.setter
    def on_ready(self, on_ready: Callable[[], None]) -> None:
        self._versions.on_ready = on_ready

    # For requests.

    def resolve(self, wishes: Sequence[Wish], routing_key: str = "") -> Adaptation:
        """Hold what a request names; never blocks on disk. Every resolve needs one `release`, or none if it raised.

        Args:
            wishes: 1 to MAX_MEMBERS.
            routing_key: the same key gets the same target of each alias; empty: they are drawn.

        Raises:
            AdapterIdError, AdapterDigestError, AdapterNotFoundError: of a member.
            AdapterCompositionError, AdapterMemoryError: they cannot answer together, or not with these weights.
        """
        members: list[tuple[AdapterVersion, float]] = []
        try:
            for wish in wishes:
                members.append((self._hold(wish, routing_key), wish.weight))
            if len(members) > 1 or members[0][1] != 1.0:
                self._versions.check_composition(members)
        except BaseException:
            for version, _ in members:
                self._versions.release(version)
            raise
        return Adaptation.of(members)

    def vocabulary(self, adaptation: Adaptation | None) -> AdapterVocabulary:
        """The token ids, and what they mean, of what answers a request that holds it; None: the base."""
        return self._versions.vocabulary(adaptation.versions if adaptation is not None else ())

    def release(self, adaptation: Adaptation) -> None:
        """A request that held the versions ended."""
        for version in adaptation.versions:
            self._versions.release(version)

    # For the engine's step thread.

    def try_activate(self, adaptation: Adaptation) -> int | None:
        """The batch slot, in use until `deactivate`; None when a version is not there yet: it will be brought in.

        Raises:
            ServingError: a version failed, was dropped, or they do not fit on the device together any more.
        """
        if adaptation.is_plain:
            return self._versions.try_activate(adaptation.members[0].version)
        is_front = self._comes_to_front(adaptation)
        try:
            slots = self._versions.try_activate_all(adaptation.versions, keep=is_front)
        except BaseException:
            self._leave_front(adaptation)
            raise
        if slots is None:
            return None
        self._leave_front(adaptation)
        active = self._active.get(adaptation)
        if active is None:
            active = self._active[adaptation] = _Active(self._take_slot(), 0)
            weights = (weight for _, weight in adaptation.members)
            self._expansions[active.batch_slot] = tuple(zip(slots, weights, strict=True))
        active.users += 1
        return active.batch_slot

    def deactivate(self, adaptation: Adaptation) -> None:
        """A request no longer runs on the batch slot."""
        if not adaptation.is_plain:
            active = self._active[adaptation]
            active.users -= 1
            if not active.users:
                del self._active[adaptation], self._expansions[active.batch_slot]
                heapq.heappush(self._free, active.batch_slot)
        for version in adaptation.versions:
            self._versions.deactivate(version)

    def expand(self, batch_slot: int) -> tuple[tuple[int, float], ...]:
        """The device slots, each once, and weights that a batch slot in use stands for."""
        return ((batch_slot, 1.0),) if batch_slot < self._max_slots else self._expansions[batch_slot]

    def step_work(self) -> None:
        """Call between steps; see the manager."""
        self._versions.step_work()

    def _hold(self, wish: Wish, routing_key: str) -> AdapterVersion:
        try:
            return self._versions.resolve(wish.reference, routing_key)
        except (AdapterIdError, AdapterDigestError) as error:
            error.metadata.setdefault("field", wish.field)
            raise

    def _take_slot(self) -> int:
        if not self._free:
            heapq.heappush(self._free, self._max_slots + self._num_slots)
            self._num_slots += 1
        return heapq.heappop(self._free)

    def _comes_to_front(self, adaptation: Adaptation) -> bool:
        """Whether the composition that is asked for is the front."""
        now = self._clock()
        if now < self._rests_until:
            return False
        if self._front is None or now - self._front_asked > LEASE_S:
            self._front, self._front_since = adaptation, now
        if self._front != adaptation:
            return False
        if now - self._front_since > TURN_S:
            self._front, self._rests_until = None, now + REST_S
            return False
        self._front_asked = now
        return True

    def _leave_front(self, adaptation: Adaptation) -> None:
        if self._front == adaptation:
            self._front = None
