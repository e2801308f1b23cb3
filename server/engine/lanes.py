"""Lanes of waiting requests, and the orders in which they are found. Imports no torch; used by `waiting.py` only.

All requests of an adaptation wait for the same versions, so they are looked at as one: a lane.
"""

import bisect
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum

from ...adapters.adaptation import Adaptation
from .block_manager import IntegrityError
from .fair_share import Share, key_of
from .request import Request


class LaneState(StrEnum):
    """What is known about a lane's adapter."""

    OPEN = "open"
    UNTRIED = "untried"
    PARKED = "parked"


# State, counter when the lane was sorted in (0 unless the lane is untried), order of the head.
Place = tuple[LaneState, float, int]


@dataclass(slots=True, eq=False)
class Lane:
    """The waiting requests of one adaptation (None: the base), oldest first.

    Attributes:
        shares: of its adapters.
        active: activations of the adaptation that are held, by running requests or a waiting one.
        blocked_since: second at which the lane was parked.
        goes_first: its head is looked at before everybody else.
        place: where the lane is sorted in; None while it has no requests, or an adapter of it is at its cap or reserved
            for the lane that goes first.
    """

    adaptation: Adaptation | None
    shares: tuple[Share, ...]
    state: LaneState
    requests: OrderedDict[Request, None] = field(default_factory=OrderedDict)
    active: int = 0
    blocked_since: float = 0.0
    goes_first: bool = False
    place: Place | None = None

    @property
    def counter(self) -> float:
        """The lower it is, the earlier is its turn."""
        return key_of(self.shares)

    @property
    def rank(self) -> float:
        """The counter, or what is below every counter."""
        return -math.inf if self.goes_first else self.counter

    @property
    def head(self) -> Request:
        """The oldest request."""
        return next(iter(self.requests))

    @property
    def right_place(self) -> Place | None:
        """Where it belongs now."""
        if not self.requests:
            return None
        for share in self.shares:
            if share.is_capped or (share.is_reserved and not self.goes_first):
                return None
        return self.state, self.counter if self.state is LaneState.UNTRIED else 0.0, self.head.order


def competes(place: Place | None) -> bool:
    """Whether a lane there has a request that could run, as far as is known."""
    return place is not None and place[0] is not LaneState.PARKED


# Entries sort by what stands before the lane: no two lanes have a head of the same order.
ByAge = tuple[int, Lane]
ByCounter = tuple[float, int, Lane]


def by_rank(lane: Lane) -> ByCounter:
    """The lane's entry in an order by rank, then age."""
    return lane.rank, lane.head.order, lane


class LaneIndex:
    """The lanes that have a place. An insertion into a list moves memory, 8 bytes a lane.

    Attributes:
        open: in no order; there are no more than versions in use.
        untried: by counter, then age; counters can have grown since a lane was sorted in, see `lowest_untried`.
        untried_by_age, parked: by age.
    """

    def __init__(self) -> None:
        self.open: dict[Lane, None] = {}
        self.untried: list[ByCounter] = []
        self.untried_by_age: list[ByAge] = []
        self.parked: list[ByAge] = []

    def sort_in(self, lane: Lane) -> None:
        """Move the lane from its place to its right place."""
        place = lane.right_place
        if place != lane.place:
            if lane.place is not None:
                self._discard(lane, lane.place)
            if place is not None:
                self._insert(lane, place)
            lane.place = place

    def lowest_untried(self) -> Lane | None:
        """The first of the untried lanes by what their counters are now."""
        while self.untried:
            counter, _, lane = self.untried[0]
            if counter == lane.counter:
                return lane
            self.sort_in(lane)
        return None

    def check_integrity(self, lanes: set[Lane]) -> None:
        """Verify that just these lanes are found, in order.

        Raises:
            IntegrityError: says what is wrong.
        """
        untried = [lane for *_, lane in self.untried]
        found = [*self.open, *untried, *(lane for _, lane in self.parked)]
        if len(found) != len(set(found)) or set(found) != {lane for lane in lanes if lane.place is not None}:
            raise IntegrityError("the sorted lanes are not the lanes with a place")
        if set(untried) != {lane for _, lane in self.untried_by_age} or len(untried) != len(self.untried_by_age):
            raise IntegrityError("the untried lanes by counter are not those by age")
        if self.untried != sorted(self.untried, key=lambda entry: entry[:2]):
            raise IntegrityError("the untried lanes are out of order")
        for entries in (self.untried_by_age, self.parked):
            if entries != sorted(entries, key=head_order):
                raise IntegrityError("lanes are not sorted by age")

    def _insert(self, lane: Lane, place: Place) -> None:
        state, counter, head = place
        if state is LaneState.OPEN:
            self.open[lane] = None
        elif state is LaneState.PARKED:
            bisect.insort(self.parked, (head, lane))
        else:
            bisect.insort(self.untried, (counter, head, lane))
            bisect.insort(self.untried_by_age, (head, lane))

    def _discard(self, lane: Lane, place: Place) -> None:
        state, counter, head = place
        if state is LaneState.OPEN:
            del self.open[lane]
        elif state is LaneState.PARKED:
            del self.parked[bisect.bisect_left(self.parked, (head, lane))]
        else:
            del self.untried[bisect.bisect_left(self.untried, (counter, head, lane))]
            del self.untried_by_age[bisect.bisect_left(self.untried_by_age, (head, lane))]


def head_order(entry: ByAge) -> int:
    """The age of an entry's head."""
    return entry[0]
