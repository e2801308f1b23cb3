"""Which requests run out of time, and when the next one does. Imports no torch; step thread only."""

import heapq
import itertools

from .request import Phase, Request

_SMALL = 64


class Deadlines:
    """A heap of requests by deadline. Requests that ended are left in it and swept out when they are the half of it."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._ties = itertools.count()
        self._sweep_at = _SMALL

    def add(self, request: Request) -> None:
        """Watch a request; one without a deadline is ignored."""
        if request.deadline is None:
            return
        if len(self._heap) >= self._sweep_at:
            self._heap = [entry for entry in self._heap if entry[2].phase is not Phase.FINISHED]
            heapq.heapify(self._heap)
            self._sweep_at = max(_SMALL, 2 * len(self._heap))
        heapq.heappush(self._heap, (request.deadline, next(self._ties), request))

    def expired(self, now: float) -> list[Request]:
        """Remove and return the requests whose deadline has come and that have not ended."""
        requests = []
        while self._heap and self._heap[0][0] <= now:
            request = heapq.heappop(self._heap)[2]
            if request.phase is not Phase.FINISHED:
                requests.append(request)
        return requests

    def next(self) -> float | None:
        """The next deadline of a request that has not ended."""
        while self._heap and self._heap[0][2].phase is Phase.FINISHED:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
