"""How much of the device's memory is free: asked at start, and to say what captured graphs take."""

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes of the device that nobody has allocated; 0 on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
