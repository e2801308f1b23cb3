"""What the settings "auto" come to on this machine. Called once at start; the result is logged."""

import os
from dataclasses import dataclass

import torch

from ..kernels.native.functions import multiplies_bf16
from .base.model import BaseModel
from .config import ServerConfig
from .engine.device_memory import free_bytes
from .engine.graph_sizes import GraphSizes
from .errors import ConfigError
from .host_memory import free_host_memory
from .memory_plan import FreeMemory, MemorySettings, ModelSize, plan_host_kv_cache, plan_kv_cache


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
        dtype = torch.bfloat16 if device.type == "cuda" or multiplies_bf16() else torch.float32
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


def free_memory(device: torch.device) -> FreeMemory | None:
    """What this process may still take for the model there; None: unknown."""
    return FreeMemory(free_bytes(device), "The device") if device.type == "cuda" else free_host_memory()


def resolve_kv_blocks(config: ServerConfig, base: BaseModel, max_context: int, free: FreeMemory | None) -> int:
    """Number of KV blocks, after making sure that everything fits beside the base.

    Args:
        config: kv_cache_bytes, and what else takes device memory.
        base: loaded; nothing else is allocated yet.
        max_context: tokens of the longest context.
        free: of the base's device; None: unknown, on a CPU.

    Raises:
        ConfigError: not even one block fits, or not everything does.
    """
    block_bytes = base.kv_block_bytes(config.block_size)
    given = None if config.kv_cache_bytes == "auto" else int(config.kv_cache_bytes)
    if given is not None and given < block_bytes:
        raise ConfigError(
            f"The KV cache gets {given} bytes, and one block of {config.block_size} tokens needs {block_bytes}. Raise "
            "--kv-cache-bytes."
        )
    settings = MemorySettings(
        kv_cache_bytes=given,
        adapter_device_bytes=config.adapter_device_bytes,
        adapter_slots=config.adapter_slots,
        step_tokens=config.step_tokens,
        max_running=config.max_running,
        max_blocks=-(-max_context // config.block_size),
        graph_sizes=GraphSizes if config.cuda_graphs and base.device.type == "cuda" else None,
    )
    size = _model_size(base, block_bytes)
    if base.device.type != "cuda":
        return plan_host_kv_cache(size, settings, free) // block_bytes
    assert free is not None
    return plan_kv_cache(size, settings, free) // block_bytes


def _model_size(base: BaseModel, block_bytes: int) -> ModelSize:
    *layers, head = base.site_table.sites
    return ModelSize(
        hidden=head.in_features,
        widest=max(site.in_features + site.out_features for site in layers),
        largest_weight=max(site.in_features * site.out_features for site in layers),
        vocab=head.out_features,
        num_sites=len(base.site_table.sites),
        max_slices=base.site_table.max_slices,
        itemsize=base.compute_dtype.itemsize,
        kv_block_bytes=block_bytes,
    )
