"""Finds the library of C++ kernels that suits this CPU and hands out its functions.

The package's build makes one library for each instruction set (`setup.py`). Where there was no C++
compiler there is none, and the operators' plain-torch implementations run, several times slower; `library_name` is for
saying so. LORIKEET_NATIVE_KERNELS names one library (`avx512`, `avx2`, `portable`) or none (`off`), for tests and
comparisons.

Functions are called by ctypes, which costs 1 to 2 us where torch's dispatcher takes 5 to 10 and needs no torch headers,
so one build serves every version of torch. They check nothing: callers do. Their loops run on a team of threads of the
library's own (`parallel.cpp`), with as many as torch would use.
"""

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Final

import torch

ADDRESS: Final = ctypes.c_void_p
"""Of a tensor's first element (`data_ptr()`), or None."""
COUNT: Final = ctypes.c_long
NUMBER: Final = ctypes.c_int
REAL: Final = ctypes.c_float

TYPE_NUMBERS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of element types, as `vec.h` has them."""

_FOLDER: Final = Path(__file__).parent
_CHOICE: Final = "LORIKEET_NATIVE_KERNELS"
# What /proc/cpuinfo has to list for each, the best one first. What else a library is compiled for came with these.
_LIBRARIES: Final = {
    "avx512": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"),
    "avx2": ("avx2", "fma", "f16c", "bmi2"),
    "portable": (),
}
_INTERFACE: Final = 5  # of library.cpp


def function(name: str, *argument_types: Any, brief: bool = False) -> Callable[..., None] | None:
    """A function of the library, or None where there is no library.

    Args:
        name: exported symbol.
        argument_types: of ctypes; the functions return nothing.
        brief: it takes microseconds and keeps Python's lock, which whoever asks for it meanwhile would give back late.
    """
    path = _library_path()
    if path is None:
        return None
    found = getattr(_load(path, brief), name)
    found.argtypes = argument_types
    found.restype = None
    called: Callable[..., None] = found
    return called


def library_name() -> str | None:
    """`avx512`, `avx2` or `portable`; None: there is no library, and plain torch runs."""
    path = _library_path()
    return None if path is None else path.name.split(".")[0].removeprefix("_")


def multiplies_bf16() -> bool:
    """Whether the library multiplies bfloat16 by instructions made for it; elsewhere fp32 is faster."""
    return library_name() == "avx512"


def can_run(name: str) -> bool:
    """Whether this CPU has what a library is compiled for."""
    return _cpu_flags().issuperset(_LIBRARIES[name])


@lru_cache
def _library_path() -> Path | None:
    chosen = os.environ.get(_CHOICE, "")
    if chosen not in ("", "off", *_LIBRARIES):
        raise ValueError(f"{_CHOICE} is {chosen!r}; it can be {', '.join(_LIBRARIES)} or off")
    if chosen in _LIBRARIES and not can_run(chosen):
        missing = ", ".join(flag for flag in _LIBRARIES[chosen] if flag not in _cpu_flags())
        raise ValueError(f"{_CHOICE} is {chosen!r}, but this CPU lacks {missing}; unset it, and the best one is taken")
    names = [chosen] if chosen else [name for name in _LIBRARIES if can_run(name)]
    for name in names:
        for suffix in EXTENSION_SUFFIXES:
            path = _FOLDER / f"_{name}{suffix}"
            if path.is_file():
                return path
    return None


@lru_cache
def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            line = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return frozenset()  # another system, which gets the portable library
    return frozenset(line.partition(":")[2].split())


@lru_cache
def _load(path: Path, brief: bool) -> ctypes.CDLL:
    library = ctypes.PyDLL(str(path)) if brief else ctypes.CDLL(str(path))
    interface = getattr(library, "lorikeet_interface", None)
    if interface is None or interface() != _INTERFACE:
        raise ImportError(
            f"{path.name} was built from other sources than this code; install Lorikeet again (`make setup`)"
        )
    return library
