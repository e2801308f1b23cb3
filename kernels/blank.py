"""Large zeroed tensors. On a CPU the system gives their memory page by page, when something is first written there.

`torch.zeros` writes all of it at once: 0.5 s for the default KV cache and adapter arena (a busy core of an AMD EPYC,
Zen 3; torch 2.13; 2026-11-23). Pages are huge ones where the system has them, since a step reads more than the
processor keeps the addresses of in small ones: docs/performance.md, the first section, has what that saves.
"""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


def blank(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor of zeros.

    Args:
        shape: of the tensor; any size may be 0.
        dtype: of its elements.
        device: where it lies.

    Raises:
        torch.OutOfMemoryError: a GPU has not enough.
        OSError: the system would not give a CPU so much.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    # Lives as long as the tensor's storage.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel or a sandbox without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)
