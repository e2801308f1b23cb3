"""The weights of an adapter: one safetensors file, or several with an index, as large ones are split. Imports no torch.

The index maps every tensor to its file, `adapter_model-00001-of-00003.safetensors` for example. All files are checked,
the headers against the index, and all are hashed: the index first, then the shards in their order.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from .errors import AdapterInvalidError
from .paths import FileStamp, file_stamp, open_contained
from .weights_file import (
    WEIGHTS_FILE,
    Digest,
    TensorInfo,
    WeightsHeader,
    invalid_file,
    read_header,
    read_payload,
    unreadable,
)

# As PEFT's names go, and as transformers' own save_pretrained calls it.
INDEX_FILES: Final = (f"{WEIGHTS_FILE}.index.json", "model.safetensors.index.json")
MAX_INDEX_BYTES: Final = 32 * 2**20
MAX_SHARDS: Final = 1024

_SHARD: Final = re.compile(r"adapter_model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class Shard:
    """One open weights file whose header has been checked."""

    header: WeightsHeader
    file: BinaryIO


@dataclass(frozen=True, slots=True)
class OpenWeights:
    """The open weights files of an adapter.

    Attributes:
        index: name and bytes of the index; None: there is one file only, and no index.
        shards: in their order.
        stamps: file name -> what `paths.file_stamp` said when it was opened.
    """

    index: tuple[str, bytes] | None
    shards: tuple[Shard, ...]
    stamps: Mapping[str, FileStamp]

    @property
    def headers(self) -> tuple[WeightsHeader, ...]:
        """Of all files, in their order."""
        return tuple(shard.header for shard in self.shards)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors, by name; each is in one file."""
        return {name: info for shard in self.shards for name, info in shard.header.tensors.items()}

    @property
    def payload_bytes(self) -> int:
        """Of all tensors together."""
        return sum(shard.header.payload_bytes for shard in self.shards)

    def read(self, digest: Digest) -> list[memoryview]:
        """The payload of each shard; every byte of every file goes to the digest.

        Raises:
            AdapterInvalidError, AdapterUnreadableError: as `weights_file.read_payload`.
        """
        if self.index is not None:
            digest.update(self.index[1])
        return [read_payload(shard.file, shard.header, digest) for shard in self.shards]

    def contents(self, payloads: Sequence[memoryview]) -> dict[str, tuple[bytes | memoryview, ...]]:
        """File name -> its bytes, in pieces, as they were hashed."""
        files: dict[str, tuple[bytes | memoryview, ...]] = {}
        if self.index is not None:
            files[self.index[0]] = (self.index[1],)
        for shard, payload in zip(self.shards, payloads, strict=True):
            files[shard.header.file_name] = (shard.header.raw, payload)
        return files


@contextlib.contextmanager
def open_weights(directory: Path, roots: Sequence[Path] = ()) -> Iterator[OpenWeights]:
    """Open the weights of an adapter directory and check the headers; a single file goes before an index.

    Raises:
        AdapterInvalidError: a file is missing (a folder that has only a pickle is refused by its name), truncated,
            malformed, or does not fit the index.
        AdapterIncompatibleError: a tensor of a type that is not served.
    """
    with contextlib.ExitStack() as stack:
        index_name = next((name for name in INDEX_FILES if (directory / name).exists()), None)
        if index_name is None or os.path.lexists(directory / WEIGHTS_FILE):
            _refuse_pickle(directory)
            file = stack.enter_context(open_contained(directory, WEIGHTS_FILE, roots))
            stamps = {WEIGHTS_FILE: file_stamp(os.fstat(file.fileno()))}
            yield OpenWeights(None, (Shard(read_header(file), file),), stamps)
            return
        file = stack.enter_context(open_contained(directory, index_name, roots))
        stamps = {index_name: file_stamp(os.fstat(file.fileno()))}
        index = _read_index(file, index_name)
        by_shard = parse_index(index, index_name)
        shards: list[Shard] = []
        for name, tensors in by_shard.items():
            file = stack.enter_context(open_contained(directory, name, roots))
            stamps[name] = file_stamp(os.fstat(file.fileno()))
            header = read_header(file, name)
            if header.tensors.keys() != tensors:
                odd = min(header.tensors.keys() ^ tensors)
                where = "is in it, but the index does not say so" if odd in header.tensors else "is not in it"
                raise invalid_file(name, f"does not fit {index_name}: tensor {odd[:256]!r} {where}")
            shards.append(Shard(header, file))
        yield OpenWeights((index_name, index), tuple(shards), stamps)


def weights_names(directory: Path) -> list[str]:
    """The names that weights may have in a directory, whether the files are there or not. Opens nothing."""
    try:
        names = os.listdir(directory)
    except OSError:
        names = []
    return [WEIGHTS_FILE, *INDEX_FILES, *sorted(name for name in names if _SHARD.fullmatch(name))]


def _refuse_pickle(directory: Path) -> None:
    if (directory / WEIGHTS_FILE).is_file():
        return
    pickle = next((name for name in sorted(_names(directory)) if name.endswith(_PICKLES)), None)
    if pickle is not None:
        raise AdapterInvalidError(
            f"{WEIGHTS_FILE} is missing, and {pickle[:128]!r} is a pickle, which is never opened: it can run code. "
            "Save the adapter with safe_serialization=True (PEFT's default).",
            {"file": pickle[:128]},
        )


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        raise AdapterInvalidError("The adapter folder cannot be read.") from None


def _read_index(file: BinaryIO, index_name: str) -> bytes:
    try:
        data = file.read(MAX_INDEX_BYTES + 1)
    except OSError:
        raise unreadable(index_name) from None
    if len(data) > MAX_INDEX_BYTES:
        raise invalid_file(index_name, f"has more than {MAX_INDEX_BYTES} bytes")
    return data


def parse_index(data: bytes, index_name: str) -> dict[str, set[str]]:
    """Shard -> names of its tensors, shards in their order; all that the names count are there.

    Raises:
        AdapterInvalidError: malformed, or other names than shards have.
    """
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        raise invalid_file(index_name, "is not valid JSON; is the copy complete?") from None
    places = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise invalid_file(index_name, "must map tensors to files in `weight_map`")
    by_shard: dict[str, set[str]] = {}
    for tensor, name in sorted(places.items(), key=lambda item: item[1]):
        by_shard.setdefault(name, set()).add(tensor)
    found = [_SHARD.fullmatch(name) for name in by_shard]
    numbers = [(int(match["number"]), int(match["count"])) for match in found if match is not None]
    count = numbers[0][1] if numbers else 0
    if count > MAX_SHARDS or numbers != [(i + 1, count) for i in range(count)] or len(numbers) < len(found):
        raise invalid_file(
            index_name,
            f"must name all of the files adapter_model-00001-of-0000n.safetensors, at most {MAX_SHARDS}; it names "
            + ", ".join(repr(name[:64]) for name in list(by_shard)[:4]),
        )
    return by_shard
