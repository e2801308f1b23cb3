"""A server's life on the event loop: start in order, wait for a signal, drain, stop in order."""

import asyncio
import gc
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from ..adapters.info import AdapterState
from .adapter_service import AdapterService
from .addresses import join_address
from .event_stream import EventBridge
from .generation_service import GenerationService
from .grpc_server import GrpcServer
from .merge_service import MergePlace, MergeService
from .metrics_server import MetricsServer
from .operations_service import OperationsService
from .prompts import PromptEncoder

if TYPE_CHECKING:
    from .app import App

log = structlog.stdlib.get_logger(__name__)

# What answers may take to reach their clients after the engine has ended the last request.
FLUSH_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Ready:
    """What a server that answers calls says about itself.

    Attributes:
        address: of gRPC, host:port.
        metrics_url: where Prometheus scrapes; None: metrics are off.
        device: such as cpu or cuda:0.
        compute_dtype: such as bfloat16.
        nf4_bytes: resident bytes of the NF4 weights.
        adapter_ids: adapters that requests can use, in order.
    """

    address: str
    metrics_url: str | None
    device: str
    compute_dtype: str
    nf4_bytes: int
    adapter_ids: tuple[str, ...]


class _Signals:
    """SIGTERM and SIGINT: the first asks for an orderly end, the second for one at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received, number)

    def _received(self, number: signal.Signals) -> None:
        log.info("signal", signal=signal.Signals(number).name)
        (self.second if self.first.is_set() else self.first).set()


async def serve_until_stopped(app: "App", announce: Callable[[Ready], None]) -> int:
    """Start everything, and stop it in the opposite order.

    Args:
        app: the parts.
        announce: called once, when calls are answered.

    Returns:
        The exit status: 0 after an orderly end, 1 after the engine's death or a second signal.

    Raises:
        ConfigError: an address cannot be listened on.
    """
    loop = asyncio.get_running_loop()
    config = app.config
    signals = _Signals()
    signals.install(loop)
    loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, app.policy.reload))
    died = asyncio.Event()
    # Without its engine the server answers nothing; without its adapter loader it would keep requests waiting for ever.
    app.engine.on_dead = lambda error: _on_dead(loop, died, "step thread", error)
    app.manager.on_dead = lambda error: _on_dead(loop, died, "adapter loader", error)

    async with AsyncExitStack() as stack:
        stack.callback(app.state.close)
        app.manager.start()
        stack.callback(app.manager.close)
        stack.callback(app.tokenizers.close)  # before the manager, which waits for loads that wait for a tokenizer
        app.engine.start()
        stack.callback(app.engine.stop)

        await loop.run_in_executor(None, app.manager.restore)
        if app.watcher is not None:
            await loop.run_in_executor(None, app.watcher.start)
            stack.callback(app.watcher.close)
        await loop.run_in_executor(None, app.manager.finish_restore)

        prompts = PromptEncoder(app.base.tokenizer, app.base.vocab_size, app.tokenizers)
        stack.callback(prompts.close)
        generation = GenerationService(
            app.engine, app.composition, prompts, EventBridge(loop), app.max_context, app.policy
        )
        adapters = AdapterService(app.manager, app.policy)
        stack.callback(adapters.close)
        place = MergePlace(config, app.base.fingerprint, app.state.incoming)
        merges = MergeService(app.manager, place, app.metrics, app.policy)
        await loop.run_in_executor(None, merges.clear_leftovers)
        stack.push_async_callback(merges.close)

        metrics_url = None
        if config.metrics:
            metrics_server = MetricsServer(config.metrics_host, config.metrics_port, app.registry)
            stack.callback(metrics_server.close)
            metrics_url = f"http://{join_address(config.metrics_host, metrics_server.port)}/metrics"
        server = GrpcServer(config.max_message_bytes, app.metrics.on_call)
        operations = OperationsService(merges.operations, app.policy)
        port = await server.start(config.host, config.port, generation, adapters, merges, operations)
        stack.push_async_callback(server.stop, 0)

        # What is there now stays. The collector would go through all of it, half a million objects, every now and then,
        # with the interpreter lock in its hands: at least 0.5 s without a token (AMD EPYC, Zen 3; 2026-11-23).
        gc.collect()
        gc.freeze()
        announce(
            Ready(
                address=join_address(config.host, port),
                metrics_url=metrics_url,
                device=str(app.base.device),
                compute_dtype=str(app.base.compute_dtype).removeprefix("torch."),
                nf4_bytes=app.base.nf4_bytes,
                adapter_ids=tuple(info.adapter_id for info in app.manager.list() if info.state is AdapterState.READY),
            )
        )
        await _first_of(signals.first, died)
        if not died.is_set():
            # New calls get DRAINING while those in flight go on; whoever hears NOT_SERVING can rely on it.
            app.engine.refuse_more()
        await server.stop_serving()
        merges.stop()
        if not died.is_set():
            drain = loop.run_in_executor(None, app.engine.drain, config.drain_timeout_s)
            second = asyncio.ensure_future(_first_of(signals.second, died))
            await asyncio.wait((drain, second), return_when=asyncio.FIRST_COMPLETED)
            second.cancel()
            if not drain.done():
                # Cancelled calls abort their requests, and that ends the drain too.
                await server.stop(0)
            await drain
        await server.stop(FLUSH_GRACE_S)
    return 1 if died.is_set() or signals.second.is_set() else 0


async def _first_of(*events: asyncio.Event) -> None:
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _on_dead(loop: asyncio.AbstractEventLoop, died: asyncio.Event, who: str, error: BaseException) -> None:
    """Called on the thread that ends: a server without it reports NOT_SERVING and ends too."""
    log.critical("thread_died", thread=who, exc_info=error)
    loop.call_soon_threadsafe(died.set)
