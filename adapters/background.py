"""Pools of threads whose work must not take time from the step thread."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


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
