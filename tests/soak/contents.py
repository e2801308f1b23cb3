"""Adapters to serve: contents whose weights, ranks, targets and scalings differ, and ways to place them in folders."""

import hashlib
import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from lorikeet.adapters.golden import GOLDEN_FILE
from safetensors.torch import load_file, save_file

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"

# rank, lora_alpha, attention only. Two of each file size or more, so that files of one content replace those of another
# of the same length; with the same config, with another one, and with another scaling for tensors of the same shapes.
_RECIPES: Final = (
    (2, 2, False),
    (2, 2, False),
    (2, 5, False),
    (4, 4, False),
    (4, 9, False),
    (8, 8, True),
    (8, 3, True),
    (8, 8, False),
)
# Which of them carry a golden file.
PROVEN: Final = (3, 6)

_trash = itertools.count()


@dataclass(frozen=True, slots=True)
class Content:
    """One content, in a directory of its own that never changes.

    Attributes:
        name: of its directory.
        directory: outside of what a server watches; some hold a golden file, too.
        digest: the version that it is.
    """

    name: str
    directory: Path
    digest: str

    @property
    def is_proven(self) -> bool:
        """Whether it carries a golden file."""
        return (self.directory / GOLDEN_FILE).exists()


def make_contents(template: Path, out: Path) -> list[Content]:
    """Write all contents to out/c0, out/c1, ... as PEFT would.

    Args:
        template: an adapter of rank 2 on all linears, as PEFT saved it.
        out: created when missing.
    """
    tensors = load_file(template / WEIGHTS)
    config = json.loads((template / CONFIG).read_text())
    generator = torch.Generator().manual_seed(11)
    contents = []
    for index, (rank, alpha, attention_only) in enumerate(_RECIPES):
        chosen = {name: t.shape for name, t in tensors.items() if not attention_only or "self_attn" in name}
        made = {}
        for name, (rows, columns) in sorted(chosen.items()):
            shape = (rank, columns) if "lora_A" in name else (rows, rank)
            made[name] = torch.randn(shape, generator=generator) * 0.3
        targets = [name for name in config["target_modules"] if not attention_only or "self_attn" in name]
        directory = out / f"c{index}"
        directory.mkdir(parents=True)
        save_file(made, directory / WEIGHTS, metadata={"format": "pt"})
        (directory / CONFIG).write_text(
            json.dumps(config | {"r": rank, "lora_alpha": alpha, "target_modules": sorted(targets)}, indent=2)
        )
        contents.append(Content(directory.name, directory, digest_of(directory)))
    return contents


def digest_of(directory: Path) -> str:
    """The version that a folder's content is."""
    return hashlib.sha256((directory / CONFIG).read_bytes() + (directory / WEIGHTS).read_bytes()).hexdigest()


def place(content: Content, target: Path) -> None:
    """Put a content where nothing or another folder is, as careful operators do: readers see the old or the new one."""
    fresh = target.parent / f".{target.name}-{next(_trash)}.tmp"
    shutil.copytree(content.directory, fresh)
    remove(target)
    os.rename(fresh, target)


def overwrite(content: Content, target: Path) -> None:
    """Write a content's files over those of a folder, as `cp` does."""
    target.mkdir(exist_ok=True)
    (target / GOLDEN_FILE).unlink(missing_ok=True)
    for source in sorted(content.directory.iterdir()):
        shutil.copyfile(source, target / source.name)


def rename_over(content: Content, target: Path) -> None:
    """Put a content's files in the places of those of a folder one by one, as tools that sync folders do."""
    target.mkdir(exist_ok=True)
    (target / GOLDEN_FILE).unlink(missing_ok=True)
    for source in sorted(content.directory.iterdir()):
        shutil.copyfile(source, target / f"{source.name}.new")
        os.replace(target / f"{source.name}.new", target / source.name)


def remove(target: Path) -> None:
    """Take a folder or a link away at once, if there is one."""
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        old = target.parent / f".{target.name}-{next(_trash)}.tmp"
        os.rename(target, old)
        shutil.rmtree(old)
