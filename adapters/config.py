"""adapter_config.json as PEFT writes it -> a frozen `AdapterConfig`. Imports no torch.

Every key is accounted for (see `config_fields`): nothing that would change an adapter's output is skipped in silence.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from .config_fields import BASE_CHANGING_INITS, DEFAULT_ONLY, IGNORED, PLAIN_INITS, SERVED
from .errors import AdapterIncompatibleError, AdapterInvalidError
from .patterns import PatternMap, TargetMatcher

CONFIG_FILE: Final = "adapter_config.json"
# AdaLoRA writes one line for each rank of each module; 16 MiB is far beyond the largest of those.
MAX_CONFIG_BYTES: Final = 16 * 2**20
MAX_RANK: Final = 2**16
MAX_LAYER: Final = 2**16

# PEFT's defaults, for keys that an older or hand-written config leaves out.
_DEFAULT_R: Final = 8
_DEFAULT_INIT_R: Final = 12
_DEFAULT_ALPHA: Final = 8


class Method(StrEnum):
    """`peft_type` of the adapters that are served."""

    LORA = "LORA"
    ADALORA = "ADALORA"


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What is needed to serve an adapter, validated.

    Attributes:
        method: LORA (with all its scalings) or ADALORA.
        trained_for: `base_model_name_or_path`, or None.
        rank: `r` (LoRA) or `init_r` (AdaLoRA).
        alpha: `lora_alpha`.
        use_rslora: scale by 1/sqrt(rank) instead of 1/rank; always False for AdaLoRA, which does not read it.
        ranks, alphas: `rank_pattern` and `alpha_pattern`; empty for AdaLoRA.
        kept_ranks: AdaLoRA's `rank_pattern`: module path -> rank that its allocator kept.
        targets: which modules of a base the adapter adapts.
    """

    method: Method
    trained_for: str | None
    rank: int
    alpha: float
    use_rslora: bool
    ranks: PatternMap
    alphas: PatternMap
    kept_ranks: Mapping[str, int]
    targets: TargetMatcher


def parse_config(data: bytes) -> AdapterConfig:
    """Parse the bytes of an adapter_config.json.

    Raises:
        AdapterInvalidError: not a JSON object, or a value of the wrong type or range.
        AdapterIncompatibleError: a method or setting that is not served; names the key.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterInvalidError(f"{CONFIG_FILE} has {len(data)} bytes; at most {MAX_CONFIG_BYTES} are read.")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        raise AdapterInvalidError(f"{CONFIG_FILE} is not valid JSON; is the copy complete?") from None
    if not isinstance(raw, dict):
        raise AdapterInvalidError(f"{CONFIG_FILE} holds a {type(raw).__name__}; it must hold a JSON object.")
    fields = _Fields(raw)
    method = _method(raw)
    _refuse_unserved(raw)
    _check_init(raw.get("init_lora_weights"))
    target_modules = fields.names_or_regex("target_modules")
    layers = fields.layers("layers_to_transform")
    layers_pattern = fields.names("layers_pattern")
    if isinstance(target_modules, str) and (layers or layers_pattern):
        raise AdapterInvalidError(
            "layers_to_transform and layers_pattern cannot be combined with a target_modules string (nor in PEFT).",
            {"field": "layers_to_transform"},
        )
    adalora = method is Method.ADALORA
    rank_pattern = fields.mapping("rank_pattern")
    return AdapterConfig(
        method=method,
        trained_for=fields.text("base_model_name_or_path"),
        rank=fields.rank("init_r", _DEFAULT_INIT_R) if adalora else fields.rank("r", _DEFAULT_R),
        alpha=fields.number("lora_alpha", _DEFAULT_ALPHA),
        use_rslora=fields.flag("use_rslora") and not adalora,
        ranks=PatternMap("rank_pattern", {} if adalora else _ranks(rank_pattern)),
        alphas=PatternMap("alpha_pattern", {} if adalora else _alphas(fields.mapping("alpha_pattern"))),
        kept_ranks=_kept_ranks(rank_pattern) if adalora else {},
        targets=TargetMatcher(target_modules, fields.names_or_regex("exclude_modules"), layers, layers_pattern),
    )


def _method(raw: Mapping[str, Any]) -> Method:
    given = raw.get("peft_type")
    if given is None:
        raise AdapterInvalidError(f"{CONFIG_FILE} has no peft_type; is it a PEFT adapter?", {"field": "peft_type"})
    try:
        return Method(given)
    except ValueError:
        served = ", ".join(Method)
        raise AdapterIncompatibleError(
            f"peft_type is {_show(given)}; served are {served}.", {"field": "peft_type"}
        ) from None


def _refuse_unserved(raw: Mapping[str, Any]) -> None:
    for key, value in raw.items():
        if key in SERVED or key in IGNORED or value is None:
            continue
        rule = DEFAULT_ONLY.get(key)
        if rule is None and value not in (False, "", [], {}):
            raise AdapterIncompatibleError(
                f"{CONFIG_FILE} has the key {_show(key)} = {_show(value)}, which this server does not know and does "
                "not ignore: it may change the adapter's output. Remove it if it does not.",
                {"field": key[:64]},
            )
        # `type` beside `==` because 0 == False: fan_in_fan_out = 0 is nothing PEFT writes.
        if rule is not None and not any(value == a and type(value) is type(a) for a in rule.allowed):
            raise AdapterIncompatibleError(f"{key} = {_show(value)} is not served: {rule.remedy}.", {"field": key})


def _check_init(value: object) -> None:
    about = {"field": "init_lora_weights"}
    if value is None or isinstance(value, bool):
        return
    name = value.lower() if isinstance(value, str) else ""
    if name in PLAIN_INITS:
        return
    if name.startswith(BASE_CHANGING_INITS):
        raise AdapterIncompatibleError(
            f"init_lora_weights = {_show(value)} changes the base weight before training, so these A and B do not fit "
            "the unchanged base. Save it with path_initial_model_for_weight_conversion (PEFT then writes an equivalent "
            "plain LoRA), or serve the changed base and set init_lora_weights to true.",
            about,
        )
    raise AdapterIncompatibleError(
        f"init_lora_weights = {_show(value)} is not known to leave the base unchanged.", about
    )


def _ranks(pattern: Mapping[str, Any]) -> dict[str, float]:
    return {key: _rank(f"rank_pattern[{_show(key)}]", value) for key, value in pattern.items()}


def _alphas(pattern: Mapping[str, Any]) -> dict[str, float]:
    return {key: _number(f"alpha_pattern[{_show(key)}]", value) for key, value in pattern.items()}


def _kept_ranks(pattern: Mapping[str, Any]) -> dict[str, int]:
    """AdaLoRA's rank_pattern: `<module>.lora_E` (or `<module>.lora_E.<adapter name>`) -> one boolean a rank."""
    kept: dict[str, int] = {}
    for key, mask in pattern.items():
        module = key.partition(".lora_E")[0]
        if module == key or not isinstance(mask, list) or not all(isinstance(m, bool) for m in mask):
            raise AdapterInvalidError(
                f"rank_pattern[{_show(key)}] must map `<module>.lora_E` to a list of booleans, as PEFT's AdaLoRA does.",
                {"field": "rank_pattern"},
            )
        kept[module] = sum(mask)
    return kept


def _rank(field: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise AdapterInvalidError(f"{field} is {_show(value)}; allowed: 1 to {MAX_RANK}.", {"field": field[:64]})
    return value


def _number(field: str, value: object) -> float:
    # Beyond 2^53 a float would not hold the integer that was given; no alpha is near that.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 2**53:
        raise AdapterInvalidError(f"{field} is {_show(value)}; it must be a finite number.", {"field": field[:64]})
    return value


def _show(value: object) -> str:
    """A value of a config for a message, bounded."""
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


class _Fields:
    """Typed access to the raw config."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def rank(self, key: str, default: int) -> int:
        value = self._raw.get(key)
        return default if value is None else _rank(key, value)

    def number(self, key: str, default: float) -> float:
        value = self._raw.get(key)
        return default if value is None else _number(key, value)

    def flag(self, key: str) -> bool:
        value = self._raw.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self._wrong(key, "true or false")

    def text(self, key: str) -> str | None:
        value = self._raw.get(key)
        if value is None or isinstance(value, str):
            return value or None
        raise self._wrong(key, "a string")

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self._raw.get(key)
        if value is None or isinstance(value, dict):
            return value or {}
        raise self._wrong(key, "an object")

    def names(self, key: str) -> Sequence[str]:
        value = self.names_or_regex(key)
        return [value] if isinstance(value, str) and value else value or []

    def names_or_regex(self, key: str) -> Sequence[str] | str | None:
        value = self._raw.get(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return value
        raise self._wrong(key, "a string or a list of strings")

    def layers(self, key: str) -> Sequence[int]:
        value = self._raw.get(key)
        layers = [] if value is None else value if isinstance(value, list) else [value]
        if all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= MAX_LAYER for v in layers):
            return layers
        raise self._wrong(key, f"layer indexes of 0 to {MAX_LAYER}")

    def _wrong(self, key: str, allowed: str) -> AdapterInvalidError:
        return AdapterInvalidError(f"{key} is {_show(self._raw.get(key))}; it must be {allowed}.", {"field": key})
