"""What a process takes: memory, objects, threads, open files."""

import ctypes
import gc
import os
import re
import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from lorikeet.adapters.packing import PackedAdapter
from lorikeet.adapters.reader import LoadedAdapter
from lorikeet.adapters.record import Record
from lorikeet.adapters.tensor_plan import LaidOut
from lorikeet.server.engine.output import Output
from lorikeet.server.engine.request import Request
from lorikeet.server.engine.step_inputs import StepTensors

_COUNTED: Final = (Record, PackedAdapter, LoadedAdapter, LaidOut, StepTensors, Request, Output, Future, torch.Tensor)
_LIBC: Final = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class Footprint:
    """One measurement.

    Attributes:
        rss_bytes: resident, after the allocator gave back what it could.
        malloc_bytes: what the C library's allocator has handed out and not got back; tensors are among it. 0 where that
            is not known.
        objects: of the classes that requests and adapters are made of, by name.
        num_objects: everything that the garbage collector knows.
        threads: by name, without numbers, and without the soak's own.
        files: open ones, by what they are.
    """

    rss_bytes: int
    malloc_bytes: int
    objects: Counter[str]
    num_objects: int
    threads: Counter[str]
    files: Counter[str]


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure() -> Footprint:
    """Of this process, now."""
    for _ in range(3):
        gc.collect()
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
    everything = gc.get_objects()
    objects = Counter(type(o).__name__ for o in everything if issubclass(type(o), _COUNTED))
    num_objects = len(everything)
    del everything
    names = [thread.name for thread in threading.enumerate() if not thread.name.startswith("soak-")]
    threads = Counter(re.sub(r"\d+", "N", name) for name in names)
    return Footprint(rss_bytes(), _malloc_bytes(), objects, num_objects, threads, Counter(_open_files()))


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def _malloc_bytes() -> int:
    if not hasattr(_LIBC, "mallinfo2"):
        return 0
    _LIBC.mallinfo2.restype = _MallInfo
    info = _LIBC.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def _open_files() -> list[str]:
    names = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            names.append(re.sub(r"\d+", "N", os.readlink(descriptor)))
        except OSError:
            continue  # the listing's own descriptor
    return names
