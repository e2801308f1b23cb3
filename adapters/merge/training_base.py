"""Which weights an adapter was trained on, as far as its files say: the NF4 values (QLoRA) or 16 bit.

PEFT's config does not say it. What does: the name of a quantized copy in `base_model_name_or_path`, and the model card,
into which PEFT and trainers write the quantization settings. Imports no torch.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from ..card import read_card
from .targets import Onto

_QUANTIZED_NAME: Final = re.compile(r"(?i)[-_./](bnb|nf4|4bit|int4)(?![a-z0-9])")
_SETTING: Final = re.compile(r"(?i)load_in_4bit[\s`*\"']*[:=|][\s`*\"']*(?P<value>true|false)")
# A line on the base of the training, whatever else the card says of bases that the adapter was measured on.
_BASE_LINE: Final = re.compile(r"(?im)^.*\bbase\b.*\btrain.*$")
_SIXTEEN: Final = re.compile(r"(?i)\b16[- ]bit\b")
_ORIGINAL: Final = ("load_in_4bit: false", "base while training: 16 bit")
_WORD: Final = re.compile(r"\b(?:QLoRA|NF4)\b")


class Choice(NamedTuple):
    """What a merge adds to by default, and why; the reason is a clause for people."""

    onto: Onto
    reason: str


def default_onto(adapters: Sequence[tuple[str, str | None, Path]], *, has_original: bool) -> Choice:
    """What to merge onto when nobody says.

    Args:
        adapters: (name for people, base that its config names, directory) of each.
        has_original: the base's 16-bit weights are there.

    Returns:
        NF4 unless every adapter's files say that it was trained on 16 bit: a server holds these values, so the merged
        model then answers as the unmerged adapter does.
    """
    if not has_original:
        return Choice(Onto.NF4, "the base is an NF4 checkpoint")
    found = [_training_base(*adapter) for adapter in adapters]
    nf4 = next((choice for choice in found if choice is not None and choice.onto is Onto.NF4), None)
    if nf4 is not None:
        return nf4
    originals = [choice for choice in found if choice is not None]
    if originals and len(originals) == len(found):
        return originals[0]
    unknown = next(name for (name, _, _), choice in zip(adapters, found, strict=True) if choice is None)
    return Choice(
        Onto.NF4, f"the files of {unknown} do not say what it was trained on, and NF4 is what a server answers with"
    )


def said_in_card(card: str) -> str:
    """What an adapter's card says of the weights that it was trained on, in the words that are looked for, or nothing.

    A card of these words alone says the same.
    """
    settings = {match["value"].lower() for match in _SETTING.finditer(card)}
    if settings:
        return _ORIGINAL[0] if settings == {"false"} else "load_in_4bit: true"
    lines = "\n".join(_BASE_LINE.findall(card))
    if _SIXTEEN.search(lines) and not _WORD.search(lines):
        return _ORIGINAL[1]
    word = _WORD.search(card)
    return "" if word is None else word[0]


def _training_base(name: str, trained_for: str | None, directory: Path) -> Choice | None:
    if trained_for and _QUANTIZED_NAME.search(trained_for):
        return Choice(Onto.NF4, f"{name} was trained on {trained_for.rstrip('/').rpartition('/')[2]}, a 4-bit copy")
    said = said_in_card(read_card(directory).text)
    if not said:
        return None
    return Choice(Onto.ORIGINAL if said in _ORIGINAL else Onto.NF4, f"the card of {name} says {said}")
