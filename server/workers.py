"""Threads for calls that block, such that calls that were given up leave nothing behind.

Who finds no thread free waits on the event loop, not in the executor's queue: a cancelled call leaves at once, and the
queue cannot fill with the remains of cancelled calls. What a thread has begun it finishes, and counts as busy until
then, also when nobody waits for it any more.
"""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Workers:
    """A fixed number of threads. All methods are for the event loop's thread.

    Args:
        name: of the threads.
        size: how many there are.
    """

    def __init__(self, name: str, size: int) -> None:
        self._executor = ThreadPoolExecutor(size, thread_name_prefix=name)
        self._free = asyncio.Semaphore(size)

    async def run(self, work: Callable[[], T]) -> T:
        """Run blocking work on a thread, in the context (`contextvars`) of the caller.

        Args:
            work: may raise; goes on when the caller is cancelled while it runs, and never begins if it was before.
        """
        loop = asyncio.get_running_loop()
        await self._free.acquire()
        try:
            future = self._executor.submit(contextvars.copy_context().run, work)
        except BaseException:
            self._free.release()
            raise
        future.add_done_callback(lambda done: self._release(loop, done))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Begin nothing more. Does not wait for what runs: whoever is being waited for is closed after this."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _release(self, loop: asyncio.AbstractEventLoop, done: "Future[T]") -> None:
        """A thread is free again; called on it."""
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._free.release)
