"""Importing what a server consists of without what it does not need: torch's compiler, and garbage collections.

bitsandbytes (0.50) wraps two optimizer steps in `torch.compile` when it is imported, and that loads the inductor: 540
modules and 18 % of the processor time of all imports (10.0 s with it, 8.2 s without, medians of 3 turns each on two
busy cores of an AMD EPYC, Zen 3; torch 2.13.0, transformers 5.23.0; 2026-11-23).
Functions that are imported meanwhile stay as they were written.

Modules stay as long as the process, so nothing is collected while they come in, and later collections leave them out.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def lean_imports() -> Iterator[None]:
    """While this lasts, `torch.compile` returns functions as they are and no garbage is collected.

    For one thread, at start.
    """
    gc.disable()
    try:
        import torch

        with mock.patch.object(torch, "compile", _as_it_is):
            yield
        gc.freeze()
    finally:
        gc.enable()


def _as_it_is(function: Any = None, /, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that does nothing."""
    return _as_it_is if function is None else function
