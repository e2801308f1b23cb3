"""Events on their way to the clients, in order; held back while the host prepares a step for a device that waits.

Handing events over wakes the event loop's thread, which then competes for the interpreter lock with the step thread.
Beside a CUDA device that is the wrong moment between two steps: the device idles until the next one is launched. So
events of a step are handed over once the next step runs on the device. Step thread only.
"""

from collections import deque

import structlog

from .request import Delta, Event, Request

log = structlog.stdlib.get_logger(__name__)


class Outbox:
    """See the module. Nothing is held back until `hold`."""

    def __init__(self) -> None:
        self._held: deque[tuple[Request, Event]] = deque()
        self._holding = False
        self._unreachable: list[Request] = []

    def hold(self) -> None:
        """Keep what comes from now on until `release`."""
        self._holding = True

    def put(self, request: Request, event: Event) -> bool:
        """Hand an event over, now or at `release`; False if whoever takes it raised now."""
        if self._holding:
            self._held.append((request, event))
            return True
        return _hand_over(request, event)

    def release(self) -> None:
        """Hand everything over that was held back, and keep nothing from now on."""
        self._holding = False
        while self._held:
            request, event = self._held.popleft()
            if not _hand_over(request, event) and isinstance(event, Delta):
                self._unreachable.append(request)

    def take_unreachable(self) -> list[Request]:
        """Requests whose output could not be handed over at `release`, since the last call; some may have ended."""
        taken, self._unreachable = self._unreachable, []
        return taken


def _hand_over(request: Request, event: Event) -> bool:
    try:
        request.emit(event)
    except Exception:
        log.exception("event_not_delivered", request_id=request.request_id)
        return False
    return True
