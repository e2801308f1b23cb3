"""Adapters in numbers and sizes that nobody trains: random weights, written fast, every file another version."""

import itertools
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lorikeet.adapters.config import CONFIG_FILE
from lorikeet.adapters.weights_file import WEIGHTS_FILE
from safetensors.torch import load, save
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from workload import write_random_adapters

FILE_ITEM_BYTES = 2  # bfloat16, as write_random_adapters saves
_TAIL_ELEMENTS = 4
_TAIL = struct.Struct(f"<{_TAIL_ELEMENTS}H")
_SMALL_BFLOAT16 = 0x3C00  # 0.0078; with any 7 bits of mantissa below 0.0157


def elements_per_rank(base: Path, targets: Sequence[str] = ()) -> int:
    """How many elements one rank of an adapter has.

    Args:
        base: the base model's directory; only its config is read.
        targets: last parts of the adapted modules' names; empty: all linears.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return sum(
        m.in_features + m.out_features
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and ".layers." in n and (not targets or n.rpartition(".")[2] in targets)
    )


@dataclass
class LargeAdapter:
    """One folder whose content can be made another version in no time.

    Attributes:
        name: of the folder, which is what a load names as its source.
        weights: the file.
        file_bytes: its size.
        rank: of every module.
        num_elements: of all modules.
    """

    name: str
    weights: Path
    file_bytes: int
    rank: int
    num_elements: int
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count, repr=False)

    def renew(self) -> None:
        """Change the last few values: the next load finds a version that was never seen."""
        with self.weights.open("r+b") as file:
            file.seek(-_TAIL.size, 2)
            file.write(_tail(next(self._numbers)))


def write_large_adapters(base: Path, folder: Path, *, count: int, megabytes: float, seed: int) -> list[LargeAdapter]:
    """Write adapters over all linears whose rank is chosen so that each file has about `megabytes` 10^6 bytes."""
    per_rank = elements_per_rank(base)
    rank = max(1, round(megabytes * 1e6 / (per_rank * FILE_ITEM_BYTES)))
    names = write_random_adapters(base, folder, count=count, rank=rank, seed=seed)
    large = []
    for i, name in enumerate(names):
        renamed = (folder / name).rename(folder / f"large-{i}")
        weights = renamed / WEIGHTS_FILE
        large.append(LargeAdapter(renamed.name, weights, weights.stat().st_size, rank, rank * per_rank))
    return large


def write_numbered_adapters(
    base: Path, folder: Path, *, count: int, ranks: Sequence[int], targets: Sequence[str], seed: int
) -> list[str]:
    """Write many small adapters that differ in their last values only, which makes each a version of its own.

    Args:
        base: the base model's directory; only its config is read.
        folder: made if missing.
        count: number of adapters.
        ranks: taken in turn.
        targets: last parts of the adapted modules' names.
        seed: of the weights that all of one rank share.

    Returns:
        The subfolders' names, which are the adapter ids.
    """
    templates = [_template(base, folder / "template", rank, targets, seed) for rank in ranks]
    names = [f"adapter-{i:05d}" for i in range(count)]
    for i, name in enumerate(names):
        config, weights = templates[i % len(templates)]
        directory = folder / name
        directory.mkdir()
        (directory / CONFIG_FILE).write_bytes(config)
        with (directory / WEIGHTS_FILE).open("wb") as file:
            file.write(memoryview(weights)[: -_TAIL.size])
            file.write(_tail(i))
    return names


def _template(base: Path, folder: Path, rank: int, targets: Sequence[str], seed: int) -> tuple[bytes, bytes]:
    """Config and weights of a random adapter; the folder is used and removed."""
    (name,) = write_random_adapters(base, folder, count=1, rank=rank, seed=seed)
    files = folder / name
    tensors = load((files / WEIGHTS_FILE).read_bytes())
    kept = {n: t for n, t in tensors.items() if n.split(".lora_")[0].rpartition(".")[2] in targets}
    config = json.loads((files / CONFIG_FILE).read_text()) | {"target_modules": sorted(targets)}
    for path in (files / WEIGHTS_FILE, files / CONFIG_FILE):
        path.unlink()
    files.rmdir()
    folder.rmdir()
    return json.dumps(config, indent=2).encode(), save(kept, metadata={"format": "pt"})


def _tail(number: int) -> bytes:
    """The last values of a file: small, finite, not zero, different for every number below 2^28."""
    return _TAIL.pack(*(_SMALL_BFLOAT16 | (number >> 7 * i & 0x7F) for i in range(_TAIL_ELEMENTS)))
