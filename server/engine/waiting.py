"""Requests that wait, in one lane per adapter version, and in which order they may be tried. Imports no torch.

Only the scheduler uses it, on the step thread. All requests of a version wait for the same adapter, so they are looked
at as one: a pass costs O(running + admitted), however many requests or versions wait. A lane is

    OPEN      nothing has to come in: the base, or the version is active already
    UNTRIED   nobody has asked the adapters for it since it was last active
    PARKED    the adapters were asked, and it was not on the device

A pass (`begin`, then `next` until None) visits lanes by the age of their oldest request, oldest first. It asks the
adapters at most `max_tries` times in vain: for the oldest parked lanes, for the other parked ones in rotation, and for
untried ones.

Fairness between adapters: while the oldest parked request B has been blocked for less than `bound_s`, everybody may
overtake it. From then on younger requests may not activate another version; from twice the bound on younger requests
with an adapter are not admitted at all, so that the versions in use run dry and the adapters are asked for B's alone.
Requests of the base need no slot and are never held. `scheduler.py` shows why nobody starves.
"""

import bisect
import heapq
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from ...adapters.version import AdapterVersion
from .block_manager import IntegrityError
from .request import Request


class LaneState(StrEnum):
    """What is known about a lane's adapter."""

    OPEN = "open"
    UNTRIED = "untried"
    PARKED = "parked"


class Hold(IntEnum):
    """What requests younger than the oldest parked one may not do."""

    NOTHING = 0
    NEW_VERSIONS = 1  # activate a version that is not active
    ADAPTERS = 2  # be admitted with any adapter


@dataclass(slots=True, eq=False)
class Lane:
    """The waiting requests of one adapter version (None: the base), oldest first.

    Attributes:
        active: activations of the version that are held, by running requests or a waiting one.
        blocked_since: second at which the lane was parked.
        place: where the lane is sorted in, None while it has no requests.
    """

    version: AdapterVersion | None
    state: LaneState
    requests: OrderedDict[Request, None] = field(default_factory=OrderedDict)
    active: int = 0
    blocked_since: float = 0.0
    place: tuple[LaneState, int] | None = None

    @property
    def head(self) -> Request:
        """The oldest request."""
        return next(iter(self.requests))


class WaitingLanes:
    """The waiting queue.

    Args:
        bound_s: seconds a request may be blocked by its adapter before younger ones are held back.
        max_tries: vain questions to the adapters in one pass, at least 4.
    """

    def __init__(self, bound_s: float, max_tries: int) -> None:
        if max_tries < 4 or bound_s < 0:
            raise ValueError(f"max_tries ({max_tries}) must be 4 or more, bound_s ({bound_s}) 0 or more")
        self._bound_s = bound_s
        self._max_tries = max_tries
        self._lanes: dict[AdapterVersion | None, Lane] = {}
        # Lanes that have requests, by the order of their head. An insertion moves memory, 16 bytes a lane.
        self._sorted: dict[LaneState, list[tuple[int, Lane]]] = {state: [] for state in LaneState}
        self._size = 0
        self._rotated_to = -1  # order of the parked lane that was tried last in rotation
        self._recheck = 0  # parked lanes whose turn in the rotation has not come since something became ready
        # The pass under way:
        self._heap: list[tuple[int, Lane]] = []
        self._hold = Hold.NOTHING
        self._limit = 0  # order of the oldest parked request, while something is held back
        self._tries = max_tries

    def __len__(self) -> int:
        return self._size

    # Requests.

    def push(self, request: Request) -> None:
        """Add a new request, or one that was preempted: it returns to its place by age, the front of its lane."""
        lane = self._lane(request.adapter)
        is_front = bool(lane.requests) and request.order < lane.head.order
        lane.requests[request] = None
        if is_front:
            lane.requests.move_to_end(request, last=False)
        self._size += 1
        self._sort_in(lane)

    def remove(self, request: Request) -> None:
        """Take out a request that was admitted or has ended."""
        lane = self._lane(request.adapter)
        del lane.requests[request]
        self._size -= 1
        self._sort_in(lane)

    # Adapters.

    def activated(self, version: AdapterVersion) -> None:
        """A request has got an activation of its version."""
        lane = self._lane(version)
        lane.active += 1
        lane.state = LaneState.OPEN
        self._sort_in(lane)

    def deactivated(self, version: AdapterVersion) -> None:
        """A request has given its activation back."""
        lane = self._lane(version)
        lane.active -= 1
        if not lane.active and lane.state is LaneState.OPEN:
            lane.state = LaneState.UNTRIED
        self._sort_in(lane)

    def adapter_ready(self) -> None:
        """Some adapter became resident, nobody says which: all parked lanes are worth a try."""
        self._recheck = len(self._sorted[LaneState.PARKED])

    # One pass.

    def begin(self, now: float) -> None:
        """Start a pass at second `now`."""
        parked = self._sorted[LaneState.PARKED]
        self._tries = self._max_tries
        self._hold = self._hold_at(now)
        if self._hold:
            self._limit = parked[0][0]
            self._recheck = 0
            retries = parked[:1]
        else:
            retries = self._rotate(parked)
        self._heap = [entry for entry in self._sorted[LaneState.OPEN] if self._may_pass(*entry)] + retries
        heapq.heapify(self._heap)

    def next(self) -> Lane | None:
        """The next lane whose head may be admitted. To be followed by `remove`, `park` or the end of the pass."""
        untried = self._next_untried() if self._tries else None
        while self._heap and (untried is None or self._heap[0][0] < untried.head.order):
            lane = heapq.heappop(self._heap)[1]
            if self._tries or lane.state is LaneState.OPEN:
                return lane
        return untried

    def again(self, lane: Lane) -> None:
        """Visit a lane once more in this pass: its head was admitted and there may be another."""
        if lane.place is not None and self._may_pass(lane.place[1], lane):
            heapq.heappush(self._heap, (lane.place[1], lane))

    def park(self, lane: Lane, now: float) -> None:
        """The lane's adapter is not there yet."""
        self._tries = max(0, self._tries - 1)
        if lane.state is not LaneState.PARKED:
            lane.state = LaneState.PARKED
            lane.blocked_since = now
            self._sort_in(lane)

    @property
    def wants_another_pass(self) -> bool:
        """Whether the last pass ran out of tries before it had seen every lane that may have become admissible."""
        return self._size > 0 and (self._recheck > 0 or (not self._tries and self._next_untried() is not None))

    # Views.

    def count_by_adapter(self) -> dict[str, int]:
        """Waiting requests by adapter id ("" is the base)."""
        counts: dict[str, int] = {}
        for lane in self._lanes.values():
            if lane.requests:
                adapter_id = lane.version.adapter_id if lane.version is not None else ""
                counts[adapter_id] = counts.get(adapter_id, 0) + len(lane.requests)
        return counts

    def check_integrity(self) -> None:
        """Verify the order of the lanes and of their requests; O(waiting).

        Raises:
            IntegrityError: names the lane that is wrong.
        """
        for lane in self._lanes.values():
            orders = [request.order for request in lane.requests]
            if orders != sorted(orders):
                raise IntegrityError(f"the lane of {lane.version} is out of order: {orders}")
            if lane.place != ((lane.state, orders[0]) if orders else None):
                raise IntegrityError(f"the lane of {lane.version} is sorted in at {lane.place}")
            if not orders and not lane.active and lane.version is not None:
                raise IntegrityError(f"the lane of {lane.version} is empty and was kept")
        places = {(state, order): lane for state, lanes in self._sorted.items() for order, lane in lanes}
        if places != {lane.place: lane for lane in self._lanes.values() if lane.place is not None}:
            raise IntegrityError("the sorted lanes are not the lanes with requests")
        if self._size != sum(len(lane.requests) for lane in self._lanes.values()):
            raise IntegrityError(f"{self._size} requests were counted, the lanes hold another number")

    def _lane(self, version: AdapterVersion | None) -> Lane:
        lane = self._lanes.get(version)
        if lane is None:
            lane = Lane(version, LaneState.OPEN if version is None else LaneState.UNTRIED)
            self._lanes[version] = lane
        return lane

    def _sort_in(self, lane: Lane) -> None:
        """Move the lane to where its state and head belong; forget it when nothing is left of it."""
        place = (lane.state, lane.head.order) if lane.requests else None
        if place != lane.place:
            if lane.place is not None:
                lanes = self._sorted[lane.place[0]]
                del lanes[bisect.bisect_left(lanes, lane.place[1], key=_order)]
            if place is not None:
                bisect.insort(self._sorted[place[0]], (place[1], lane), key=_order)
            lane.place = place
        if not lane.requests and not lane.active and lane.version is not None:
            self._lanes.pop(lane.version, None)

    def _hold_at(self, now: float) -> Hold:
        parked = self._sorted[LaneState.PARKED]
        if not parked:
            return Hold.NOTHING
        lane = parked[0][1]
        blocked_s = now - max(lane.blocked_since, lane.head.arrival)
        if blocked_s < self._bound_s:
            return Hold.NOTHING
        return Hold.NEW_VERSIONS if blocked_s < 2 * self._bound_s else Hold.ADAPTERS

    def _may_pass(self, order: int, lane: Lane) -> bool:
        """Whether the hold lets a lane's head of that order be admitted."""
        if self._hold is Hold.NOTHING or order <= self._limit or lane.version is None:
            return True
        return self._hold is Hold.NEW_VERSIONS and lane.active > 0

    def _next_untried(self) -> Lane | None:
        untried = self._sorted[LaneState.UNTRIED]
        return untried[0][1] if untried and self._may_pass(*untried[0]) else None

    def _rotate(self, parked: list[tuple[int, Lane]]) -> list[tuple[int, Lane]]:
        """A quarter of the tries for the oldest, a quarter for the others in turn; half is left to untried lanes."""
        share = self._max_tries // 4
        oldest, others = parked[:share], parked[share:]
        start = bisect.bisect_right(others, self._rotated_to, key=_order)
        turn = (others[start:] + others[:start])[:share]
        if turn:
            self._rotated_to = turn[-1][0]
        self._recheck = max(0, min(self._recheck, len(others)) - len(turn))
        return oldest + turn


def _order(entry: tuple[int, Lane]) -> int:
    return entry[0]
