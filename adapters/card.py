"""The model card of an adapter, README.md: what its YAML front matter says of the base, and its text. Imports no torch.

    ---
    base_model: HuggingFaceTB/SmolLM2-135M-Instruct
    base_model_sha256: 0123…cdef      # what `lorikeet adapters inspect --base DIR` prints
    ---

One key is read, `base_model_sha256`: 64 hex digits on the key's own line, with or without quotes. This is not a YAML
parser, and needs none: in a block mapping only top-level keys start a line in the first column. So there are no
references to expand, and a hash that happens to look like a number is not taken for one. A card is a description that
people edit: a malformed one is reported, and does not keep its adapter from being served.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Final

from .errors import AdapterInvalidError
from .paths import open_contained

CARD_FILE: Final = "README.md"
HASH_KEY: Final = "base_model_sha256"
# Most of a card that is read.
MAX_CARD_BYTES: Final = 256 * 2**10

_KEY: Final = re.compile(rf"""["']?{HASH_KEY}["']?[ \t]*:(?P<value>.*)""")
_VALUE: Final = re.compile(r"""(?P<quote>["']?)(?P<digits>[0-9A-Fa-f]{64})(?P=quote)(?:[ \t]+#.*)?""")


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """What was found.

    Attributes:
        base_model_sha256: hash of the base that it was trained on, 64 lower-case hex digits; None: it names none.
        warning: why the card could not be read, or None.
        text: the card, for what people say in it in words.
    """

    base_model_sha256: str | None = None
    warning: str | None = None
    text: str = field(default="", compare=False, repr=False)


def read_card(directory: Path, roots: Sequence[Path] = ()) -> AdapterCard:
    """Read the card of an adapter directory; one without README.md has an empty card.

    Args:
        directory: real path.
        roots: the card must really lie in one of them; empty when a local tool asks.
    """
    try:
        if not (directory / CARD_FILE).is_file():
            return AdapterCard()
        with open_contained(directory, CARD_FILE, roots) as file:
            data = _read(file)
    except AdapterInvalidError as error:
        return AdapterCard(warning=error.message)
    except OSError:
        return _malformed("cannot be read")
    return replace(parse_card(data), text=data.decode(errors="replace"))


def parse_card(data: bytes) -> AdapterCard:
    """What the front matter says that the first bytes of a README.md begin with."""
    lines = data[:MAX_CARD_BYTES].removeprefix(b"\xef\xbb\xbf").splitlines()
    if not lines or lines[0].rstrip() != b"---":
        return AdapterCard()
    end = next((i for i, line in enumerate(lines) if i and line.rstrip() in (b"---", b"...")), None)
    if end is None:
        return _malformed(f"has front matter that does not end within {MAX_CARD_BYTES} bytes")
    try:
        text = [line.decode() for line in lines[1:end]]
    except UnicodeDecodeError:
        return _malformed("has front matter that is not UTF-8")
    given = [key["value"].strip() for line in text if (key := _KEY.fullmatch(line))]
    if not given or given == [""]:
        return AdapterCard()
    value = _VALUE.fullmatch(given[0])
    if len(given) > 1 or value is None:
        found = "more than once" if len(given) > 1 else f"as {given[0][:100]!r}"
        return _malformed(f"gives {HASH_KEY} {found}; it must be 64 hex digits")
    return AdapterCard(value["digits"].lower())


def _read(file: BinaryIO) -> bytes:
    """As much as is looked at; an unbuffered file may return less than it was asked for."""
    data = b""
    while len(data) < MAX_CARD_BYTES and (chunk := file.read(MAX_CARD_BYTES - len(data))):
        data += chunk
    return data


def _malformed(what: str) -> AdapterCard:
    return AdapterCard(warning=f"{CARD_FILE} {what}, so the base's hash was not compared.")
