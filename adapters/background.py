"""Threads whose work must not take time from the step thread."""

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

# Of threads that nobody waits for at a client's side but that should get on, such as those that read adapters again.
NICENESS: Final = 10


def idle_priority() -> None:
    """Run the calling thread, and those that it starts, only on a core that nobody else wants (Linux, SCHED_IDLE).

    A thread of this kind that holds a lock which the step thread waits for is no danger as long as only this process is
    busy: the waiting thread leaves it a core. Where other processes fill every core, it can hold a lock for long.
    """
    with contextlib.suppress(OSError):  # a sandbox may forbid it; it is a kindness, not a promise
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def low_priority() -> None:
    """Let others go first from now on; for the calling thread and those that it starts."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def normal_priority() -> None:
    """Leave the calling thread as it is."""


def start_pool(
    size: int, name: str, set_priority: Callable[[], None], *, with_team: bool = False
) -> ThreadPoolExecutor:
    """A pool whose threads have a priority, and do torch's arithmetic alone unless `with_team` gives each its team.

    All threads are started here: `torch.set_num_threads` limits the calling thread but also becomes the default of
    threads that have not used torch yet, so it is put back before any other thread can see it. To be called before the
    step thread starts.
    """

    def prepare() -> None:
        set_priority()
        torch.get_num_threads()  # a thread takes over the default at its first use of torch, not later
        if not with_team:
            torch.set_num_threads(1)

    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(size, thread_name_prefix=name, initializer=prepare)
    together = threading.Barrier(size + 1)
    for _ in range(size):
        pool.submit(together.wait)
    together.wait()
    torch.set_num_threads(num_threads)
    return pool
