"""A server in this process for as long as a `with` lasts: the parts of `lorikeet serve` but gRPC. And ears for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from lorikeet.server.app import App, assemble
from lorikeet.server.base.demo import prepare_demo_base
from lorikeet.server.base.loader import load_base
from lorikeet.server.config import ServerConfig
from lorikeet.server.logs import configure_logs
from lorikeet.server.metrics import ServerMetrics
from lorikeet.server.policy.holder import PolicyHolder
from lorikeet.server.resolve import resolve_compute
from machine import describe_machine, warn_if_busy


def quiet_process(threads: int, effect: str) -> dict[str, Any]:
    """Set this process up for a server whose numbers are read, not its log.

    Args:
        threads: of torch, on a CPU.
        effect: see warn_if_busy.

    Returns:
        The machine.
    """
    transformers.utils.logging.disable_progress_bar()
    configure_logs("warning", "console")
    torch.set_num_threads(threads)
    machine = describe_machine()
    warn_if_busy(machine, effect)
    return machine


@contextmanager
def local_server(base: Path | None, adapters: Path, state_dir: Path, **settings: Any) -> Iterator[App]:
    """A started server. Adapter folders are not watched: whoever measures says what is loaded when.

    Args:
        base: the base model's directory; None: the demo base, whose quantized form is kept in the cache.
        adapters: directory that adapters may be loaded from.
        state_dir: made if missing; of this server alone.
        settings: further ones; see `lorikeet serve --help`.
    """
    config = ServerConfig(adapters=(adapters,), state_dir=state_dir, metrics=False, **settings)
    compute = resolve_compute(config)
    model = load_base(
        str(base or prepare_demo_base(config.cache_dir)),
        device=compute.device,
        compute_dtype=compute.dtype,
        cache_dir=None if base else config.cache_dir,
        progress=False,
    )
    app = assemble(config, compute, model, PolicyHolder(None))
    app.manager.start()
    app.engine.start()
    try:
        yield app
    finally:
        app.engine.stop()
        app.manager.close()
        app.state.close()


def listen(metrics: ServerMetrics, event: str, listener: Callable[..., None]) -> None:
    """Call `listener` with every event of that name, beside what the metrics do with it.

    Args:
        metrics: of a server, its EngineObserver and AdapterObserver.
        event: the name of one of their methods.
        listener: takes the same arguments; called on the step thread or an adapter thread, so it must be cheap.
    """
    observe = getattr(metrics, event)

    def both(*arguments: Any) -> None:
        listener(*arguments)
        observe(*arguments)

    setattr(metrics, event, both)
