"""How much service each adapter has had, and so whose turn it is. Imports no torch; step thread only.

These are the virtual token counters (VTC) of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024,
arXiv 2401.00588), with adapters for clients. An adapter's counter is the service it has received, in weighted tokens,
divided by its weight. Of those that compete (have a request that could run now) the one with the lowest counter is
next. What differs from the paper is marked (*).

Charging: every token when it is scheduled, prompts chunk by chunk (*), so that only what is computed counts: a prefix
hit is free, what a preempted request computes again is not.

Lift: whoever begins to compete gets at least the *floor*, the lowest counter of those that compete, since time without
requests earns nothing. With nobody waiting at all the floor is the counter of the last one admitted: what was served
while nobody had to wait is not held against anyone. Requests that wait for their adapter or stand at its cap do not
compete (*), so they are lifted like new ones, and their low counters do not keep the floor down for others.

Several adapters in one request (*): every token is charged in full to each of them, and counts for the caps of each,
whatever their weights in the sum: who wraps an adapter into a composition gets no more of it. Such a request competes
with the *key* of its adapters' counters, max(lowest, highest - SLACK). So it takes turns by age with the requests of
the adapter that has received least, as long as none of the others is ahead of that by more than SLACK, else it waits
for the one that is. (With the highest counter alone it would wait for as long as two of its adapters have requests of
their own, because one of them is always behind.) One adapter's key is its counter.

Bound (as in the paper): while two adapters compete without a break, the services they receive, each divided by its
weight, differ by at most 2 U, whatever their requests are like; by at most 2 (U + SLACK), where requests name several
and each of the two has some of its own waiting. U is the most that requests running together are charged from admission
to end, divided by the lower of the two weights. For a request is given a place only while its key is the lowest, and no
counter of its adapters is above that by more than SLACK; from then on each can get ahead by what running requests still
receive.

Whoever had no request admitted for `max_wait_s` is set back to the floor (*): among equals the oldest request goes
first, so it is next. Where shares alone would let an adapter wait longer, it gets one request in `max_wait_s`.

Memory: an entry for each adapter that has live requests, and the counters, above the floor, of at most MAX_IDLE others.
Without those an adapter could lose its debt by letting all its requests end for a moment. Nothing is kept by
combination.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from .limits import AdapterLimits, LimitsOf

# What a token counts: the defaults of the reference implementation (slora/server/router/vtc_req_queue.py).
INPUT_TOKEN = 1.0
OUTPUT_TOKEN = 2.0

MAX_IDLE = 1024

# Weighted tokens at weight 1. Counters of adapters that always wait come apart by the length of a few requests.
SLACK = 4096.0


@dataclass(slots=True, eq=False)
class Share:
    """An adapter with live requests, all its versions together, alone or among others.

    Attributes:
        adapter_id: "" is the base.
        counter: weighted tokens received divided by weight, on the scale of the others' counters.
        waiting, running: requests.
        unserved_since: second since which it has waited without an admission; not counting time at its own cap.
        is_reserved: no request of it may be admitted but the one that goes first (`waiting.py`).
    """

    adapter_id: str
    limits: AdapterLimits
    counter: float = 0.0
    waiting: int = 0
    running: int = 0
    unserved_since: float = 0.0
    is_reserved: bool = False

    @property
    def is_capped(self) -> bool:
        """Whether as many of its requests run as may."""
        return self.limits.max_running is not None and self.running >= self.limits.max_running


def key_of(shares: Sequence[Share]) -> float:
    """Where requests of these adapters, at least one, stand among those that compete."""
    if len(shares) == 1:
        return shares[0].counter
    counters = [share.counter for share in shares]
    return max(min(counters), max(counters) - SLACK)


class FairShare:
    """The counters.

    Args:
        limits_of: weights and caps by adapter id.
        max_wait_s: seconds without an admission after which an adapter that waits is set back to the floor.

    Attributes:
        floor: the lowest key of those that compete.
    """

    def __init__(self, limits_of: LimitsOf, max_wait_s: float) -> None:
        if max_wait_s < 0:
            raise ValueError(f"max_wait_s ({max_wait_s}) must be 0 or more")
        self.floor = 0.0
        self._limits_of = limits_of
        self.max_wait_s = max_wait_s
        self._now = 0.0
        self._shares: dict[str, Share] = {}
        self._unserved: OrderedDict[Share, None] = OrderedDict()  # those that wait, longest unserved first
        self._idle: dict[str, float] = {}
        self._last: Share | None = None  # admitted last
        self._changed: dict[str, int] = {}

    def __getitem__(self, adapter_id: str) -> Share:
        return self._shares[adapter_id]

    # A request waits, runs, ends.

    def enter(self, adapter_id: str, arrival: float) -> Share:
        """One more request waits."""
        share = self._shares.get(adapter_id)
        if share is None:
            share = Share(adapter_id, self._limits_of(adapter_id), self._idle.pop(adapter_id, 0.0))
            self._shares[adapter_id] = share
        if not self._unserved and self._last is not None:
            self.floor = max(self.floor, self._last.counter)
        self._wait(share, 1)
        if share.waiting == 1:
            self._unserved[share] = None
            share.unserved_since = max(self._now, arrival)
        return share

    def leave(self, share: Share) -> None:
        """A waiting request has ended."""
        self._wait(share, -1)
        self._forget_if_idle(share)

    def admit(self, share: Share) -> None:
        """A waiting request runs now."""
        share.running += 1
        self._wait(share, -1)
        self._last = share
        self._restart(share)

    def stop(self, share: Share) -> None:
        """A request does not run any more."""
        was_capped = share.is_capped
        share.running -= 1
        if was_capped:
            self._restart(share)
        self._forget_if_idle(share)

    def charge(self, adapter_ids: Sequence[str], tokens: float) -> None:
        """Each of these receives service, in weighted tokens."""
        for adapter_id in adapter_ids:
            share = self._shares[adapter_id]
            share.counter += tokens / share.limits.weight

    # The order among those that compete.

    def lift(self, share: Share) -> None:
        """It begins to compete."""
        share.counter = max(share.counter, self.floor)

    def raise_floor(self, lowest: float) -> None:
        """No key of those that compete is below `lowest`."""
        self.floor = max(self.floor, lowest)

    def set_back(self, now: float, most: int) -> list[Share]:
        """Set adapters that were not served for too long back to the floor: at most `most`, longest first.

        Args:
            now: second, at least that of the call before.
            most: to be looked at; the others come next time.
        """
        self._now = now
        changed = []
        for _ in range(min(most, len(self._unserved))):
            share = next(iter(self._unserved))
            if now - share.unserved_since < self.max_wait_s:
                break
            if not share.is_capped and share.counter > self.floor:
                share.counter = self.floor
                changed.append(share)
            self._restart(share)
        return changed

    # Limits and views.

    def refresh_limits(self) -> None:
        """Read the limits again."""
        for share in self._shares.values():
            was_capped = share.is_capped
            share.limits = self._limits_of(share.adapter_id)
            if was_capped and not share.is_capped:
                self._restart(share)

    def take_waiting_changes(self) -> dict[str, int]:
        """Requests that wait now, of each adapter where that has changed since the last call."""
        changed, self._changed = self._changed, {}
        return changed

    def waiting_by_adapter(self) -> dict[str, int]:
        """Waiting requests by adapter id, without zeros."""
        return {share.adapter_id: share.waiting for share in self._unserved}

    def running_by_adapter(self) -> dict[str, int]:
        """Running requests by adapter id, without zeros."""
        return {share.adapter_id: share.running for share in self._shares.values() if share.running}

    def _wait(self, share: Share, more: int) -> None:
        share.waiting += more
        self._changed[share.adapter_id] = share.waiting
        if not share.waiting:
            self._unserved.pop(share, None)

    def _restart(self, share: Share) -> None:
        """Its time without an admission begins now."""
        share.unserved_since = self._now
        if share in self._unserved:
            self._unserved.move_to_end(share)

    def _forget_if_idle(self, share: Share) -> None:
        if share.waiting or share.running:
            return
        del self._shares[share.adapter_id]
        if not self._shares:  # nobody is left to be fair to
            self.floor, self._last = 0.0, None
            self._idle.clear()
        elif share.counter > self.floor:
            self._idle[share.adapter_id] = share.counter
            if len(self._idle) > MAX_IDLE:
                # First those whom the floor has reached, then the smallest debts. Half, so that this is rare.
                debts = heapq.nlargest(MAX_IDLE // 2, self._idle.items(), key=lambda item: item[1])
                self._idle = {adapter_id: counter for adapter_id, counter in debts if counter > self.floor}
