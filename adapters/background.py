"""Work that must not take time from the step thread."""

import os
import threading
from typing import Final

# The highest value: a thread of it gets about 1.5 % of a core that others want, and all of one that nobody wants.
NICENESS: Final = 19


def lower_priority() -> None:
    """Let every other thread go first from now on; for the calling thread, and those that it starts (Linux).

    A low thread that holds a lock that the step thread waits for is no danger: the waiting one leaves a core free.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
