"""An adapter directory as PEFT saves it -> checked tensors in host memory, and the digest that identifies them.

Runs on a loader thread. Only `adapter_config.json`, the safetensors files of the weights and the tokenizer's files are
read; a pickle is never opened. Everything that the headers can tell is checked before a payload is read.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from .config import CONFIG_FILE, MAX_CONFIG_BYTES, AdapterConfig, parse_config
from .errors import AdapterInvalidError, AdapterMemoryError
from .paths import FileStamp, file_stamp, open_contained
from .payload import PayloadTensors
from .shards import open_weights
from .tensor_map import Placement
from .tensor_plan import TensorPlan, TensorPlanner
from .tokenizer_files import TokenizerFiles, read_tokenizer_files
from .weights_file import new_digest, unreadable


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked adapter.

    Attributes:
        plan: what it shares with adapters of the same config and headers.
        digest: hex SHA-256 of the config's bytes, the weights' (index first, then the shards in order) and the
            tokenizer's.
        tensors: name in the file -> its finite values; CPU, float16, bfloat16 or float32, views of a few buffers.
        files: name -> its bytes, in pieces; what was hashed.
        tokenizer: what it ships of a tokenizer.
    """

    plan: TensorPlan
    digest: str
    tensors: Mapping[str, Tensor]
    files: dict[str, tuple[bytes | memoryview, ...]]
    tokenizer: TokenizerFiles = field(default_factory=TokenizerFiles)

    @property
    def placement(self) -> Placement:
        """Which tensor goes where."""
        return self.plan.placement


def load_checkpoint(
    directory: Path,
    planner: TensorPlanner,
    *,
    roots: Sequence[Path] = (),
    max_elements: int | None = None,
    settle_s: float = 0.0,
) -> Checkpoint:
    """Read an adapter directory for a base.

    Args:
        directory: real path.
        planner: of the base.
        roots: all files must lie in one of them; empty when a local tool asks.
        max_elements: refuse an adapter of more packed elements before reading its payload.
        settle_s: files must have been left alone for so long. They may be replaced one by one, and the new
            configuration with the old weights can look like an adapter.

    Raises:
        AdapterMemoryError: more than max_elements.
        AdapterInvalidError: missing, truncated, malformed, non-finite, pickled, or changed while it was read.
        AdapterIncompatibleError: well-formed, but not servable on this base; names the field or tensor.
    """
    with open_contained(directory, CONFIG_FILE, roots) as file:
        stamps: dict[str, FileStamp] = {CONFIG_FILE: file_stamp(os.fstat(file.fileno()))}
        config_bytes = _read_config(file)
    config = planner.parse(config_bytes)
    with open_weights(directory, roots) as weights:
        stamps |= weights.stamps
        plan = planner.plan(config_bytes, config, weights)
        check_size(plan.num_certain, max_elements)
        digest = new_digest()
        digest.update(config_bytes)
        payloads = weights.read(digest)
        tokenizer = read_tokenizer_files(directory, roots, stamps)
        tokenizer.update(digest)
        _let_settle(stamps.values(), settle_s)
        for name, stamp in stamps.items():
            _check_unchanged(directory, name, stamp)
        tensors = PayloadTensors(weights.headers, payloads)
        files: dict[str, tuple[bytes | memoryview, ...]] = {CONFIG_FILE: (config_bytes,)}
        files |= weights.contents(payloads)
        files |= {name: (data,) for name, data in tokenizer.files.items()}
    return Checkpoint(plan, digest.hexdigest(), tensors, files, tokenizer)


def check_size(elements: int, max_elements: int | None) -> None:
    """Raise AdapterMemoryError if an adapter takes more elements than there may be."""
    if max_elements is not None and elements > max_elements:
        raise AdapterMemoryError(
            f"The adapter takes {elements} elements; the adapter memory holds {max_elements}. Raise its budget."
        )


def read_config(directory: Path, roots: Sequence[Path] = ()) -> tuple[bytes, AdapterConfig]:
    """The bytes of adapter_config.json and what they say."""
    with open_contained(directory, CONFIG_FILE, roots) as file:
        data = _read_config(file)
    return data, parse_config(data)


def _read_config(file: BinaryIO) -> bytes:
    try:
        return file.read(MAX_CONFIG_BYTES + 1)
    except OSError:
        raise unreadable(CONFIG_FILE) from None


def _let_settle(stamps: Iterable[FileStamp], settle_s: float) -> None:
    """Wait until the last change is long enough ago. Change times, unlike modification times, are set by no tool."""
    age_s = time.time() - max(stamp[-1] for stamp in stamps) / 1e9
    # A file server's clock may be ahead of ours.
    time.sleep(min(settle_s, max(0.0, settle_s - age_s)))


def _check_unchanged(directory: Path, name: str, stamp: FileStamp) -> None:
    """Raise AdapterInvalidError if a file is no longer the one that was opened, or was written to since.

    The adapter's files need not belong together then.
    """
    try:
        unchanged = file_stamp(os.stat(directory / name)) == stamp
    except OSError:
        unchanged = False
    if not unchanged:
        raise AdapterInvalidError(
            f"{name} changed while the adapter was read; load it again when the folder is complete.", {"file": name}
        )


def check_complete(directory: Path, roots: Sequence[Path]) -> None:
    """Raise AdapterInvalidError while a file is missing or a weights file is shorter than its header announces."""
    open_contained(directory, CONFIG_FILE, roots).close()
    with open_weights(directory, roots):
        pass
