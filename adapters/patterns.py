"""Matching module paths against the patterns of an adapter config, exactly as PEFT does. Imports no torch.

Sources: peft 0.21.0, `utils/other.py::get_pattern_key` and `tuners/tuners_utils.py::check_target_module_exists`. What
differs: regular expressions come from a file, so they are compiled once and checked before any of them runs.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from .errors import AdapterIncompatibleError, AdapterInvalidError

MAX_PATTERN_LENGTH: Final = 4096
# Python's matcher backtracks and holds the interpreter lock meanwhile: a pattern that explodes would stop the server.
MAX_UNBOUNDED_REPEATS: Final = 12

ALL_LINEAR: Final = "all-linear"

_UNBOUNDED: Final = re.compile(r"[*+]|\{\d*,\}")


class PatternMap:
    """An ordered mapping from patterns to values, such as `rank_pattern`: the first pattern that matches decides.

    Args:
        field: config key, for messages.
        values: pattern -> value, in file order.
    """

    def __init__(self, field: str, values: Mapping[str, float]) -> None:
        self._rules = [(compile_pattern(field, rf"(.*\.)?({key})$", key), value) for key, value in values.items()]

    def get(self, module: str, default: float) -> float:
        """The value of the first pattern that matches the end of the module path, else the default."""
        for rule, value in self._rules:
            if rule.match(module):
                return value
        return default


class TargetMatcher:
    """Decides which modules of a base an adapter config targets.

    Args:
        target_modules: names or suffixes, or a regular expression, or "all-linear", or None for what the file holds.
        exclude_modules: names or suffixes, or a regular expression.
        layers: `layers_to_transform`; empty for all. It does not restrict a module that target_modules names in full.
        layers_pattern: names of module lists that count as layers; empty for any.
        whole: `modules_to_save`; what PEFT saves whole it does not adapt.

    Attributes:
        explicit: whether target_modules was given, so that a module it names must have tensors.
        all_linear: whether it is "all-linear", which leaves the output head out.
    """

    def __init__(
        self,
        target_modules: Sequence[str] | str | None,
        exclude_modules: Sequence[str] | str | None,
        layers: Sequence[int],
        layers_pattern: Sequence[str],
        whole: Sequence[str] = (),
    ) -> None:
        self.all_linear = isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR
        self._whole = tuple(whole)
        self._targets = (
            None if target_modules is None or self.all_linear else _matcher("target_modules", target_modules or ())
        )
        self.explicit = target_modules is not None
        self._full_names = () if isinstance(target_modules, str) else frozenset(target_modules or ())
        self._excludes = _matcher("exclude_modules", exclude_modules or ())
        self._layers = frozenset(layers)
        prefixes = [rf"(?:^|.*?\.){pattern}" for pattern in layers_pattern] or [r".*?\.[^.]*"]
        self._layer_rules = [
            compile_pattern("layers_pattern", rf"{prefix}\.(?P<idx>\d+)\.", shown)
            for prefix, shown in zip(prefixes, layers_pattern or ("",), strict=True)
        ]

    def __call__(self, module: str) -> bool:
        """Whether PEFT would adapt a module of this path (which is a linear, if target_modules is "all-linear")."""
        if self._excludes(module) or any(f".{name}." in f".{module}." for name in self._whole):
            return False
        if module in self._full_names:
            return True
        if self._targets is not None and not self._targets(module):
            return False
        return not self._layers or self._layer_of(module) in self._layers

    def _layer_of(self, module: str) -> int | None:
        for rule in self._layer_rules:
            if found := rule.match(module):
                return int(found["idx"])
        return None


def _matcher(field: str, names: Sequence[str] | str) -> Callable[[str], bool]:
    """Matches a module by regular expression (a string), or by full name or suffix (a list)."""
    if isinstance(names, str) and names:
        rule = compile_pattern(field, names, names)
        return lambda module: rule.fullmatch(module) is not None
    suffixes = frozenset(names)

    def is_or_ends_with_a_name(module: str) -> bool:
        parts = module.split(".")
        return any(".".join(parts[i:]) in suffixes for i in range(len(parts)))

    return is_or_ends_with_a_name


def compile_pattern(field: str, pattern: str, shown: str) -> re.Pattern[str]:
    """Compile a regular expression of an adapter config.

    Args:
        field: config key, for messages.
        pattern: what to compile.
        shown: the part of it that stands in the config.

    Raises:
        AdapterInvalidError: it is not a regular expression, or longer than MAX_PATTERN_LENGTH.
        AdapterIncompatibleError: matching it could take exponential time.
    """
    about = {"field": field}
    if len(shown) > MAX_PATTERN_LENGTH:
        raise AdapterInvalidError(
            f"{field}: a pattern has {len(shown)} characters; at most {MAX_PATTERN_LENGTH} are allowed.", about
        )
    if _may_explode(shown):
        raise AdapterIncompatibleError(
            f"{field}: the regular expression {shown[:80]!r} repeats a group that itself repeats or branches, or has "
            f"more than {MAX_UNBOUNDED_REPEATS} repeats: matching could take for ever. Name modules in a list instead.",
            about,
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        raise AdapterInvalidError(f"{field}: {shown[:80]!r} is not a regular expression.", about) from None


def _may_explode(pattern: str) -> bool:
    """Whether an unbounded repeat holds another repeat or a branch, or there are too many of them.

    One pass with a stack: for each open group, whether it contains an unbounded repeat or an alternative.
    """
    groups = [False]
    repeats = 0
    i = 0
    while i < len(pattern):
        char = pattern[i]
        if char == "\\":
            i += 2
            continue
        if char == "[":
            i = _after_class(pattern, i)
            continue
        if char == "(":
            groups.append(False)
        elif char == ")" and len(groups) > 1:
            risky = groups.pop()
            groups[-1] |= risky
            if risky and _UNBOUNDED.match(pattern, i + 1):
                return True
        elif char == "|":
            groups[-1] = True
        elif _UNBOUNDED.match(pattern, i):
            repeats += 1
            groups[-1] = True
        i += 1
    return repeats > MAX_UNBOUNDED_REPEATS


def _after_class(pattern: str, start: int) -> int:
    """Index behind the character class that opens at `start`."""
    i = start + 1
    if pattern[i : i + 1] == "^":
        i += 1
    if pattern[i : i + 1] == "]":
        i += 1
    while i < len(pattern) and pattern[i] != "]":
        i += 2 if pattern[i] == "\\" else 1
    return i + 1
