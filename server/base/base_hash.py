"""What identifies a base: its public name, and a hash of its content that adapters' cards can carry.

The hash is SHA-256 over every tensor's name, type and shape in the order of the names, and over samples of the tensors'
bytes: the first and the last 4 KiB. It is read from the source checkpoint's safetensors files, and depends neither on
how they are sharded or laid out, nor on their metadata, nor on where they are. It takes at most MAX_SAMPLED times two
short reads whatever the model's size, so it is computed at every start. Samples tell apart what training or conversion
makes of a model, since both change every tensor that they touch; they are no protection against someone who changes
the middle of a tensor on purpose.

A checkpoint that is already quantized is hashed over the tensors that it holds, so a 16-bit model and its 4-bit copy
are two bases. A 16-bit model that is quantized here at start has the hash of its 16-bit source.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...adapters.fingerprint import BaseFingerprint, is_public_name
from ..errors import BaseModelError
from .checkpoint import BaseCheckpoint

SAMPLE_BYTES: Final = 4096
# Tensors whose bytes are sampled at most; of more (experts), evenly spaced ones. All names, types and shapes count.
MAX_SAMPLED: Final = 4096
# The safetensors library's own limit.
_MAX_HEADER_BYTES: Final = 100_000_000
_DOMAIN: Final = b"lorikeet base 1\n"


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies.

    Attributes:
        file: index into the checkpoint's files.
        start, stop: its bytes in that file.
    """

    dtype: str
    shape: list[int]
    file: int
    start: int
    stop: int

    @property
    def samples(self) -> list[tuple[int, int]]:
        """(offset in the file, bytes) of its beginning and its end."""
        size = min(SAMPLE_BYTES, self.stop - self.start)
        return [(self.start, size), (self.stop - size, size)]


def identify_base(source: str, public_name: str, directory: Path, checkpoint: BaseCheckpoint | None) -> BaseFingerprint:
    """How adapters may know a base.

    Its name is, in this order: the public name given; the hub id that it was loaded from; the hub id that its
    config.json says it was saved from; the directory, which proves nothing.

    Args:
        source: directory or hub id that it was loaded from.
        public_name: its public name, where it is known otherwise; else empty.
        directory: where its files are.
        checkpoint: its weights; None: they are not there.

    Raises:
        BaseModelError: a weights file is truncated or not safetensors.
    """
    sha256 = "" if checkpoint is None else hash_checkpoint(checkpoint)
    if public_name or not Path(source).expanduser().is_dir():
        return BaseFingerprint(public_name or source, True, sha256)
    saved_as = _saved_as(directory)
    if saved_as:
        # A fine-tune of that model says the same: the directory's name is what its own adapters know.
        return BaseFingerprint(saved_as, True, sha256, (source,))
    return BaseFingerprint(source, False, sha256)


def hash_checkpoint(checkpoint: BaseCheckpoint) -> str:
    """The content hash of a checkpoint, 64 hex digits.

    Raises:
        BaseModelError: a weights file is truncated or not safetensors.
    """
    tensors = {name: stored for i in range(len(checkpoint.files)) for name, stored in _tensors(checkpoint, i)}
    names = sorted(tensors)
    sampled = set(names[:: -(-len(names) // MAX_SAMPLED) or 1])
    digest = hashlib.sha256(_DOMAIN)
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("rb", buffering=0)) for path in checkpoint.files]
            for name in names:
                stored = tensors[name]
                digest.update(f"{json.dumps(name)} {stored.dtype} {stored.shape}\n".encode())
                for start, size in stored.samples if name in sampled else ():
                    data = os.pread(files[stored.file].fileno(), size, start)
                    if len(data) != size:
                        raise _damaged(checkpoint.files[stored.file])
                    digest.update(data)
    except OSError as error:
        raise BaseModelError(f"The weights in {checkpoint.directory} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def _tensors(checkpoint: BaseCheckpoint, index: int) -> Iterator[tuple[str, _Stored]]:
    """The tensors of one file, by its header."""
    path = checkpoint.files[index]
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_MAX_HEADER_BYTES, path.stat().st_size):
                raise _damaged(path)
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = (8 + length + int(offset) for offset in entry["data_offsets"])
                shape = [int(size) for size in entry["shape"]]
                if not 8 + length <= start <= stop:
                    raise _damaged(path)
                yield name, _Stored(str(entry["dtype"]), shape, index, start, stop)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path) from error
    except OSError as error:
        raise BaseModelError(f"The weights file {path} cannot be read: {error.strerror}.") from error


def _damaged(path: Path) -> BaseModelError:
    return BaseModelError(f"The weights file {path} is truncated or damaged; copy it again.")


def _saved_as(directory: Path) -> str:
    """The hub id that config.json says the model was saved from, or an empty string."""
    try:
        name = json.loads((directory / "config.json").read_bytes()).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return name if isinstance(name, str) and is_public_name(name) else ""
