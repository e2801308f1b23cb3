"""How much of a core the threads get whose work must not take time from the step thread. Imports no torch."""

import contextlib
import ctypes
import os
import threading
from typing import Final

# Of threads that nobody waits for at a client's side but that should get on, such as those that read adapters again.
NICENESS: Final = 10

_mine = threading.local()  # `gives_way`: whether the thread is one of idle priority
_sched_yield: Final = ctypes.CDLL(None).sched_yield  # os.sched_yield keeps the interpreter lock


def idle_priority() -> None:
    """Run the calling thread, and those that it starts, only on a core that nobody else wants (Linux, SCHED_IDLE).

    A thread of this kind that holds a lock which the step thread waits for is no danger as long as only this process is
    busy: the waiting thread leaves it a core. Where other processes fill every core, it can hold a lock for long.
    """
    _mine.gives_way = True
    with contextlib.suppress(OSError):  # a sandbox may forbid it; it is a kindness, not a promise
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def low_priority() -> None:
    """Let others go first from now on; for the calling thread and those that it starts."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def normal_priority() -> None:
    """Leave the calling thread as it is."""


def give_way() -> None:
    """Called by whatever runs on loader threads, every few hundred microseconds: those of idle priority `yield_core`.

    Whatever its priority, a thread that has come to a core keeps it until the next tick of the clock: 4 ms at 250 Hz,
    which a step of a few milliseconds shows. It comes to one where the step's threads have just slept for a moment.
    """
    if getattr(_mine, "gives_way", False):
        yield_core()


def yield_core() -> None:
    """Let a thread that waits for this core have it; the interpreter lock is free meanwhile. Else costs some 1 us."""
    _sched_yield()
