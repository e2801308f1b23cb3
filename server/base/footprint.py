"""What a base takes of the device's memory, known before its weights are read."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import BaseModelError
from .fill import required_dense_names
from .site_plan import SitePlan

_NF4_BYTES = 0.5 + 4 / 64  # of an element: its code, and an un-nested constant for each block of 64
_GIB = 2**30


def resident_bytes(model: nn.Module, plans: list[SitePlan], dtype: torch.dtype) -> int:
    """Bytes of the weights once they are loaded, 8 % too many where constants are nested; meta tensors will do.

    Args:
        model: its module tree, linears not replaced yet.
        plans: of its NF4 linears.
        dtype: of everything else. A CPU may keep the head in less (`vocabulary.py`).
    """
    nf4 = sum(sum(plan.widths) * plan.in_features for plan in plans)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    dense = sum(math.prod(shapes[name]) for name in required_dense_names(model, plans))
    return int(nf4 * _NF4_BYTES) + dense * dtype.itemsize


@contextmanager
def explained_out_of_memory(needed: int, device: torch.device) -> Iterator[None]:
    """Turn running out of device memory while a base is loaded into an error that says what it needs.

    Args:
        needed: bytes of the weights.
        device: where they go.

    Raises:
        BaseModelError: there was not enough.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    try:
        yield
    except torch.OutOfMemoryError as error:
        found = "" if free is None else f"; {free / _GIB:.2f} GiB of it were free before"
        raise BaseModelError(
            f"The device ran out of memory while the base was loaded: its weights take {needed / _GIB:.2f} GiB, some "
            f"more while they are quantized{found}. End what else uses {device}, or take a smaller base or a larger "
            "device."
        ) from error
