"""Puts a server together: settings, base model, adapters, engine. What happens while it runs is in lifecycle.py."""

import asyncio
import dataclasses
import errno
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import torch
from prometheus_client import CollectorRegistry

from ..adapters.composition import CompositionPort
from ..adapters.layers import LoraLinear
from ..adapters.lora_batch import LoraBatch
from ..adapters.manager import AdapterManager
from ..adapters.state.state_dir import StateDir, open_state_dir
from ..adapters.watcher import AdapterWatcher
from ..kernels.native.functions import library_name
from .base.loader import load_base
from .base.model import BaseModel
from .base.selfcheck import check_unproven_family
from .config import ServerConfig
from .engine.block_manager import BlockManager
from .engine.detokenizer import DetokenizerFactory
from .engine.engine import Engine
from .engine.graph_capture import CaptureBackend, CudaCapture
from .engine.runner import Runner
from .engine.sampler import Sampler
from .engine.scheduler import Scheduler
from .errors import ConfigError
from .lean_imports import lean_imports
from .lifecycle import Ready, serve_until_stopped
from .metrics import ServerMetrics
from .metrics_state import StateCollector
from .policy.holder import PolicyHolder
from .proof import GoldenProver
from .resolve import Compute, free_memory, resolve_compute, resolve_context, resolve_kv_blocks
from .tokenizers import Tokenizers

log = structlog.stdlib.get_logger(__name__)

# A golden file's prompts run among everybody's requests, and its adapter may have to wait for device memory.
PROOF_TIMEOUT_S = 120.0
# A call that comes while a folder's files are replaced one by one must not make a version of old and new ones.
LOAD_SETTLE_S = 0.25


@dataclass(frozen=True, slots=True)
class App:
    """The parts of one server.

    Attributes:
        composition: the adapters as requests use them.
        state: what survives a restart; closed last.
        policy: who may do what, shares and caps.
        watcher: of the adapter directories; None if there is none.
        tokenizers: of adapters that brought their own.
        max_context: most tokens of prompt plus output.
        registry: all metrics of this server.
    """

    config: ServerConfig
    base: BaseModel
    manager: AdapterManager
    composition: CompositionPort
    state: StateDir
    policy: PolicyHolder
    watcher: AdapterWatcher | None
    engine: Engine
    tokenizers: Tokenizers
    max_context: int
    metrics: ServerMetrics
    registry: CollectorRegistry


def run_server(config: ServerConfig, source: str, name: str, announce: Callable[[Ready], None]) -> int:
    """Load and serve until SIGTERM, SIGINT or the engine's death.

    Args:
        config: checked settings.
        source: directory or hub id of the base.
        name: its public name, where it is not `source`; else "".
        announce: called once, when calls are answered.

    Returns:
        The exit status: 0 after an orderly end, 1 after the engine's death or a second signal.

    Raises:
        ConfigError, BaseModelError: something that the operator can mend.
    """
    compute = resolve_compute(config)
    policy = PolicyHolder(config.policy)
    torch.set_num_threads(compute.threads)
    with lean_imports():  # what transformers computes this model with comes in only now
        base = load_base(
            source, device=compute.device, compute_dtype=compute.dtype, cache_dir=config.cache_dir, name=name
        )
    check_unproven_family(base)
    try:
        app = assemble(config, compute, base, policy)
    except (torch.OutOfMemoryError, OSError) as error:
        # A CPU's KV cache and arena come from the system itself.
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        place = "This machine" if compute.device.type == "cpu" else compute.device
        raise ConfigError(
            f"{place} ran out of memory although everything should have fit: something else takes of it too. "
            "Lower --kv-cache-bytes or --adapter-device-bytes."
        ) from error
    return asyncio.run(serve_until_stopped(app, announce))


def assemble(config: ServerConfig, compute: Compute, base: BaseModel, policy: PolicyHolder) -> App:
    """Connect the parts, and capture steps on CUDA; no thread runs yet.

    Raises:
        ConfigError: a setting does not go with the base, or asks for more memory than there is.
    """
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry, config.metrics_max_adapters)
    max_context = resolve_context(config, base.max_context)
    torch.cuda.empty_cache()  # what quantizing the base used
    num_blocks = resolve_kv_blocks(config, base, max_context, free_memory(compute.device))

    state = open_state_dir(config.state_dir, config.cache_dir / "run", config.adapter_store_bytes)
    manager = AdapterManager(
        base.site_table,
        base.module_table,
        base.weights,
        dataclasses.replace(base.fingerprint, also=(*base.fingerprint.also, *config.base_names)),
        dtype=compute.dtype,
        device=compute.device,
        device_budget_bytes=config.adapter_device_bytes,
        host_budget_bytes=config.adapter_host_bytes,
        roots=config.adapters,
        state=state,
        max_slots=config.adapter_slots,
        drain_deadline_s=config.adapter_drain_timeout_s,
        observer=metrics,
        allowed_sources=config.adapter_sources,
        max_fetch_bytes=config.adapter_fetch_bytes,
        fetch_timeout_s=config.adapter_fetch_timeout_s,
        allow_zero=config.adapter_allow_zero,
        allow_other_base=config.adapter_allow_other_base,
        settle_s=LOAD_SETTLE_S,
    )
    composition = CompositionPort(manager, config.adapter_slots)
    lora = LoraBatch(manager.store, max_tokens=config.step_tokens, max_segments=config.max_running)
    base.wrap_sites(lambda linear, site: LoraLinear(linear, site, lora))

    runner = Runner(
        base,
        lora,
        base.new_kv_cache(num_blocks, config.block_size),
        max_tokens=config.step_tokens,
        max_requests=config.max_running,
        max_blocks=-(-max_context // config.block_size),
        expand=composition.expand,
        capture=capture_backend(config, compute.device),
    )
    runner.capture_graphs(progress=True)
    scheduler = Scheduler(
        BlockManager(num_blocks, config.block_size, prefix_cache=config.prefix_cache),
        composition,
        max_running=config.max_running,
        token_budget=config.step_tokens,
        limits_of=policy.limits,
        max_wait_s=config.max_wait_s,
        max_slowdown=config.max_slowdown,
        padded_sizes=runner.padded_sizes,
    )
    detokenizers = DetokenizerFactory(base.tokenizer)
    engine = Engine(
        runner,
        scheduler,
        Sampler(sorted(base.eos_token_ids)),
        detokenizers,
        composition,
        metrics,
        eos_token_ids=base.eos_token_ids,
        max_context=max_context,
        max_waiting=config.max_waiting,
    )
    policy.on_change = engine.limits_changed
    tokenizers = Tokenizers(base.tokenizer, detokenizers.backend, base.eos_token_ids, base.vocab_size)
    manager.make_tokenizer = tokenizers.make
    manager.on_version_dropped = engine.on_version_dropped
    manager.is_running = engine.is_running
    manager.prover = GoldenProver(
        engine,
        manager.hold,
        manager.release,
        PROOF_TIMEOUT_S,
        vocab_size=base.vocab_size,
        exact=compute.dtype is torch.float32,
    )
    registry.register(StateCollector(engine.stats, manager.snapshot, config.adapter_slots, lambda: runner.graph_stats))
    log.info(
        "settings",
        **config.model_dump(mode="json", exclude={"config"}),
        resolved={
            "device": str(compute.device),
            "compute_dtype": str(compute.dtype).removeprefix("torch."),
            "threads": compute.threads,
            "max_context": max_context,
            "kv_blocks": num_blocks,
            "graphs": runner.graph_stats.num_graphs,
            "cpu_kernels": library_name() or "none",
        },
    )
    if compute.device.type == "cpu" and library_name() is None:
        log.warning(
            "no_cpu_kernels",
            hint="Lorikeet was installed without its compiled CPU kernels, so steps take several times as long. "
            "Install a C++ compiler (Debian, Ubuntu: apt-get install g++) and install Lorikeet again.",
        )
    watcher = AdapterWatcher(manager, config.adapters) if config.adapters else None
    return App(
        config, base, manager, composition, state, policy, watcher, engine, tokenizers, max_context, metrics, registry
    )


def capture_backend(config: ServerConfig, device: torch.device) -> CaptureBackend | None:
    """What captures steps; None: they run eagerly."""
    return CudaCapture(device) if config.cuda_graphs and device.type == "cuda" else None
