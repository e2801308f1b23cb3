"""The results of the last computations, for what many adapters have in common. Imports no torch."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Memo(Generic[K, V]):
    """A few results, least recently asked for first out. Thread-safe.

    Args:
        size: results that are kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._kept: dict[K, V] = {}  # the last one asked for is at the end

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The result for a key, made if it is not there; everybody who asks for a kept key gets the same object.

        Nothing is kept of a `make` that raises. Two threads may make one result at the same time.
        """
        with self._lock:
            if key in self._kept:
                self._kept[key] = found = self._kept.pop(key)
                return found
        made = make()
        with self._lock:
            found = self._kept.setdefault(key, made)
            if len(self._kept) > self._size:
                del self._kept[next(iter(self._kept))]
            return found
