"""A few numbers on their way to the device, without waiting for it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(values: Sequence[float] | np.typing.NDArray[np.generic], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these values: [len(values)]."""
    host = torch.from_numpy(values).to(dtype) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=dtype)
    # From pageable memory the copy would wait for the device.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
