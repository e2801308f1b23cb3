"""Clocks on some functions: how long each part took, without what other parts took inside of it."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple


class Timed(NamedTuple):
    """A function that belongs to a part: attribute `name` of `owner`, an object, a class or a module."""

    owner: Any
    name: str
    part: str


class PartClock:
    """Nanoseconds spent in each part while `running`."""

    def __init__(self, functions: Sequence[Timed]) -> None:
        self.spent: Counter[str] = Counter()
        self._functions = functions
        self._inner = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Put clocks on the functions for a while, from zero."""
        self.spent.clear()
        before = [(vars(owner).get(name), owner, name) for owner, name, _ in self._functions]
        for owner, name, part in self._functions:
            setattr(owner, name, self._around(part, getattr(owner, name)))
        try:
            yield
        finally:
            for own, owner, name in before:
                if own is None:  # of its class
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)

    def _around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self._inner = self._inner, 0
            begin = time.perf_counter_ns()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.perf_counter_ns() - begin
                self.spent[part] += took - self._inner
                self._inner = before + took

        return timed
