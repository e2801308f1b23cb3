"""`lorikeet serve` and `lorikeet prepare-demo`: the commands that load a model."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .addresses import DEFAULT_ADDRESS, require_free
from .base.demo import BASE_NAME, DEMO, prepare_demo_base
from .config import ServerConfig
from .config_loading import load_config
from .errors import ConfigError
from .lean_imports import lean_imports
from .logs import configure_logs


def serve(arguments: Sequence[str]) -> int:
    """Serve until stopped.

    Args:
        arguments: the settings given as flags.

    Returns:
        The exit status.

    Raises:
        ConfigError, BaseModelError: something that the operator can mend.
    """
    config = load_config(arguments)
    configure_logs(config.log_level, config.log_format)
    check_surroundings(config)
    # Until the event loop takes the signal over. As a container's first process, the default would be to ignore it.
    signal.signal(signal.SIGTERM, _end)
    source, name = config.model, ""
    if config.model == DEMO:
        # Before the lean imports: to prepare it, at the first start, takes all of transformers.
        source, name = str(prepare_demo_base(config.cache_dir, wheel=config.demo_wheel)), BASE_NAME
    # Imports torch and transformers, which takes seconds; what can be wrong without them has been reported by now.
    with lean_imports():
        from .app import run_server
        from .lifecycle import Ready

    def announce(ready: Ready) -> None:
        metrics = f"metrics {ready.metrics_url}" if ready.metrics_url else "metrics off"
        count = len(ready.adapter_ids)
        sys.stdout.write(
            f"lorikeet ready: grpc {ready.address}, {metrics}, device {ready.device} ({ready.compute_dtype}), "
            f"NF4 weights {ready.nf4_bytes / 2**20:.1f} MiB, {count} adapter{'' if count == 1 else 's'}\n"
            f"try: {client_command(ready.address, ready.adapter_ids)}\n"
        )
        sys.stdout.flush()

    return run_server(config, source, name, announce)


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def check_surroundings(config: ServerConfig) -> None:
    """Fail before the model is loaded if something about this machine is not as the settings say.

    Raises:
        ConfigError: a directory is missing or cannot be what it is meant for, or an address is taken.
    """
    for directory in config.adapters:
        if not directory.is_dir():
            raise ConfigError(f"--adapters names {directory}, which is not a directory.")
    if config.merge_dir is not None:
        check_merge_dir(config.merge_dir, config.adapters)
    require_free("gRPC", config.host, config.port, "--")
    if config.metrics:
        require_free("/metrics", config.metrics_host, config.metrics_port, "--metrics-")


def check_merge_dir(directory: Path, adapters: Sequence[Path]) -> None:
    """Make the directory, and raise ConfigError unless merged models can be written there."""
    for watched in adapters:
        if directory.resolve().is_relative_to(watched.resolve()):
            raise ConfigError(
                f"--merge-dir names {directory}, which lies in a directory of --adapters, whose subfolders are "
                "adapters; give another."
            )
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"--merge-dir names {directory}, which is no directory that this user may make or write to.")


def client_command(address: str, adapter_ids: Sequence[str]) -> str:
    """A command that works when pasted into another terminal in the same directory."""
    program = Path(sys.argv[0])
    found = shutil.which("lorikeet")
    if found is not None and program.exists() and os.path.samefile(found, program):
        command = "lorikeet"
    else:
        # Not on the PATH, such as in a virtual environment that the other terminal has not activated.
        inside = program.is_absolute() and program.is_relative_to(Path.cwd())
        command = str(program.relative_to(Path.cwd()) if inside else program)
    parts = [command, "generate"]
    if address != DEFAULT_ADDRESS:
        parts += ["--address", address]
    if adapter_ids:
        parts += ["--adapter", "kjv" if "kjv" in adapter_ids else adapter_ids[0]]
    return " ".join([*parts, "--max-tokens", "64", '"In the beginning"'])


def prepare_demo(cache_dir: Path | None) -> int:
    """Fetch and prepare the demo base, and print where it is.

    Returns:
        The exit status.
    """
    config = load_config([] if cache_dir is None else ["--cache-dir", str(cache_dir)])
    configure_logs(config.log_level, config.log_format)
    sys.stdout.write(f"{prepare_demo_base(config.cache_dir, wheel=config.demo_wheel)}\n")
    return 0
