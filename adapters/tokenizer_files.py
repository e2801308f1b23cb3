"""The tokenizer that trainers save beside an adapter: which files are taken, and their bytes. Imports no torch.

TRL, Unsloth and Axolotl save one always, most often the base's. The files belong to the version: they are part of its
digest and are kept with it, so a changed chat template is a new version. What they say is found out by the server
(`server/tokenizers.py`), which parses them in a process of its own; here they are bytes.
"""

import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from .errors import AdapterIncompatibleError, AdapterInvalidError, AdapterUnreadableError
from .paths import FileStamp, file_stamp, open_contained
from .weights_file import Digest

TOKENIZER_FILE: Final = "tokenizer.json"
# Largest that is read of each, in bytes. The largest vocabularies in use have a tokenizer.json of 35 MB.
TOKENIZER_FILES: Final[Mapping[str, int]] = {
    TOKENIZER_FILE: 64 * 2**20,
    "tokenizer_config.json": 4 * 2**20,
    "special_tokens_map.json": 2**20,
    "added_tokens.json": 4 * 2**20,
    "chat_template.jinja": 2**20,
}
# What a tokenizer consists of that has no tokenizer.json ("slow").
_SLOW: Final = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What an adapter folder holds of a tokenizer.

    Attributes:
        files: name -> content, in the order of TOKENIZER_FILES; empty: it ships none that is used.
        slow: name of a file of a slow tokenizer, which is not used; empty: there is a fast one or none at all.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    slow: str = ""

    def update(self, digest: Digest) -> None:
        """Add the files to a version's digest; without any it stays what it is."""
        for name, data in self.files.items():
            digest.update(f"\n{name} {len(data)}\n".encode())
            digest.update(data)

    @property
    def warning(self) -> str | None:
        """What an operator should know, or None."""
        if not self.slow:
            return None
        return (
            f"The adapter's tokenizer is a slow one ({self.slow} without {TOKENIZER_FILE}) and is not used: the base's "
            "is. Save a fast one if they differ."
        )

    def check_vocabulary(self, vocab_size: int | None) -> None:
        """Refuse a slow tokenizer beside a vocabulary of the adapter's own: nobody would know the new tokens.

        Args:
            vocab_size: the adapter's; None: the base's.

        Raises:
            AdapterIncompatibleError: says what to save.
        """
        if self.slow and vocab_size is not None:
            raise AdapterIncompatibleError(
                f"The adapter has a vocabulary of its own ({vocab_size} tokens) and a slow tokenizer ({self.slow} "
                f"without {TOKENIZER_FILE}), which is not read. Save a fast one beside the adapter: load it with "
                "AutoTokenizer and call save_pretrained.",
                {"file": self.slow},
            )


def read_tokenizer_files(
    directory: Path, roots: Sequence[Path] = (), stamps: MutableMapping[str, FileStamp] | None = None
) -> TokenizerFiles:
    """Read what an adapter folder holds of a tokenizer.

    Args:
        directory: real path.
        roots: the files must really lie in one of them; empty when a local tool asks.
        stamps: receives the stamp of each file as it was opened.

    Raises:
        AdapterInvalidError: a file is too large, no regular file, or a link that leads out of the roots.
        AdapterUnreadableError: the disk failed.
    """
    if not _exists(directory, TOKENIZER_FILE):
        slow = next((name for name in _SLOW if _exists(directory, name)), "")
        if slow:
            return TokenizerFiles(slow=slow)
    files: dict[str, bytes] = {}
    for name, max_bytes in TOKENIZER_FILES.items():
        if not _exists(directory, name):
            continue
        with open_contained(directory, name, roots) as file:
            if stamps is not None:
                stamps[name] = file_stamp(os.fstat(file.fileno()))
            files[name] = _read(file, name, max_bytes)
    return TokenizerFiles(files)


def _exists(directory: Path, name: str) -> bool:
    return os.path.lexists(os.path.join(directory, name))


def _read(file: BinaryIO, name: str, max_bytes: int) -> bytes:
    """All of an unbuffered file, which may return less than it was asked for."""
    data = bytearray()
    try:
        while len(data) <= max_bytes and (chunk := file.read(max_bytes + 1 - len(data))):
            data += chunk
    except OSError:
        raise AdapterUnreadableError(f"{name} cannot be read.", {"file": name}) from None
    if len(data) > max_bytes:
        raise AdapterInvalidError(
            f"{name} has more than {max_bytes} bytes, which is the most that is read.", {"file": name}
        )
    return bytes(data)
