"""The name of a tensor in an adapter file -> the module it belongs to and what it is of it. Imports no torch.

Names come with and without PEFT's wrapper `base_model.model.`, with `_orig_mod.` where a compiled model was saved, and
with the adapter's own name (`default`, as a rule) in files that were not saved through PEFT's save_pretrained.
"""

import re
from enum import StrEnum
from typing import Final, NamedTuple

from .errors import AdapterIncompatibleError, ServingError

_WRAPPER: Final = "base_model.model."
_COMPILED: Final = "_orig_mod."
# What follows may be the adapter's name, and `.weight` or `.bias`; AdaLoRA's and an embedding's have neither.
_LORA: Final = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(?:[ABE]|embedding_[AB]|magnitude_vector))(?:\.(?!weight$|bias$)[^.]+)?"
    r"(?:\.(?P<what>weight|bias))?"
)
_TOKENS: Final = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")
_WHOLE: Final = re.compile(
    r"(?P<module>.+?)(?:\.(?P<wrap>(?:token_adapter\.)?base_layer|original_module|ln_tuning_layers|modules_to_save)"
    r"(?:\.(?!weight$|bias$)[^.]+)?)?\.(?P<what>weight|bias)"
)


class Part(StrEnum):
    """What a tensor is of its module.

    COPIED: the same as WEIGHT or BIAS once more; PEFT writes both when it saves resized embeddings that are in
    modules_to_save. BASE_WEIGHT: the weight under an adapter, which PEFT saves of embeddings. ORIGINAL: the weight that
    modules_to_save replaced.
    """

    A = "lora_A"
    B = "lora_B"
    E = "lora_E"
    B_BIAS = "lora_B.bias"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    TOKENS = "trainable_tokens_delta"
    WEIGHT = "weight"
    BIAS = "bias"
    BASE_WEIGHT = "base_layer.weight"
    COPIED_WEIGHT = "modules_to_save.weight"
    COPIED_BIAS = "modules_to_save.bias"
    ORIGINAL_WEIGHT = "original_module.weight"
    ORIGINAL_BIAS = "original_module.bias"


class TensorKey(NamedTuple):
    """A parsed name."""

    module: str
    part: Part


def parse_name(name: str) -> TensorKey:
    """The module (as the base calls it) and the part that a tensor's name means.

    Raises:
        AdapterIncompatibleError: the name is none that PEFT writes for a format that is served.
    """
    short = name.replace(_COMPILED, "").removeprefix(_WRAPPER)
    if (lora := _LORA.fullmatch(short)) is not None:
        part = Part(lora["part"])
        if lora["what"] != "bias":
            return TensorKey(lora["module"], part)
        if part is Part.B:
            return TensorKey(lora["module"], Part.B_BIAS)
    elif (tokens := _TOKENS.fullmatch(short)) is not None:
        return TensorKey(tokens["module"], Part.TOKENS)
    elif (whole := _WHOLE.fullmatch(short)) is not None:
        return TensorKey(whole["module"], _whole_part(whole["wrap"] or "", whole["what"]))
    if "prompt_embeddings" in name:
        raise refuse(name, "it is a soft prompt, which is not served")
    raise refuse(name, "it is no tensor of a format that is served")


def _whole_part(wrap: str, what: str) -> Part:
    if wrap in ("modules_to_save", "original_module"):
        return Part(f"{wrap}.{what}")
    if wrap.endswith("base_layer") and what == "weight":
        return Part.BASE_WEIGHT
    return Part(what)


def refuse(name: str, why: str) -> ServingError:
    """The error of a tensor that cannot be served, and why."""
    return AdapterIncompatibleError(f"Tensor {name[:256]!r} cannot be applied: {why.removesuffix('.')}.", about(name))


def about(name: str) -> dict[str, str]:
    """Metadata of an error about a tensor."""
    return {"tensor": name[:256]}
