"""Requests that wait, in one lane per adaptation, and in which order they may be tried. Imports no torch.

Only the scheduler uses it, on the step thread. All requests of an adaptation (one version, or a sum of several) wait
for the same versions, so they are looked at as one: a pass costs O(running + admitted), times the log of what waits,
however many requests or adapters wait. (Where several adaptations with the same adapter wait side by side, each
counts.) A lane is

    OPEN      nothing has to come in: the base, or the adaptation is active already
    UNTRIED   nobody has asked the adapters for it since it was last active
    PARKED    the adapters were asked, and it was not on the device

and, whatever its state, left out while an adapter of it runs as many requests as it may. Lanes that are OPEN or UNTRIED
and not left out compete.

A pass (`begin`, then `next` until None) visits lanes by the counter of their adapter, or the key of several
(`fair_share.py`), lowest first, and at the same one by the age of their oldest request. It asks the adapters at most
`max_tries` times in vain: for the oldest parked lanes, for the other parked ones in rotation, and for untried ones.

The *elder* is the oldest request of all that wait. Once it has been that for `max_wait_s` it goes first: it is looked
at before everybody else, whatever the counters say, and its adapters are reserved for it: lanes that share one with it
are left out. There is one at a time, so shares are overruled for one request in `max_wait_s` at most, whatever is
combined with what.

While the oldest parked request B has been blocked for less than `bound_s`, everybody may overtake it. From then on
younger requests may not activate another adaptation; from twice the bound on younger requests with an adapter are not
admitted at all, so that those in use run dry and the adapters are asked for B's alone. Requests of the base need no
slot and are never held. `scheduler.py` shows why nobody starves.
"""

import bisect
import heapq
from collections import Counter
from collections.abc import Iterable
from enum import IntEnum

from ...adapters.adaptation import Adaptation
from .block_manager import IntegrityError
from .fair_share import FairShare, Share
from .lanes import ByAge, ByCounter, Lane, LaneIndex, LaneState, Place, by_rank, competes, head_order
from .request import Request

_MANY = 64


class Hold(IntEnum):
    """What requests younger than the oldest parked one may not do."""

    NOTHING = 0
    NEW_VERSIONS = 1  # activate an adaptation that is not active
    ADAPTERS = 2  # be admitted with any adapter


class WaitingLanes:
    """The waiting queue.

    Args:
        bound_s: seconds a request may be blocked by its adapter before younger ones are held back.
        max_tries: vain questions to the adapters in one pass, at least 4.
        shares: the adapters' counters; told here of requests that wait, run and end.
    """

    def __init__(self, bound_s: float, max_tries: int, shares: FairShare) -> None:
        if max_tries < 4 or bound_s < 0:
            raise ValueError(f"max_tries ({max_tries}) must be 4 or more, bound_s ({bound_s}) 0 or more")
        self._bound_s = bound_s
        self._max_tries = max_tries
        self._shares = shares
        self._lanes: dict[Adaptation | None, Lane] = {}
        self._siblings: dict[Share, list[Lane]] = {}
        self._index = LaneIndex()
        self._by_order: dict[int, Request] = {}
        self._orders: list[int] = []  # a heap of the keys of `_by_order`, and some that have left it
        self._elder: Request | None = None
        self._elder_since = 0.0
        self._first: Lane | None = None  # the elder's, while it goes first
        self._rotated_to = -1  # order of the parked lane that was tried last in rotation
        self._recheck = 0  # parked lanes whose turn in the rotation has not come since something became ready
        # The pass under way:
        self._heap: list[ByCounter] = []  # counters can have grown since
        self._hold = Hold.NOTHING
        self._limit = 0  # order of the oldest parked request, while something is held back
        self._tries = max_tries  # for untried lanes

    def __len__(self) -> int:
        return len(self._by_order)

    # Requests.

    def push(self, request: Request) -> None:
        """Add a new request, or one that was preempted: it returns to its place by age, the front of its lane."""
        adaptation = request.adapter
        shares = tuple(self._shares.enter(adapter_id, request.arrival) for adapter_id in request.adapter_ids)
        lane = self._lanes.get(adaptation)
        if lane is None:
            lane = Lane(adaptation, shares, LaneState.OPEN if adaptation is None else LaneState.UNTRIED)
            self._lanes[adaptation] = lane
            for share in shares:
                self._siblings.setdefault(share, []).append(lane)
        is_front = bool(lane.requests) and request.order < lane.head.order
        lane.requests[request] = None
        if is_front:
            lane.requests.move_to_end(request, last=False)
        self._by_order[request.order] = request
        heapq.heappush(self._orders, request.order)
        self._sort_in(lane)

    def remove(self, request: Request) -> None:
        """Take out a request that has ended."""
        lane = self._take_out(request)
        for share in lane.shares:
            self._shares.leave(share)
        self._sort_in(lane)
        self._yield_first(request)

    def admitted(self, request: Request) -> None:
        """Take out a request that runs from now on."""
        lane = self._take_out(request)
        for share in sorted(lane.shares, key=_counter):  # the last one admitted is the one with the highest counter
            self._shares.admit(share)
        self._sort_in(lane)
        for share in lane.shares:
            if share.is_capped:
                self._sort_in_all(self._siblings.get(share, ()))
        self._yield_first(request)

    def stopped(self, request: Request) -> None:
        """A request that ran has ended, or was preempted (and pushed again before)."""
        for share in [self._shares[adapter_id] for adapter_id in request.adapter_ids]:
            was_capped = share.is_capped
            self._shares.stop(share)
            if was_capped:
                self._sort_in_all(self._siblings.get(share, ()))

    def charge(self, request: Request, tokens: float) -> None:
        """A running request receives service, in weighted tokens: all of its adapters do."""
        self._shares.charge(request.adapter_ids, tokens)

    def refresh_limits(self) -> None:
        """Weights and caps have changed."""
        self._shares.refresh_limits()
        self._sort_in_all(self._lanes.values())

    # Adapters.

    def activated(self, adaptation: Adaptation) -> None:
        """A request has got an activation of its adaptation."""
        lane = self._lanes[adaptation]
        lane.active += 1
        lane.state = LaneState.OPEN
        self._sort_in(lane)

    def deactivated(self, adaptation: Adaptation) -> None:
        """A request has given its activation back."""
        lane = self._lanes[adaptation]
        lane.active -= 1
        if not lane.active and lane.state is LaneState.OPEN:
            lane.state = LaneState.UNTRIED
        self._sort_in(lane)

    def adapter_ready(self) -> None:
        """Some adapter became resident, nobody says which: all parked lanes are worth a try."""
        self._recheck = len(self._index.parked)

    # One pass.

    def begin(self, now: float) -> None:
        """Start a pass at second `now`."""
        for share in self._shares.set_back(now, self._max_tries):
            self._was_set_back(share)
        self._choose_first(now)
        self._hold = self._hold_at(now)
        if self._hold:
            self._limit = self._index.parked[0][0]
            self._recheck = 0
            retries = self._index.parked[:1]
        else:
            retries = self._rotate()
        self._heap = [by_rank(lane) for lane in self._index.open if self._may_pass(lane.head.order, lane)]
        if not self._hold:  # while some are held back, they keep what they have saved
            untried = self._index.lowest_untried()
            counters = [lane.counter for *_, lane in self._heap] + ([] if untried is None else [untried.counter])
            if counters:
                self._shares.raise_floor(min(counters))
        # The oldest untried lane too: others in front of it cannot use up its try, pass after pass.
        oldest = [entry for entry in self._index.untried_by_age[:1] if self._may_pass(*entry)]
        self._heap += [by_rank(lane) for _, lane in (*retries, *oldest)]
        heapq.heapify(self._heap)
        self._tries = self._max_tries - len(retries) - len(oldest)

    def may_pass(self, request: Request) -> bool:
        """Whether a request that waits may be admitted in this pass, if everything it needs is there."""
        lane = self._lanes[request.adapter]
        return lane.place is not None and self._may_pass(request.order, lane)

    def next(self) -> Lane | None:
        """The next lane whose head may be admitted. To be followed by `admitted`, `park` or the end of the pass."""
        untried = self._next_untried() if self._tries else None
        while self._heap:
            rank, order, lane = self._heap[0]
            if lane.place is None:
                heapq.heappop(self._heap)
            elif rank != lane.rank:
                heapq.heapreplace(self._heap, by_rank(lane))
            elif untried is not None and (untried.rank, untried.head.order) < (rank, order):
                break
            else:
                heapq.heappop(self._heap)
                return lane
        return untried

    def again(self, lane: Lane) -> None:
        """Visit a lane once more in this pass: its head was admitted and there may be another."""
        if lane.place is not None and self._may_pass(lane.head.order, lane):
            heapq.heappush(self._heap, by_rank(lane))

    def park(self, lane: Lane, now: float) -> None:
        """The lane's adapter is not there yet."""
        if lane.state is not LaneState.PARKED:
            self._tries = max(0, self._tries - 1)
            lane.state = LaneState.PARKED
            lane.blocked_since = now
            self._sort_in(lane)

    @property
    def wants_another_pass(self) -> bool:
        """Whether the last pass ran out of tries before it had seen every lane that may have become admissible."""
        return len(self) > 0 and (self._recheck > 0 or (not self._tries and self._next_untried() is not None))

    # Views.

    def check_integrity(self) -> None:
        """Verify the order of the lanes and of their requests, and the counts of the shares; O(waiting).

        Raises:
            IntegrityError: names the lane that is wrong.
        """
        waiting: dict[str, int] = {}
        for lane in self._lanes.values():
            orders = [request.order for request in lane.requests]
            if orders != sorted(orders):
                raise IntegrityError(f"the lane of {lane.adaptation} is out of order: {orders}")
            if not _fits(lane.place, lane.right_place):
                raise IntegrityError(f"the lane of {lane.adaptation} is sorted in at {lane.place}")
            if not orders and not lane.active:
                raise IntegrityError(f"the lane of {lane.adaptation} is empty and was kept")
            if competes(lane.place) and lane.counter < self._shares.floor:
                raise IntegrityError(f"the counter of {lane.adaptation} is below the floor")
            if lane.goes_first != (lane is self._first) or (lane.goes_first and self._elder not in lane.requests):
                raise IntegrityError(f"the lane of {lane.adaptation} goes first without the elder")
            for share in lane.shares if orders else ():
                waiting[share.adapter_id] = waiting.get(share.adapter_id, 0) + len(orders)
        if waiting != self._shares.waiting_by_adapter():
            raise IntegrityError(f"{self._shares.waiting_by_adapter()} were counted, the lanes hold {waiting}")
        requests = {request for lane in self._lanes.values() for request in lane.requests}
        if requests != set(self._by_order.values()) or not self._by_order.keys() <= set(self._orders):
            raise IntegrityError("the requests by age are not those of the lanes")
        siblings = Counter(lane for lanes in self._siblings.values() for lane in lanes)
        if siblings != {lane: len(lane.shares) for lane in self._lanes.values()}:
            raise IntegrityError("the lanes by adapter are not the lanes")
        reserved = {share for share in self._siblings if share.is_reserved}
        if reserved != set(self._first.shares if self._first else ()):
            raise IntegrityError("other adapters are reserved than those of the request that goes first")
        self._index.check_integrity(set(siblings))

    def _take_out(self, request: Request) -> Lane:
        lane = self._lanes[request.adapter]
        del lane.requests[request]
        del self._by_order[request.order]
        if len(self._orders) > 2 * len(self._by_order) + _MANY:
            self._orders = sorted(self._by_order)
        return lane

    def _oldest(self) -> Request | None:
        while self._orders and self._orders[0] not in self._by_order:
            heapq.heappop(self._orders)
        return self._by_order[self._orders[0]] if self._orders else None

    def _choose_first(self, now: float) -> None:
        """Let the elder go first when it has been the elder for long enough."""
        elder = self._oldest()
        if elder is not self._elder:  # an older one can come back: it was preempted
            self._set_first(None)
            self._elder, self._elder_since = elder, now
        elif elder is not None and self._first is None and now - self._elder_since >= self._shares.max_wait_s:
            self._set_first(self._lanes[elder.adapter])

    def _yield_first(self, request: Request) -> None:
        """A request waits no more."""
        if request is self._elder:
            self._set_first(None)
            self._elder = None

    def _set_first(self, lane: Lane | None) -> None:
        before, self._first = self._first, lane
        for changed in (before, lane):
            if changed is not None:
                changed.goes_first = changed is lane
                for share in changed.shares:
                    share.is_reserved = changed is lane
                for share in changed.shares:
                    self._sort_in_all(self._siblings.get(share, ()))

    def _sort_in(self, lane: Lane) -> None:
        """Move the lane to where it belongs; forget it when nothing is left of it."""
        if competes(lane.right_place) and not competes(lane.place):
            self._lift(lane)
        self._index.sort_in(lane)
        if not lane.requests and not lane.active and self._lanes.pop(lane.adaptation, None) is not None:
            for share in lane.shares:
                lanes = self._siblings[share]
                lanes.remove(lane)
                if not lanes:
                    del self._siblings[share]

    def _sort_in_all(self, lanes: Iterable[Lane]) -> None:
        for lane in list(lanes):
            self._sort_in(lane)

    def _lift(self, lane: Lane) -> None:
        for share in lane.shares:
            self._shares.lift(share)

    def _was_set_back(self, share: Share) -> None:
        for lane in self._siblings.get(share, ()):
            if competes(lane.place):
                self._lift(lane)  # another of its adapters can be below the floor
            if lane.state is LaneState.UNTRIED:
                self._index.sort_in(lane)

    def _hold_at(self, now: float) -> Hold:
        if not self._index.parked:
            return Hold.NOTHING
        lane = self._index.parked[0][1]
        blocked_s = now - max(lane.blocked_since, lane.head.arrival)
        if blocked_s < self._bound_s:
            return Hold.NOTHING
        return Hold.NEW_VERSIONS if blocked_s < 2 * self._bound_s else Hold.ADAPTERS

    def _may_pass(self, order: int, lane: Lane) -> bool:
        """Whether the hold lets a lane's request of that order be admitted."""
        if self._hold is Hold.NOTHING or order <= self._limit or lane.adaptation is None:
            return True
        return self._hold is Hold.NEW_VERSIONS and lane.active > 0

    def _next_untried(self) -> Lane | None:
        if not self._index.untried:
            return None
        if self._hold is Hold.NOTHING:
            return self._index.lowest_untried()
        order, lane = self._index.untried_by_age[0]
        return lane if self._may_pass(order, lane) else None

    def _rotate(self) -> list[ByAge]:
        """A quarter of the tries for the oldest, a quarter for the others in turn; half is left to untried lanes."""
        share, parked = self._max_tries // 4, self._index.parked
        if len(parked) <= share:
            self._recheck = 0
            return parked[:share]
        num_others = len(parked) - share
        start = bisect.bisect_right(parked, self._rotated_to, lo=share, key=head_order)
        turn = parked[start : start + share]
        turn += parked[share : share + min(share, num_others) - len(turn)]
        self._rotated_to = turn[-1][0]
        self._recheck = max(0, min(self._recheck, num_others) - len(turn))
        return parked[:share] + turn


def _counter(share: Share) -> float:
    return share.counter


def _fits(place: Place | None, right: Place | None) -> bool:
    """Whether a lane's place is right but for a counter that has grown."""
    if place is None or right is None:
        return place is right
    return (place[0], place[2]) == (right[0], right[2]) and place[1] <= right[1]
