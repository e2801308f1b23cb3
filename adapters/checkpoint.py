"""An adapter directory as PEFT saves it -> checked tensors in host memory, and the digest that identifies them.

Runs on a loader thread. Only `adapter_config.json` and `adapter_model.safetensors` are read; a pickle is never opened.
Everything that the header can tell is checked before the payload is read.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import torch
from torch import Tensor

from .config import CONFIG_FILE, MAX_CONFIG_BYTES, AdapterConfig, parse_config
from .errors import AdapterInvalidError, AdapterMemoryError
from .fingerprint import BaseFingerprint
from .finite import all_finite
from .paths import open_contained
from .scaling import Scaling
from .sites import SiteTable
from .tensor_map import ModuleTensors, count_elements, group_tensors, match_sites
from .weights_file import WEIGHTS_FILE, TensorInfo, new_digest, read_header, read_payload, unreadable

_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES: Final = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One module's finite tensors, as in the file.

    Attributes:
        scaling: rank and factor.
        lora_a: [rank, in_features].
        lora_b: [out_features, rank].
        lora_e: AdaLoRA's singular values [rank, 1], else None.
        b_name: name of lora_b in the file, for messages.
    """

    scaling: Scaling
    lora_a: Tensor
    lora_b: Tensor
    lora_e: Tensor | None
    b_name: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked adapter.

    Attributes:
        config: parsed.
        digest: hex SHA-256 of the config's bytes followed by the weights file's bytes.
        modules: module path -> tensors; CPU, float16, bfloat16 or float32, views of one buffer.
        files: name -> its bytes, in pieces; what was hashed.
    """

    config: AdapterConfig
    digest: str
    modules: dict[str, AdaptedModule]
    files: dict[str, tuple[bytes | memoryview, ...]]


def load_checkpoint(
    directory: Path,
    sites: SiteTable,
    base: BaseFingerprint,
    *,
    roots: Sequence[Path] = (),
    max_elements: int | None = None,
) -> Checkpoint:
    """Read an adapter directory for a base.

    Args:
        directory: real path.
        sites: the base's sites.
        base: the base's name, for messages.
        roots: both files must lie in one of them; empty when a local tool asks.
        max_elements: refuse an adapter of more packed elements before reading its payload.

    Raises:
        AdapterMemoryError: more than max_elements.
        AdapterInvalidError: missing, truncated, malformed, non-finite, pickled, or changed while it was read.
        AdapterIncompatibleError: well-formed, but not servable on this base; names the field or tensor.
    """
    with open_contained(directory, CONFIG_FILE, roots) as file:
        stamps = {CONFIG_FILE: _stamp(os.fstat(file.fileno()))}
        config_bytes = _read_config(file)
    config = parse_config(config_bytes)
    with open_weights(directory, roots) as file:
        stamps[WEIGHTS_FILE] = _stamp(os.fstat(file.fileno()))
        header = read_header(file)
        groups = match_sites(group_tensors(header.tensors, config), config, sites, base)
        elements = count_elements({module: group.scaling for module, group in groups.items()}, sites)
        if max_elements is not None and elements > max_elements:
            raise AdapterMemoryError(
                f"The adapter takes {elements} elements; the adapter memory holds {max_elements}. Raise its budget."
            )
        digest = new_digest()
        digest.update(config_bytes)
        payload = read_payload(file, header, digest)
    for name, stamp in stamps.items():
        _check_unchanged(directory, name, stamp)
    modules = {module: read_module(group, payload) for module, group in groups.items()}
    files = {CONFIG_FILE: (config_bytes,), WEIGHTS_FILE: (header.raw, payload)}
    return Checkpoint(config, digest.hexdigest(), modules, files)


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


def _check_unchanged(directory: Path, name: str, stamp: tuple[int, ...]) -> None:
    """Raise AdapterInvalidError if a file is no longer the one that was opened, or was written to since.

    Its config and weights need not belong together then.
    """
    try:
        unchanged = _stamp(os.stat(directory / name)) == stamp
    except OSError:
        unchanged = False
    if not unchanged:
        raise AdapterInvalidError(
            f"{name} changed while the adapter was read; load it again when the folder is complete.", {"file": name}
        )


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    """Changes when a file is written to or replaced."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def check_complete(directory: Path, roots: Sequence[Path]) -> None:
    """Raise AdapterInvalidError while a file is missing or the weights file is shorter than its header announces."""
    open_contained(directory, CONFIG_FILE, roots).close()
    with open_weights(directory, roots) as file:
        read_header(file)


def open_weights(directory: Path, roots: Sequence[Path] = ()) -> BinaryIO:
    """Open adapter_model.safetensors; a folder that has only a pickle instead is refused by the pickle's name."""
    if not (directory / WEIGHTS_FILE).is_file():
        pickle = next((name for name in sorted(_names(directory)) if name.endswith(_PICKLES)), None)
        if pickle is not None:
            raise AdapterInvalidError(
                f"{WEIGHTS_FILE} is missing, and {pickle[:128]!r} is a pickle, which is never opened: it can run code. "
                "Save the adapter with safe_serialization=True (PEFT's default).",
                {"file": pickle[:128]},
            )
    return open_contained(directory, WEIGHTS_FILE, roots)


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        raise AdapterInvalidError("The adapter folder cannot be read.") from None


def read_module(group: ModuleTensors, payload: memoryview) -> AdaptedModule:
    """The tensors of one module, as views of the payload.

    Raises:
        AdapterInvalidError: a value is not finite; names the tensor.
    """
    return AdaptedModule(
        scaling=group.scaling,
        lora_a=_tensor(group.lora_a, payload),
        lora_b=_tensor(group.lora_b, payload),
        lora_e=None if group.lora_e is None else _tensor(group.lora_e, payload),
        b_name=group.lora_b.name,
    )


def _tensor(info: TensorInfo, payload: memoryview) -> Tensor:
    """A view of the payload, checked to be finite."""
    dtype = _DTYPES[info.dtype]
    if info.start == info.stop:  # AdaLoRA may keep no rank at all; torch.frombuffer refuses an empty range
        return torch.empty(info.shape, dtype=dtype)
    count = (info.stop - info.start) // dtype.itemsize
    tensor = torch.frombuffer(payload, dtype=dtype, count=count, offset=info.start).view(info.shape)
    if not all_finite(tensor):
        raise AdapterInvalidError(
            f"Tensor {info.name!r} has values that are not finite (NaN or infinity).", {"tensor": info.name[:256]}
        )
    return tensor
