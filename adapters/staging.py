"""Small tables that change every step: filled on the host, copied to the device without waiting for it."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class StagedValues:
    """A preallocated device tensor that is refilled from host values.

    On the CPU the values are written in place. On CUDA they go through pinned memory, asynchronously on the current
    stream; two host buffers take turns, each guarded by the event of its last copy, because a host buffer must not be
    written while the device may still read it. That event is two fills old, so waiting for it is nearly always free.
    Used by one thread.

    Args:
        size: most values.
        dtype: of the tensor.
        device: where the tensor lives; its address never changes, so that a captured CUDA graph may read it.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(size, dtype=dtype, device=device)
        cuda = device.type == "cuda"
        self._hosts = [torch.zeros(size, dtype=dtype, pin_memory=True) for _ in range(2)] if cuda else []
        self._copied = [torch.cuda.Event() for _ in self._hosts]
        # Lists are written through numpy, which takes a third of the time that torch does.
        self._arrays = [host.numpy() for host in self._hosts or [self.tensor]]
        self._turn = 0

    def fill(self, values: Sequence[int] | Sequence[float] | NDArray[Any]) -> Tensor:
        """Write `values` to the front; a view of that part of the device tensor: [len(values)]."""
        n = len(values)
        if not self._hosts:
            self._arrays[0][:n] = values
            return self.tensor[:n]
        self._turn = 1 - self._turn
        host, copied = self._hosts[self._turn], self._copied[self._turn]
        copied.synchronize()
        self._arrays[self._turn][:n] = values
        self.tensor[:n].copy_(host[:n], non_blocking=True)
        # The stream that copied: the thread's own device may be another one.
        copied.record(torch.cuda.current_stream(self.tensor.device))
        return self.tensor[:n]
