"""The safetensors container: header first, checked against the file's size, then the payload. Imports no torch.

Format: 8 bytes little-endian header length, a JSON header name -> (dtype, shape, data_offsets), then the tensors' bytes
without holes (github.com/huggingface/safetensors). It is parsed here rather than by the library because the library
maps the file: another process that truncates or rewrites a mapped file kills the server or changes weights that were
already checked. Here the bytes that are hashed are the bytes that are served.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import BinaryIO, Final, NamedTuple, Protocol, TypeGuard

import numpy as np

from .errors import AdapterIncompatibleError, AdapterInvalidError, AdapterUnreadableError
from .memo import Memo
from .priority import give_way

WEIGHTS_FILE: Final = "adapter_model.safetensors"
MAX_HEADER_BYTES: Final = 32 * 2**20
READ_BYTES: Final = 512 * 2**10  # read and hashed without giving way: some 300 us
# Headers up to this size, of some 900 tensors, are parsed once for all files that have the same; and so many are kept.
MAX_SHARED_BYTES: Final = 128 * 2**10
NUM_SHARED: Final = 32

_ITEM_BYTES: Final = {"F16": 2, "BF16": 2, "F32": 4}
# Beginnings of files that are often found under a weights file's name.
_IMPOSTORS: Final = (
    (b"PK\x03\x04", "is a pickled torch checkpoint (a zip file)"),
    (b"\x80", "is a pickle"),
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself; run `git lfs pull`"),
)


class Digest(Protocol):
    """What hashlib's objects can do, as far as it is used here."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Add data."""

    def hexdigest(self) -> str:
        """The digest of all data so far."""


def new_digest() -> Digest:
    """The hash that identifies adapter versions."""
    return hashlib.sha256()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the header.

    Attributes:
        name: key in the file.
        dtype: F16, BF16 or F32.
        shape: sizes.
        start, stop: its bytes in the payload, [start, stop).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Run(NamedTuple):
    """Neighbouring tensors of one type, none of them empty: the bytes [start, stop) of the payload."""

    dtype: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class WeightsHeader:
    """The checked header. One object stands for the equal headers of many files, as long as it is remembered.

    Attributes:
        file_name: for messages.
        tensors: by name; read-only.
        runs: from the first byte of the payload to the last.
        raw: the bytes before the payload.
        payload_bytes: length of the rest of the file.
    """

    file_name: str
    tensors: Mapping[str, TensorInfo]
    runs: tuple[Run, ...]
    raw: bytes
    payload_bytes: int


_shared_headers: Final[Memo[tuple[str, bytes], WeightsHeader]] = Memo(NUM_SHARED)


def read_header(file: BinaryIO, name: str = WEIGHTS_FILE) -> WeightsHeader:
    """Read and check the header of an open file; nothing else is read.

    Args:
        file: at its beginning.
        name: for messages.

    Raises:
        AdapterInvalidError: not a safetensors file, or truncated or half-copied.
        AdapterIncompatibleError: a tensor of another type than F16, BF16 or F32.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = _read_exactly(file, name, min(8, size))
    length = int.from_bytes(prefix, "little") if len(prefix) == 8 else 0
    if length < 2 or length > MAX_HEADER_BYTES:
        start = prefix + _read_exactly(file, name, min(24, size - len(prefix)))
        what = next((text for magic, text in _IMPOSTORS if start.startswith(magic)), "is not a safetensors file")
        raise invalid_file(name, f"{what} (it has {size} bytes)")
    if 8 + length > size:
        raise invalid_file(name, f"ends inside its header ({size} bytes); is the copy complete?")
    raw = prefix + _read_exactly(file, name, length)
    if len(raw) <= MAX_SHARED_BYTES:
        header = _shared_headers.get((name, raw), lambda: _parse_header(name, raw))
    else:
        header = _parse_header(name, raw)
    announced = len(raw) + header.payload_bytes
    if announced != size:
        raise invalid_file(name, f"has {size} bytes but its header announces {announced}; is the copy complete?")
    return header


def read_payload(file: BinaryIO, header: WeightsHeader, digest: Digest) -> memoryview:
    """Read the rest of the file, feeding the whole file to the digest; writable bytes.

    The interpreter lock is free all the while. That is why this is no bytearray: making one of 100 MB fills it with
    zeros, which holds the lock, and so the step thread, for 60 to 80 ms (AMD EPYC, Zen 3; 2026-11-22).
    """
    digest.update(header.raw)
    payload = np.empty(header.payload_bytes, np.uint8).data
    for start in range(0, len(payload), READ_BYTES):
        chunk = payload[start : start + READ_BYTES]
        filled = 0
        while filled < len(chunk):
            count = _read_into(file, header.file_name, chunk[filled:])
            if not count:
                raise invalid_file(header.file_name, "became shorter while it was read; is it still being copied?")
            filled += count
        digest.update(chunk)
        give_way()
    return payload


def _read_exactly(file: BinaryIO, name: str, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    filled = 0
    while filled < count:
        got = _read_into(file, name, view[filled:])
        if not got:
            raise invalid_file(name, "became shorter while it was read; is it still being copied?")
        filled += got
    return bytes(data)


def _read_into(file: BinaryIO, name: str, target: memoryview) -> int:
    try:
        return os.readv(file.fileno(), [target])
    except OSError:
        raise unreadable(name) from None


def _parse_header(name: str, data: bytes) -> WeightsHeader:
    """Parse and check the bytes before the payload."""
    try:
        raw = json.loads(data[8:])
    except (ValueError, RecursionError):
        raise invalid_file(name, "has a header that is not JSON") from None
    if not isinstance(raw, dict):
        raise invalid_file(name, "has a header that is not a JSON object")
    tensors = {key: _tensor_info(name, key, entry) for key, entry in raw.items() if key != "__metadata__"}
    ordered = sorted(tensors.values(), key=lambda t: (t.start, t.stop))
    payload_bytes = _check_offsets(name, ordered)
    return WeightsHeader(name, MappingProxyType(tensors), tuple(_runs(ordered)), data, payload_bytes)


def _tensor_info(name: str, key: str, entry: object) -> TensorInfo:
    if isinstance(entry, dict):
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2:
            if dtype not in _ITEM_BYTES:
                raise AdapterIncompatibleError(
                    f"Tensor {key[:256]!r} is of type {dtype[:16]}; served are {', '.join(_ITEM_BYTES)}.", _about(key)
                )
            start, stop = offsets
            if stop - start != math.prod(shape) * _ITEM_BYTES[dtype]:
                raise invalid_file(
                    name, f"announces {stop - start} bytes for tensor {key[:256]!r} of shape {shape}, type {dtype}"
                )
            return TensorInfo(key, dtype, tuple(shape), start, stop)
    raise invalid_file(name, f"has a malformed header entry for tensor {key[:256]!r}")


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    # 2^48: beyond any file, and small enough that products stay harmless.
    return isinstance(value, list) and len(value) <= 8 and all(type(v) is int and 0 <= v < 2**48 for v in value)


def _check_offsets(name: str, ordered: Sequence[TensorInfo]) -> int:
    """Check that the tensors lie one behind the other without holes; returns where the last ends."""
    end = 0
    for info in ordered:
        if info.start != end:
            raise invalid_file(name, f"has a hole or an overlap before tensor {info.name[:256]!r}")
        end = info.stop
    return end


def _runs(ordered: Sequence[TensorInfo]) -> Iterator[Run]:
    """The runs of tensors that lie one behind the other."""
    filled = (info for info in ordered if info.start < info.stop)
    for dtype, group in itertools.groupby(filled, key=lambda t: t.dtype):
        infos = list(group)
        yield Run(dtype, infos[0].start, infos[-1].stop)


def unreadable(name: str) -> AdapterUnreadableError:
    """The error of a file of the adapter that is there and that the disk does not give."""
    return AdapterUnreadableError(
        f"{name} could not be read: the disk reported an error. Try again; if that stays so, the server's disk is at "
        "fault.",
        {"file": name},
    )


def _about(name: str) -> dict[str, str]:
    return {"tensor": name[:256]}


def invalid_file(name: str, what: str) -> AdapterInvalidError:
    """The error of a weights file that is not as it must be."""
    return AdapterInvalidError(f"{name} {what}.", {"file": name})
