"""Typed access to the raw values of an adapter_config.json, with errors that name the key. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .errors import AdapterInvalidError

MAX_RANK: Final = 2**16
MAX_LAYER: Final = 2**16
# More than any vocabulary.
MAX_TOKEN: Final = 2**24


class Fields:
    """The values of one config.

    A key that is missing or null has PEFT's default, which callers give or which is the empty value. Every method
    raises AdapterInvalidError, naming the key, for a value of another type or range.

    Args:
        raw: the JSON object.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def rank(self, key: str, default: int) -> int:
        """A rank of at least 1."""
        value = self._raw.get(key)
        return default if value is None else check_rank(key, value)

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self._raw.get(key)
        return default if value is None else check_number(key, value)

    def flag(self, key: str) -> bool:
        """A boolean; false by default."""
        value = self._raw.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self._wrong(key, "true or false")

    def text(self, key: str) -> str | None:
        """A string that is not empty, or None."""
        value = self._raw.get(key)
        if value is None or isinstance(value, str):
            return value or None
        raise self._wrong(key, "a string")

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object; empty by default."""
        value = self._raw.get(key)
        if value is None or isinstance(value, dict):
            return value or {}
        raise self._wrong(key, "an object")

    def names(self, key: str) -> Sequence[str]:
        """A list of strings; one string stands for a list of it."""
        value = self.names_or_regex(key)
        return [value] if isinstance(value, str) and value else value or []

    def names_or_regex(self, key: str) -> Sequence[str] | str | None:
        """A list of strings, or a regular expression, or None."""
        value = self._raw.get(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return value
        raise self._wrong(key, "a string or a list of strings")

    def layers(self, key: str) -> Sequence[int]:
        """Layer indexes; one stands for a list of it."""
        value = self._raw.get(key)
        layers = [] if value is None else value if isinstance(value, list) else [value]
        if all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= MAX_LAYER for v in layers):
            return layers
        raise self._wrong(key, f"layer indexes of 0 to {MAX_LAYER}")

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        """One of the strings; the first by default."""
        value = self._raw.get(key)
        if value is None:
            return allowed[0]
        if isinstance(value, str) and value in allowed:
            return value
        raise self._wrong(key, " or ".join(map(repr, allowed)))

    def tokens(self, key: str) -> Mapping[str, Sequence[int]]:
        """Token ids by module name; a list stands for those of the input embedding, which is called "" then."""
        value = self._raw.get(key)
        by_module = {} if value is None or value == [] else {"": value} if isinstance(value, list) else value
        if not isinstance(by_module, dict):
            raise self._wrong(key, "a list of token ids, or an object of such lists")
        for ids in by_module.values():
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < MAX_TOKEN for i in ids):
                raise self._wrong(key, f"token ids of 0 to {MAX_TOKEN - 1} in lists")
            if len(set(ids)) < len(ids):
                raise self._wrong(key, "token ids of which none is there twice")
        return by_module

    def _wrong(self, key: str, allowed: str) -> AdapterInvalidError:
        return AdapterInvalidError(f"{key} is {show(self._raw.get(key))}; it must be {allowed}.", {"field": key})


def check_rank(field: str, value: object) -> int:
    """The value, if it is a rank; raises AdapterInvalidError, naming the field, if not."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise AdapterInvalidError(f"{field} is {show(value)}; allowed: 1 to {MAX_RANK}.", {"field": field[:64]})
    return value


def check_number(field: str, value: object) -> float:
    """The value, if it is a finite number; raises AdapterInvalidError, naming the field, if not."""
    # Beyond 2^53 a float would not hold the integer that was given; no alpha is near that.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 2**53:
        raise AdapterInvalidError(f"{field} is {show(value)}; it must be a finite number.", {"field": field[:64]})
    return value


def show(value: object) -> str:
    """A value of a config for a message, bounded."""
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
