"""Reads `ServerConfig` from flags, environment and file, and says what is wrong with them in the user's words."""

import argparse
import difflib
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ByteSize, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import SettingsError

from .access import CLIENT_ENV
from .config import CONFIG_ENV, ENV_PREFIX, ServerConfig
from .errors import ConfigError

# Settings that may be given more than once.
REPEATED: Final = ("adapters", "adapter_sources", "base_names")


def load_config(arguments: Sequence[str]) -> ServerConfig:
    """Read flags, environment and file.

    Args:
        arguments: what follows `lorikeet serve`.

    Raises:
        ConfigError: an unknown key or a value that is not allowed, by name.
        SystemExit: `--help`, or a flag that does not exist (argparse's own message, status 2).
    """
    flags = vars(flag_parser().parse_args(arguments))
    _refuse_unknown_environment(os.environ)
    path = flags.get("config") or os.environ.get(CONFIG_ENV)
    if path is not None and not Path(path).is_file():
        raise ConfigError(f"The configuration file {path} (--config or {CONFIG_ENV}) does not exist.")
    try:
        return ServerConfig(**flags)
    except ValidationError as error:
        raise ConfigError(_explain(error, flags, path)) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The configuration file {path} is not TOML: {error}.") from error
    except SettingsError as error:
        raise ConfigError(f"An environment variable {ENV_PREFIX}... cannot be read: {error}.") from error


def flag_parser() -> argparse.ArgumentParser:
    """A parser with one flag for each setting. It only collects strings; `ServerConfig` checks them."""
    parser = argparse.ArgumentParser(
        prog="lorikeet serve",
        description="Serve one NF4 base model and many LoRA adapters over gRPC.",
        usage="lorikeet serve [SETTING ...]",
        epilog=f"Every setting can also be an environment variable ({ENV_PREFIX}MAX_CONTEXT=4096) or a key of the TOML "
        "file (max_context = 4096). A flag wins over the environment, which wins over the file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, info in ServerConfig.model_fields.items():
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        title = str(extra.get("group"))
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        options: dict[str, Any] = {"dest": name, "help": f"{info.description} {_default_text(info)}".replace("%", "%%")}
        if info.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = _metavar(name, info)
            if name in REPEATED:
                options["action"] = "append"
        groups[title].add_argument(flag(name), **options)
    return parser


def flag(name: str) -> str:
    """The command line flag of a setting."""
    return "--" + name.replace("_", "-")


def _default_text(info: FieldInfo) -> str:
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    value = extra.get("default_text", info.default)
    if value is None or value == ():
        return "[none]"
    if isinstance(value, ByteSize):
        value = value.human_readable(separator="").replace(".0", "")
    elif isinstance(value, bool):
        value = "yes" if value else "no"
    return f"[{value}]"


def _metavar(name: str, info: FieldInfo) -> str:
    if name.endswith("_bytes"):
        return "BYTES"
    if name.endswith("_s"):
        return "SECONDS"
    if name in ("adapter_sources", "base_names"):
        return "URI" if name == "adapter_sources" else "NAME"
    annotation = str(info.annotation)
    if "Path" in annotation:
        return "FILE" if name in ("config", "policy") else "DIR"
    return "N" if "int" in annotation else name.upper()


def _refuse_unknown_environment(environment: Mapping[str, str]) -> None:
    """pydantic-settings reads only the variables it knows; a misspelt one would be ignored.

    CLIENT_ENV is for the client commands, which run in the same shells.
    """
    for variable in environment:
        if variable.startswith(ENV_PREFIX) and variable != CLIENT_ENV:
            name = variable.removeprefix(ENV_PREFIX).lower()
            if name not in ServerConfig.model_fields:
                hint = _closest(name, lambda close: ENV_PREFIX + close.upper())
                raise ConfigError(f"The environment variable {variable} is not a setting. {hint}")


def _closest(name: str, spell: Callable[[str], str]) -> str:
    close = difflib.get_close_matches(name, ServerConfig.model_fields, n=1)
    return f"Did you mean {spell(close[0])}?" if close else "`lorikeet serve --help` lists all settings."


def _explain(error: ValidationError, flags: Mapping[str, object], path: object) -> str:
    """One sentence for each wrong setting: where the value came from, what was given; its help says what is allowed."""
    sentences: dict[str, str] = {}
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else ""
        if not name:
            sentences[name] = str(item["ctx"]["error"])
            continue
        if item["type"] == "extra_forbidden":
            sentences[name] = f"{name} in {path} is not a setting. {_closest(name, str)}"
            continue
        variable = ENV_PREFIX + name.upper()
        where = flag(name) if name in flags else variable if variable in os.environ else f"{name} in {path}"
        sentences[name] = f"{where} cannot be {item['input']!r}. {ServerConfig.model_fields[name].description}"
    return " ".join(sentences.values())
