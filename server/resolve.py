"""What the settings "auto" come to on this machine. Called once at start; the result is logged."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import MIB, ServerConfig
from .errors import ConfigError

CPU_KV_CACHE_BYTES = 512 * MIB
CUDA_KV_CACHE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and in which type the model runs."""

    device: torch.device
    dtype: torch.dtype
    threads: int


def resolve_compute(config: ServerConfig) -> Compute:
    """Device, compute dtype and CPU threads.

    Raises:
        ConfigError: the device is not there.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(
                f"--device is {config.device}, but this machine has {count} CUDA devices that torch can use."
            )
        device = torch.device("cuda", device.index or 0)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(config.compute_dtype)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" or _has_avx512_bf16() else torch.float32
    return Compute(device, dtype, config.threads or len(os.sched_getaffinity(0)))


def resolve_context(config: ServerConfig, model_context: int) -> int:
    """Most tokens of prompt plus output.

    Raises:
        ConfigError: more than the model was trained for.
    """
    if config.max_context is None:
        return model_context
    if config.max_context > model_context:
        raise ConfigError(f"--max-context is {config.max_context}; the model was trained for {model_context}.")
    return config.max_context


def resolve_kv_blocks(config: ServerConfig, device: torch.device, block_bytes: int) -> int:
    """Number of KV blocks. On CUDA, weights and adapter memory are allocated before.

    Args:
        config: kv_cache_bytes, or "auto".
        device: where the cache will be.
        block_bytes: bytes of one block over all layers.

    Raises:
        ConfigError: not even one block fits.
    """
    if config.kv_cache_bytes != "auto":
        budget = int(config.kv_cache_bytes)
    elif device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        budget = int(free * CUDA_KV_CACHE_SHARE)
    else:
        budget = CPU_KV_CACHE_BYTES
    if budget < block_bytes:
        raise ConfigError(
            f"The KV cache gets {budget} bytes, and one block of {config.block_size} tokens needs {block_bytes}. Raise "
            "--kv-cache-bytes."
        )
    return budget // block_bytes


def _has_avx512_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; elsewhere bfloat16 is slower than float32."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
