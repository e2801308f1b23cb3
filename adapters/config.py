"""adapter_config.json as PEFT writes it -> a frozen `AdapterConfig`. Imports no torch.

Every key is accounted for (see `config_fields`): nothing that would change an adapter's output is skipped in silence.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from .config_fields import DEFAULT_ONLY, IGNORED, SERVED
from .config_values import Fields, check_number, check_rank, show
from .errors import AdapterIncompatibleError, AdapterInvalidError
from .formats import FORMATS, Status, find_format
from .patterns import PatternMap, TargetMatcher

CONFIG_FILE: Final = "adapter_config.json"
# AdaLoRA writes one line for each rank of each module; 16 MiB is far beyond the largest of those.
MAX_CONFIG_BYTES: Final = 16 * 2**20
# Key of the token ids that hold for every module with token rows.
ANY_MODULE: Final = "*"

# PEFT's defaults, for keys that an older or hand-written config leaves out.
_DEFAULT_R: Final = 8
_DEFAULT_INIT_R: Final = 12
_DEFAULT_ALPHA: Final = 8


class Method(StrEnum):
    """`peft_type` of the adapters that are served."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    LN_TUNING = "LN_TUNING"


class Biases(StrEnum):
    """`bias`: which biases of the base the adapter has its own of."""

    NONE = "none"
    ALL = "all"
    LORA_ONLY = "lora_only"


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What is needed to serve an adapter, validated.

    Attributes:
        method: its `peft_type`.
        trained_for: `base_model_name_or_path`, or None.
        rank: `r` (LoRA) or `init_r` (AdaLoRA).
        alpha: `lora_alpha`.
        use_rslora: scale by 1/sqrt(rank) instead of 1/rank; always False for AdaLoRA, which does not read it.
        use_dora: every linear has a magnitude vector beside A and B.
        biases: which biases the file may hold.
        lora_bias: lora_B has a bias.
        ranks, alphas: `rank_pattern` and `alpha_pattern`; empty for AdaLoRA.
        kept_ranks: AdaLoRA's `rank_pattern`: module path -> rank that its allocator kept.
        targets: which modules of a base the adapter adapts.
        modules_to_save: ends of the paths of modules that have weights of their own.
        token_ids: end of a module path -> tokens whose rows were trained, in the file's order; "" means the input
            embedding, ANY_MODULE every module.
        ties_weights: `ensure_weight_tying`: what adapts the embedding of a tied base adapts its head, too.
    """

    method: Method
    trained_for: str | None
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    biases: Biases
    lora_bias: bool
    ranks: PatternMap
    alphas: PatternMap
    kept_ranks: Mapping[str, int]
    targets: TargetMatcher
    modules_to_save: tuple[str, ...]
    token_ids: Mapping[str, Sequence[int]]
    ties_weights: bool

    def has_whole(self, module: str) -> bool:
        """Whether the adapter has all weights of this module of its own (PEFT compares the ends of paths)."""
        if self.method is Method.LN_TUNING and self.targets(module):
            return True
        parts = module.split(".")
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(path.endswith(name) for name in self.modules_to_save for path in paths)


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
    fields = Fields(raw)
    method = _method(raw)
    _refuse_unserved(raw)
    _check_init(raw.get("init_lora_weights"))
    adalora = method is Method.ADALORA
    rank_pattern = fields.mapping("rank_pattern")
    use_dora, lora_bias = fields.flag("use_dora"), fields.flag("lora_bias")
    if use_dora and (lora_bias or adalora):
        other = "lora_bias" if lora_bias else f"peft_type {method}"
        raise AdapterIncompatibleError(
            f"use_dora cannot be combined with {other} (nor in PEFT): train with one of them.", {"field": "use_dora"}
        )
    saved = tuple(fields.names("modules_to_save"))
    if "" in saved:
        raise AdapterInvalidError("modules_to_save holds an empty name.", {"field": "modules_to_save"})
    return AdapterConfig(
        method=method,
        trained_for=fields.text("base_model_name_or_path"),
        rank=fields.rank("init_r", _DEFAULT_INIT_R) if adalora else fields.rank("r", _DEFAULT_R),
        alpha=fields.number("lora_alpha", _DEFAULT_ALPHA),
        use_rslora=fields.flag("use_rslora") and not adalora,
        use_dora=use_dora,
        biases=Biases(fields.choice("bias", list(Biases))),
        lora_bias=lora_bias,
        ranks=PatternMap("rank_pattern", {} if adalora else _ranks(rank_pattern)),
        alphas=PatternMap("alpha_pattern", {} if adalora else _alphas(fields.mapping("alpha_pattern"))),
        kept_ranks=_kept_ranks(rank_pattern) if adalora else {},
        targets=_targets(fields, saved),
        modules_to_save=saved,
        token_ids=_token_ids(fields, method),
        ties_weights=fields.flag("ensure_weight_tying"),
    )


def _targets(fields: Fields, saved: Sequence[str]) -> TargetMatcher:
    target_modules = fields.names_or_regex("target_modules")
    layers = fields.layers("layers_to_transform")
    layers_pattern = fields.names("layers_pattern")
    if isinstance(target_modules, str) and (layers or layers_pattern):
        raise AdapterInvalidError(
            "layers_to_transform and layers_pattern cannot be combined with a target_modules string (nor in PEFT).",
            {"field": "layers_to_transform"},
        )
    return TargetMatcher(target_modules, fields.names_or_regex("exclude_modules"), layers, layers_pattern, saved)


def _token_ids(fields: Fields, method: Method) -> Mapping[str, Sequence[int]]:
    """Of LoRA's trainable_token_indices or of trainable tokens' token_indices."""
    ids = fields.tokens("token_indices").get("", ())
    if not ids:
        return fields.tokens("trainable_token_indices")
    if method is not Method.TRAINABLE_TOKENS:
        raise AdapterIncompatibleError(
            f"token_indices belongs to peft_type TRAINABLE_TOKENS; {method} has trainable_token_indices.",
            {"field": "token_indices"},
        )
    return {ANY_MODULE: ids}


def _method(raw: Mapping[str, Any]) -> Method:
    given = raw.get("peft_type")
    about = {"field": "peft_type"}
    if given is None:
        raise AdapterInvalidError(f"{CONFIG_FILE} has no peft_type; is it a PEFT adapter?", about)
    try:
        return Method(given)
    except ValueError:
        known = find_format("peft_type", given) if isinstance(given, str) else None
        why = f" {known.name} is refused because {known.text}." if known is not None else ""
        raise AdapterIncompatibleError(
            f"peft_type is {show(given)}; served are {', '.join(Method)}.{why}", about
        ) from None


def _refuse_unserved(raw: Mapping[str, Any]) -> None:
    for key, value in raw.items():
        if key in SERVED or key in IGNORED or value is None:
            continue
        allowed = DEFAULT_ONLY.get(key)
        if allowed is None and value not in (False, "", [], {}):
            raise AdapterIncompatibleError(
                f"{CONFIG_FILE} has the key {show(key)} = {show(value)}, which this server does not know and does "
                "not ignore: it may change the adapter's output. Remove it if it does not.",
                {"field": key[:64]},
            )
        # `type` beside `==` because 0 == False: use_qalora = 0 is nothing PEFT writes.
        if allowed is not None and not any(value == a and type(value) is type(a) for a in allowed):
            rule = find_format(key)
            assert rule is not None, "the list of formats has every such key"
            raise AdapterIncompatibleError(f"{key} = {show(value)} is not served: {rule.text}.", {"field": key})


def _check_init(value: object) -> None:
    about = {"field": "init_lora_weights"}
    if value is None or isinstance(value, bool):
        return
    name = value.lower() if isinstance(value, str) else ""
    for known in FORMATS:
        # `pissa_niter_16` is one of PiSSA's.
        if known.field != "init_lora_weights" or not name.startswith(known.value):
            continue
        if known.status is Status.SERVED:
            if name == known.value:
                return
            continue
        raise AdapterIncompatibleError(
            f"init_lora_weights = {show(value)} ({known.name}) is not served as it is: {known.text}.", about
        )
    raise AdapterIncompatibleError(
        f"init_lora_weights = {show(value)} is not known to leave the base unchanged.", about
    )


def _ranks(pattern: Mapping[str, Any]) -> dict[str, float]:
    return {key: check_rank(f"rank_pattern[{show(key)}]", value) for key, value in pattern.items()}


def _alphas(pattern: Mapping[str, Any]) -> dict[str, float]:
    return {key: check_number(f"alpha_pattern[{show(key)}]", value) for key, value in pattern.items()}


def _kept_ranks(pattern: Mapping[str, Any]) -> dict[str, int]:
    """AdaLoRA's rank_pattern: `<module>.lora_E` (or `<module>.lora_E.<adapter name>`) -> one boolean a rank."""
    kept: dict[str, int] = {}
    for key, mask in pattern.items():
        module = key.partition(".lora_E")[0]
        if module == key or not isinstance(mask, list) or not all(isinstance(m, bool) for m in mask):
            raise AdapterInvalidError(
                f"rank_pattern[{show(key)}] must map `<module>.lora_E` to a list of booleans, as PEFT's AdaLoRA does.",
                {"field": "rank_pattern"},
            )
        kept[module] = sum(mask)
    return kept
