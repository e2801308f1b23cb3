"""The text that an adapter's folder may carry of what the adapter learnt, to calibrate merged 4-bit models with.

`calibration.txt`, UTF-8. It changes no answer, so it is no part of a version's digest, and one that cannot be used does
not keep its adapter from being served. Imports no torch.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from .errors import AdapterInvalidError
from .paths import open_contained

CARRIED_FILE: Final = "calibration.txt"
# Largest that is kept with a version. A calibration takes some 100 kB of it.
MAX_CARRIED_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class CarriedText:
    """What was found.

    Attributes:
        data: UTF-8; empty: there is none that can be used.
        warning: why there is none, though there is a file, or None.
    """

    data: bytes = b""
    warning: str | None = None


def read_carried(directory: Path, roots: Sequence[Path] = ()) -> CarriedText:
    """Read the text of an adapter directory; one without the file has an empty one.

    Args:
        directory: real path.
        roots: the file must really lie in one of them; empty when a local tool asks.
    """
    if not os.path.lexists(directory / CARRIED_FILE):
        return CarriedText()
    try:
        with open_contained(directory, CARRIED_FILE, roots) as file:
            data = _read(file)
        if len(data) > MAX_CARRIED_BYTES:
            return _unusable(f"has more than {MAX_CARRIED_BYTES} bytes")
        data.decode()
    except AdapterInvalidError as error:
        return CarriedText(warning=error.message)
    except UnicodeDecodeError:
        return _unusable("is not UTF-8 text")
    except OSError:
        return _unusable("cannot be read")
    return CarriedText(data)


def _read(file: BinaryIO) -> bytes:
    """As much as may be, and a byte more; an unbuffered file may return less than it was asked for."""
    data = b""
    while len(data) <= MAX_CARRIED_BYTES and (chunk := file.read(MAX_CARRIED_BYTES + 1 - len(data))):
        data += chunk
    return data


def _unusable(what: str) -> CarriedText:
    return CarriedText(warning=f"{CARRIED_FILE} {what}, so merges on this server need a calibration text given.")
