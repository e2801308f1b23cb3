"""What the device runs in one call, by torch's profiler: how many kernels, and how long each kind takes."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_LONGEST_NAME = 80
_KINDS = 30  # of kernels that are listed, those that take longest


def count_launches(fn: Callable[[], object]) -> dict[str, Any]:
    """Profile one call, after one that is not counted.

    Returns:
        kernels, copies and fills that the device ran; the microseconds of all of them together (times of kernels that
        overlap count each); calls by which the host launched them (a graph is one); and the kinds of kernels.
    """
    fn()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        fn()
        torch.cuda.synchronize()
    return summarize(
        [(e.name, e.time_range.elapsed_us()) for e in profiler.events() if e.device_type == DeviceType.CUDA],
        [e.name for e in profiler.events() if e.device_type == DeviceType.CPU],
    )


def summarize(on_device: list[tuple[str, float]], on_host: list[str]) -> dict[str, Any]:
    """Of (name, microseconds) of what the device ran, and the names of what the host called."""
    kernels: dict[str, list[float]] = defaultdict(list)
    moves = 0
    for name, microseconds in on_device:
        if name.startswith(("Memcpy", "Memset")):
            moves += 1
        else:
            kernels[name[:_LONGEST_NAME]].append(microseconds)
    by_time = sorted(kernels.items(), key=lambda kind: -sum(kind[1]))
    launches = sum("Launch" in name and name.startswith(("cuda", "cu")) for name in on_host)
    return {
        "kernels": sum(map(len, kernels.values())),
        "copies_and_fills": moves,
        "host_launches": launches,
        "device_us": round(sum(microseconds for _, microseconds in on_device), 1),
        "kinds": [{"name": name, "count": len(times), "us": round(sum(times), 1)} for name, times in by_time[:_KINDS]],
    }
