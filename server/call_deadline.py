"""How long a client will wait for the answer to its call."""

import time

from .interceptors import Context


def call_deadline(context: Context) -> float | None:
    """The `time.monotonic()` second by which the client wants its answer; None: it waits for as long as it takes."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
