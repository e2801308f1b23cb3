"""What a server takes of its device's memory beside the base's weights, and what to lower where it is too much.

Computed before anything of it is allocated. KV cache, arena and tables are exact; what a step computes on the way and
what captured graphs take are estimates, rather too high. Imports no torch.

On a CPU the system gives cache and arena their memory only as they fill (kernels/blank.py): asking for too much
succeeds, and the process is killed later. So it is refused there too; see `plan_host_kv_cache`.
"""

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import structlog

from .config import DEFAULT_ADAPTER_DEVICE_BYTES, GIB, MIB
from .engine.graph_sizes import GraphSizes
from .errors import ConfigError

log = structlog.stdlib.get_logger(__name__)

# Of what is left beside everything else; the rest stays free for what the estimates miss.
AUTO_KV_SHARE: Final = 0.9
CPU_KV_CACHE_BYTES: Final = 512 * MIB
# CUDA libraries' workspaces, compiled kernels, fragments. vLLM's logs of 67 graphs of an 8B model name 0.5 to 0.6 GiB.
RESERVE_BYTES: Final = 512 * MIB
GRAPH_BYTES: Final = 8 * MIB
# A KV cache and an arena that together take no more than by default are not refused on a CPU.
MODEST_BYTES: Final = CPU_KV_CACHE_BYTES + DEFAULT_ADAPTER_DEVICE_BYTES
# Of each logit of a step whose rows all sample with top-p: scaled and sorted values, indices, running sums (fp32).
_SAMPLER_BYTES: Final = 24


class FreeMemory(NamedTuple):
    """What nobody has taken.

    Attributes:
        nbytes: how much.
        place: whose they are; begins a sentence.
    """

    nbytes: int
    place: str


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What the plan must know of a base.

    Attributes:
        hidden: width of the residual stream.
        widest: input plus output features of the largest linear of a layer.
        largest_weight: elements of that linear, of which a step of many rows holds a 16-bit copy.
        vocab: columns of the logits.
        num_sites: adaptable linears.
        max_slices: of a site.
        itemsize: bytes of an element of the compute type.
        kv_block_bytes: of one block of tokens over all layers.
    """

    hidden: int
    widest: int
    largest_weight: int
    vocab: int
    num_sites: int
    max_slices: int
    itemsize: int
    kv_block_bytes: int


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """The settings that memory depends on; `ServerConfig` says what they mean.

    Attributes:
        kv_cache_bytes: None: auto.
        graph_sizes: of the captured graphs, by step_tokens and max_running; None: nothing is captured.
        max_blocks: of the longest context.
    """

    kv_cache_bytes: int | None
    adapter_device_bytes: int
    adapter_slots: int
    step_tokens: int
    max_running: int
    max_blocks: int
    graph_sizes: Callable[[int, int], GraphSizes] | None


def demands(size: ModelSize, settings: MemorySettings) -> dict[str, int]:
    """Bytes by what they are for, without the KV cache."""
    tables = size.num_sites * settings.adapter_slots * (16 + 4 * size.max_slices) + 8 * MIB
    inputs = settings.max_running * settings.max_blocks * 4 + settings.step_tokens * 24
    workspace = _activations(size, settings.step_tokens, settings.max_running) + size.largest_weight * size.itemsize
    workspace += settings.max_running * size.vocab * _SAMPLER_BYTES
    found = {
        "adapters": settings.adapter_device_bytes + tables,
        "workspace of a step": workspace + inputs,
        "reserve": RESERVE_BYTES,
    }
    if settings.graph_sizes is not None:
        sizes = settings.graph_sizes(settings.step_tokens, settings.max_running)
        # Not all of these combinations are captured: what settings need must only grow with them.
        count = 3 * len(sizes.decodes) + 2 * len(sizes.tokens) * len(sizes.requests)
        most = sizes.decodes[-1]
        pool = _activations(size, max(sizes.tokens[-1], most), most) + size.largest_weight * size.itemsize
        found["CUDA graphs"] = count * GRAPH_BYTES + pool + most * size.vocab * 4
    return found


def plan_kv_cache(size: ModelSize, settings: MemorySettings, free: FreeMemory) -> int:
    """Bytes of the KV cache on a CUDA device.

    Args:
        size: of the base, whose weights are loaded.
        settings: as given.
        free: of the device.

    Raises:
        ConfigError: it does not fit; names everything that takes memory, and which setting to lower to what.
    """
    if _missing(size, settings, free.nbytes) > 0:
        raise ConfigError(_explain(size, settings, free))
    if settings.kv_cache_bytes is not None:
        return settings.kv_cache_bytes
    return max(size.kv_block_bytes, _auto(size, settings, free.nbytes))


def plan_host_kv_cache(size: ModelSize, settings: MemorySettings, free: FreeMemory | None) -> int:
    """Bytes of the KV cache on a CPU.

    An automatic one is smaller where there is little memory, but still holds the longest context if it ever would.
    Where cache and arena do not fit and together are no larger than by default, there is only a warning: the estimates
    are rather too high, and what is never filled takes no memory.

    Args:
        size: of the base, whose weights are loaded.
        settings: as given.
        free: of this process; None: unknown.

    Raises:
        ConfigError: it does not fit, and is more than by default; says the same as plan_kv_cache.
    """
    kv_cache = settings.kv_cache_bytes
    if kv_cache is None:
        most = max(CPU_KV_CACHE_BYTES, size.kv_block_bytes)
        least = min(most, settings.max_blocks * size.kv_block_bytes)
        kv_cache = most if free is None else max(least, min(most, _auto(size, settings, free.nbytes)))
    if free is None:
        return kv_cache
    with_cache = replace(settings, kv_cache_bytes=kv_cache)
    missing = _missing(size, with_cache, free.nbytes)
    if missing > 0 and kv_cache + settings.adapter_device_bytes > MODEST_BYTES:
        raise ConfigError(_explain(size, with_cache, free))
    if missing > 0 or (settings.kv_cache_bytes is None and kv_cache < CPU_KV_CACHE_BYTES):
        log.warning(
            "little_memory",
            free_bytes=free.nbytes,
            kv_cache_bytes=kv_cache,
            adapter_device_bytes=settings.adapter_device_bytes,
            hint=f"{free.place} has {_gib(free.nbytes)} free beside the base's weights. "
            + (
                "If KV cache and adapters fill up, the system may end the server: lower --kv-cache-bytes or "
                "--adapter-device-bytes."
                if missing > 0
                else f"The KV cache takes {_gib(kv_cache)} of it, less than on a larger machine."
            ),
        )
    return kv_cache


def _activations(size: ModelSize, rows: int, sampled: int) -> int:
    """Bytes that a forward pass holds at a time, at most.

    Some copies of the stream, a linear's input and output twice, and the logits in the compute type and in fp32.
    """
    return rows * (4 * size.hidden + 2 * size.widest) * size.itemsize + sampled * size.vocab * (size.itemsize + 4)


def _auto(size: ModelSize, settings: MemorySettings, free: int) -> int:
    """What an automatic KV cache may take of what is left beside everything else."""
    return int((free - sum(demands(size, settings).values())) * AUTO_KV_SHARE)


def _missing(size: ModelSize, settings: MemorySettings, free: int) -> int:
    """Bytes that are needed beyond what is free; 0 or less: it fits."""
    kv_cache = size.kv_block_bytes if settings.kv_cache_bytes is None else settings.kv_cache_bytes
    return sum(demands(size, settings).values()) + kv_cache - free


def _explain(size: ModelSize, settings: MemorySettings, free: FreeMemory) -> str:
    parts: Mapping[str, int] = {
        "KV cache": size.kv_block_bytes if settings.kv_cache_bytes is None else settings.kv_cache_bytes,
        **demands(size, settings),
    }
    listed = ", ".join(f"{name} {_gib(count)}" for name, count in parts.items())
    advice = _advice(size, settings, free.nbytes)
    if advice:
        what = f"Lower one of: {'; '.join(advice)}."
    else:
        what = (
            "No setting alone makes up for it: lower --kv-cache-bytes, --adapter-device-bytes, --step-tokens and "
            "--max-running together, or take a smaller base or a larger device."
        )
    return (
        f"{free.place} has {_gib(free.nbytes)} free beside the base's weights, and {_gib(sum(parts.values()))} are "
        f"needed ({listed}); {_gib(_missing(size, settings, free.nbytes))} are missing. {what}"
    )


def _advice(size: ModelSize, settings: MemorySettings, free: int) -> list[str]:
    """Each setting that is enough alone, with its largest value that is."""

    def largest(change: Callable[[int], MemorySettings], least: int, most: int) -> int | None:
        if most < least or _missing(size, change(least), free) > 0:
            return None
        return bisect.bisect_left(range(least, most), 1, key=lambda v: int(_missing(size, change(v), free) > 0)) + (
            least - 1
        )

    def kv(mib: int) -> MemorySettings:
        return replace(settings, kv_cache_bytes=mib * MIB)

    def arena(mib: int) -> MemorySettings:
        return replace(settings, adapter_device_bytes=mib * MIB)

    advice = []
    if settings.kv_cache_bytes is not None:
        least = -(-size.kv_block_bytes // MIB)
        if (mib := largest(kv, least, settings.kv_cache_bytes // MIB + 1)) is not None:
            advice.append(_lower("--kv-cache-bytes", settings.kv_cache_bytes, mib))
    if (mib := largest(arena, 1, settings.adapter_device_bytes // MIB + 1)) is not None:
        advice.append(_lower("--adapter-device-bytes", settings.adapter_device_bytes, mib))
    tokens = largest(lambda v: replace(settings, step_tokens=v), settings.max_running, settings.step_tokens)
    if tokens is not None:
        advice.append(f"--step-tokens by {settings.step_tokens - tokens}, to {tokens}")
    running = largest(lambda v: replace(settings, max_running=v), 1, settings.max_running)
    if running is not None:
        advice.append(f"--max-running by {settings.max_running - running}, to {running}")
    if settings.graph_sizes is not None and _missing(size, replace(settings, graph_sizes=None), free) <= 0:
        advice.append("the graphs, with --no-cuda-graphs")
    return advice


def _lower(flag: str, current: int, mib: int) -> str:
    return f"{flag} by {_gib(current - mib * MIB)}, to {mib}MiB"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
