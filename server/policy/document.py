"""The policy file: its keys, their ranges, and what is wrong with one in the operator's words.

    [clients.alice]              # who names itself `alice` in the metadata of a call
    use = ["support-*", "prod"]  # ids and aliases, as a request names them, without `@digest`
    manage = ["support-*"]       # load, unload, pin, roll back; point aliases at

    [clients."*"]                # everyone else, and calls that name nobody
    use = ["@base"]              # the base model; no other pattern but `*` matches it

    [adapters."support-*"]       # ids, not aliases; what is not set here is taken from [default]
    weight = 2.0
    max_running = 8
    max_waiting = 64
    tokens_per_minute = 60000

    [default]                    # adapters that no pattern matches, and keys that theirs do not set
    max_waiting = 256

Without any [clients] every client may do everything; with some, a client that none matches may do nothing. Exactly one
entry holds for a client or an adapter: `patterns.py` says which.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..errors import ConfigError

BASE: Final = "@base"  # no adapter or alias can be called so
UNLIMITED: Final = "unlimited"

_ADAPTER_PATTERN: Final = re.compile(r"@base|[A-Za-z0-9._*-]{1,128}")
_CLIENT_PATTERN: Final = re.compile(r"[ -~]{1,128}")


def _check_adapter_pattern(pattern: str) -> str:
    if not _ADAPTER_PATTERN.fullmatch(pattern):
        raise ValueError("adapter pattern")
    return pattern


def _check_client_pattern(pattern: str) -> str:
    if not _CLIENT_PATTERN.fullmatch(pattern):
        raise ValueError("client pattern")
    return pattern


AdapterPattern = Annotated[str, AfterValidator(_check_adapter_pattern)]
ClientPattern = Annotated[str, AfterValidator(_check_client_pattern)]
Cap = Annotated[int, Field(ge=1)] | Literal["unlimited"] | None

_PATTERNS = (
    "a list of adapter ids and aliases, where * stands for any characters and @base for the base model, such as "
    '["support-*", "prod"]'
)
_CAP = 'a whole number, 1 or more, or "unlimited"'


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ClientRules(_Table):
    """What one client, or those that a pattern matches, may do."""

    use: list[AdapterPattern] = Field(default=[], description=_PATTERNS)
    manage: list[AdapterPattern] = Field(default=[], description=_PATTERNS)


class LimitRules(_Table):
    """Limits of one adapter, or of those that a pattern matches. None: not set."""

    weight: float | None = Field(default=None, ge=0.001, le=1000, description="a number, 0.001 to 1000")
    max_running: Cap = Field(default=None, description=_CAP)
    max_waiting: Cap = Field(default=None, description=_CAP)
    tokens_per_minute: Cap = Field(default=None, description=_CAP)


class PolicyDocument(_Table):
    """The whole file. `clients` is None when the file has none."""

    clients: dict[ClientPattern, ClientRules] | None = Field(default=None, description="tables such as [clients.alice]")
    adapters: dict[AdapterPattern, LimitRules] = Field(default={}, description='tables such as [adapters."support-*"]')
    default: LimitRules = Field(default=LimitRules(), description="a table, [default]")


def read_document(path: Path) -> PolicyDocument:
    """Read a policy file.

    Raises:
        ConfigError: it cannot be read, or a key is unknown or out of range, by name.
    """
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
        return PolicyDocument.model_validate(content)
    except OSError as error:
        raise ConfigError(f"The policy file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The policy file {path} is not TOML: {error}.") from error
    except ValidationError as error:
        raise ConfigError(f"The policy file {path} is wrong. {_explain(error)}") from error


# The tables of the file, and how many keys lead to one.
_TABLES: Final[dict[str, tuple[type[_Table], int]]] = {
    "clients": (ClientRules, 2),
    "adapters": (LimitRules, 2),
    "default": (LimitRules, 1),
}
_NAMES: Final = {
    "clients": "1 to 128 printable ASCII characters, where * stands for any",
    "adapters": "1 to 128 letters, digits, dots, dashes, underscores, and * for any of these; or @base",
}


def _explain(error: ValidationError) -> str:
    """One sentence for each wrong key: what was given, what is allowed."""
    sentences: dict[str, str] = {}
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        table, depth = _TABLES.get(location[0], (PolicyDocument, 0))
        if len(location) <= depth:
            table = PolicyDocument  # what leads to the table is wrong already
        # What comes after a table's own key is pydantic's: an index, or which type of several was tried.
        path = location[: depth + 1]
        if path[-1] == "[key]":
            path.pop()
            what, allowed = "be called so", _NAMES[path[0]]
        else:
            field = table.model_fields.get(path[-1])
            given = "a table" if isinstance(item["input"], Mapping) else repr(item["input"])[:80]
            what, allowed = f"be {given}", (field.description if field is not None else None) or "a table"
        key = ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"' for part in path)
        if item["type"] == "extra_forbidden":
            sentence = f"{key} is not a key; allowed there: {', '.join(table.model_fields)}."
        else:
            sentence = f"{key} cannot {what}; allowed: {allowed}."
        sentences.setdefault(key, sentence)
    return " ".join(sentences.values())
