"""Checks of the operators' tensor contracts, cheap enough to run at every call."""

from collections.abc import Callable
from typing import NoReturn

import torch


def check(holds: bool, message: Callable[[], str]) -> None:
    """Raises RuntimeError with message() unless `holds`.

    `torch._check` itself takes 2 to 3 us also where the condition holds; ten of them would be most of a small
    operator's time on a CPU, so it is called only to fail.
    """
    if not holds:
        torch._check(False, message)


def refuse(message: str) -> NoReturn:
    """Raises RuntimeError: for checks so frequent that even what makes `check`'s message would cost too much."""
    torch._check(False, lambda: message)
    raise AssertionError
