"""Runs a coroutine with a wall-clock limit that holds whatever it waits for.

A timeout for each read does not bound a download: a server that sends a byte a second meets every one of them. So the
whole work is one asyncio task that is cancelled at the deadline, wherever it is: resolving, connecting, in a header or
in the body. It has a thread and an event loop of its own, because some of what it calls blocks its thread (looking up a
name, asking a metadata server for credentials): the caller goes on a moment after the deadline even then, and a thread
that is stuck ends when that call returns. Loops are not shared, so one stuck download delays no other.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

# How much longer the caller waits for a task to end that was cancelled.
GRACE_S: Final = 2.0


class StoppedError(Exception):
    """`stop` was called before the work was done."""


class BoundedRun:
    """One run of a coroutine on a thread of its own.

    Args:
        main: makes the coroutine; called on that thread, inside the loop.
        timeout_s: seconds from the start of the run.
    """

    def __init__(self, main: Callable[[], Coroutine[Any, Any, None]], timeout_s: float) -> None:
        self._main = main
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._give_up_at = time.monotonic() + timeout_s + GRACE_S
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._is_stopped = False
        self._is_over = False
        self._error: BaseException | None = None

    def run(self) -> None:
        """Start and wait. Called once.

        Raises:
            TimeoutError: the limit passed.
            StoppedError: `stop` was called.
            BaseException: whatever the coroutine raised.
        """
        threading.Thread(target=self._run_thread, name="adapter-fetch", daemon=True).start()
        with self._changed:
            while not self._is_over and (left_s := self._give_up_at - time.monotonic()) > 0:
                self._changed.wait(left_s)
            if not self._is_over:
                error = StoppedError() if self._is_stopped else TimeoutError()
                self.stop()  # it blocks its thread, and ends at its next await; or it has not begun, and never will
                raise error
            if self._error is not None:
                raise self._error

    def stop(self) -> None:
        """End the run soon. From any thread, also before it begins and after it is over."""
        with self._changed:
            self._is_stopped = True
            self._give_up_at = min(self._give_up_at, time.monotonic() + GRACE_S)
            self._cancel()
            self._changed.notify_all()

    def _cancel(self) -> None:
        if self._loop is not None and self._task is not None and not self._is_over:
            self._loop.call_soon_threadsafe(self._task.cancel)

    def _run_thread(self) -> None:
        try:
            asyncio.run(self._supervise())
        except BaseException as error:
            self._finish(error)

    async def _supervise(self) -> None:
        with self._changed:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
            is_stopped = self._is_stopped
        error: BaseException | None = None
        try:
            if is_stopped:
                raise StoppedError
            async with asyncio.timeout(self._timeout_s):
                await self._main()
        except asyncio.CancelledError:
            error = StoppedError()
        except Exception as cause:
            error = cause
        # Not left to the thread's end: closing the loop waits for name look-ups that were given up.
        self._finish(error)

    def _finish(self, error: BaseException | None) -> None:
        with self._changed:
            if not self._is_over:
                self._is_over, self._error = True, error
                self._changed.notify_all()
