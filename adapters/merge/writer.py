"""Writes safetensors files tensor by tensor, piece by piece: what is held is never more than the piece in hand.

Format: github.com/huggingface/safetensors. The header, which says where each tensor lies, comes first in the file but
is known last, so room is left for it and what is not needed is filled with the spaces that the format allows behind the
JSON. Tensors whose size is no multiple of 8 bytes, small ones as a rule, are held back until their shard ends: so every
other tensor is aligned where the file is mapped. Shards and their index have the names that transformers gives them.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import torch
from torch import Tensor

# As transformers' save_pretrained splits.
SHARD_BYTES: Final = 5 * 10**9
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_DTYPES: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8"}
# Of one entry of the header beside the name: types, sizes and offsets.
_ENTRY_BYTES: Final = 160
_ALIGNMENT: Final = 8


class ShardWriter:
    """Writes the weights of one model. To be closed by `finish`, or left by an error.

    Args:
        directory: where they go; exists.
        names: of all tensors that will come, to leave room for the header.
        shard_bytes: a shard is closed before a tensor that would make it larger.

    Attributes:
        total_bytes: of the tensors written so far.
    """

    def __init__(self, directory: Path, names: Iterable[str], *, shard_bytes: int = SHARD_BYTES) -> None:
        self.total_bytes = 0
        self._directory = directory
        self._shard_bytes = shard_bytes
        room = 64 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._room = room + -room % _ALIGNMENT
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._held: list[tuple[str, tuple[int, ...], Tensor]] = []
        self._size = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is in its buffer has no place on a full disk; it is not needed
                self._file.close()

    def write(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, values: Iterable[Tensor]) -> None:
        """Write one tensor.

        Args:
            name: of the tensor.
            shape: its sizes.
            dtype: its type.
            values: its rows from the first to the last, of that type, on the CPU.

        Raises:
            OSError: the disk is full, or failed.
        """
        size = math.prod(shape) * dtype.itemsize
        held = sum(tensor.nbytes for _, _, tensor in self._held)
        if self._file is not None and self._size + held and self._size + held + size > self._shard_bytes:
            self._close_shard()
        if self._file is None:
            self._open_shard()
        self._shards[-1][1].append(name)
        if size % _ALIGNMENT:
            self._held.append((name, shape, torch.cat([piece.reshape(-1) for piece in values])))
        else:
            self._append(name, shape, dtype, values)

    def finish(self) -> None:
        """Close the last shard, name the files and write the index. Raises OSError."""
        if self._file is not None:
            self._close_shard()
        count = len(self._shards)
        if count == 1:
            self._shards[0][0].rename(self._directory / _SINGLE)
            return
        where: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self._directory / final)
            where |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(where.items()))}
        (self._directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _append(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, values: Iterable[Tensor]) -> None:
        """Put a tensor behind those that are in the shard."""
        assert self._file is not None
        start = self._size
        for piece in values:
            assert piece.dtype == dtype and piece.device.type == "cpu"
            data = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
            self._file.write(data.data)
            self._size += data.nbytes
        assert self._size - start == math.prod(shape) * dtype.itemsize, name
        self.total_bytes += self._size - start
        self._header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, self._size]}

    def _open_shard(self) -> None:
        path = self._directory / f"shard-{len(self._shards):05d}.part"
        self._file = path.open("xb")
        self._file.write(b" " * (8 + self._room))
        self._header = {"__metadata__": {"format": "pt"}}
        self._size = 0
        self._shards.append((path, []))

    def _close_shard(self) -> None:
        assert self._file is not None
        for name, shape, tensor in sorted(self._held, key=lambda held: -held[2].dtype.itemsize):
            self._append(name, shape, tensor.dtype, [tensor])
        self._held.clear()
        header = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(header) <= self._room, "more tensors came than were named"
        with self._file as file:
            file.seek(0)
            file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
            file.flush()
            os.fsync(file.fileno())
        self._file = None
