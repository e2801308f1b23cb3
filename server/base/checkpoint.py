"""A base model's files: finding them, checking that they are all there, reading tensors one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BaseModelError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HUB_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja"]


def resolve_source(model: str, *, weights: bool = True) -> Path:
    """The local directory of a model given as a directory or a Hugging Face hub id (downloaded with progress).

    Args:
        model: directory or hub id.
        weights: download them, too; else only what is small.

    Raises:
        BaseModelError: neither a directory nor a hub id that can be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise BaseModelError(f"The model path {model} is a file; give the directory that holds config.json.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise BaseModelError(
            f"The model {model} is neither an existing directory nor a hub id of the form organisation/name."
        )
    return _download(model, [*_HUB_PATTERNS, "*.safetensors"] if weights else _HUB_PATTERNS)


def _download(repo: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # costs 0.3 s of import, and most starts are local

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except OSError as error:
        no_space = getattr(error, "errno", None) == 28
        why = "the disk is full: free space or set HF_HOME to a larger disk" if no_space else type(error).__name__
        raise BaseModelError(
            f"The model {repo} is no local directory and could not be fetched from the hub ({why}). "
            "Check the name, the network and HF_TOKEN, or give a local directory."
        ) from error


class BaseCheckpoint:
    """The safetensors files of one model directory.

    Args:
        directory: as `resolve_source` returned it.

    Raises:
        BaseModelError: no weights, only pickled ones, or shards that the index names are missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not (directory / "config.json").is_file():
            raise BaseModelError(f"The model directory {directory} has no config.json.")
        self.files = self._find_files()

    def _find_files(self) -> list[Path]:
        index = self.directory / _INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                names = sorted(set(weight_map.values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise BaseModelError(f"The index {index} is not a safetensors index.") from error
            missing = [n for n in names if not (self.directory / n).is_file()]
            if missing:
                raise BaseModelError(
                    f"The model directory {self.directory} lacks {len(missing)} of {len(names)} shards: "
                    f"{', '.join(missing[:4])}. Copy or download them again."
                )
            return [self.directory / n for n in names]
        if (self.directory / _SINGLE).is_file():
            return [self.directory / _SINGLE]
        pickled = sorted(p.name for p in self.directory.glob("*.bin"))
        hint = f" It has {pickled[0]}, a pickle, which is never read: convert it to safetensors." if pickled else ""
        raise BaseModelError(f"The model directory {self.directory} has no safetensors weights.{hint}")

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(f.stat().st_size for f in self.files)

    @property
    def largest_file_bytes(self) -> int:
        """Bytes of the largest shard."""
        return max(f.stat().st_size for f in self.files)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor on the CPU), shard by shard; at most one shard is mapped at a time.

        Raises:
            BaseModelError: a file is truncated or not safetensors.
        """
        for file in self.files:
            try:
                with safe_open(file, framework="pt", device="cpu") as shard:
                    # offset_keys() walks the file front to back; keys() is alphabetical and would seek.
                    for name in shard.offset_keys():
                        yield name, shard.get_tensor(name)
            except SafetensorError as error:
                raise BaseModelError(f"The weights file {file} is truncated or damaged; copy it again.") from error


def quantization_of(config: Any) -> dict[str, Any] | None:
    """The checkpoint's own quantization settings, checked to be bitsandbytes NF4, or None for 16-bit weights.

    Raises:
        BaseModelError: quantized with something else.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    given: dict[str, Any] = settings if isinstance(settings, dict) else settings.to_dict()
    method = given.get("quant_method")
    kind = given.get("bnb_4bit_quant_type")
    if method != "bitsandbytes" or not given.get("load_in_4bit") or kind != "nf4":
        raise BaseModelError(
            f"The checkpoint is quantized with {method} ({kind or 'no 4-bit type'}); "
            "give 16-bit weights or a bitsandbytes NF4 checkpoint."
        )
    return given
