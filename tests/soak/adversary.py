"""A client and a person at the disk who mean no good: malformed and invented ids, folders that must never be served."""

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from lorikeet.adapters.errors import ServingError
from lorikeet.adapters.golden import read_golden, write_golden
from lorikeet.adapters.info import Tier
from safetensors.torch import load_file, save
from torch import Tensor

from .actor import Actor
from .contents import CONFIG, WEIGHTS, digest_of, remove
from .world import World

NUM_INVENTED: Final = 40
MALFORMED: Final = ("", ".", "..", "../a0", "a/b", "a0/", "/etc/passwd", "-a", "é", "a" * 129, "a b", "a\0b", "a0\n")
BAD_DIGESTS: Final = ("a0@", "a0@xyz!", "a0@12", "@1234abcd", "a0@" + "a" * 65, "a0@1234@5678")
REFUSALS: Final = {
    "ADAPTER_INVALID",
    "ADAPTER_INCOMPATIBLE",
    "ADAPTER_ID_INVALID",
    "ADAPTER_MEMORY",
    "ADAPTER_UNREADABLE",
}


def _nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(iter(tensors))
    return tensors | {name: torch.full_like(tensors[name], float("nan"))}


def _zero(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def _wrong_shapes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones(tensor.shape[0], tensor.shape[1] + 1) for name, tensor in tensors.items()}


def _huge_header(directory: Path) -> None:
    side = 2**20
    header = json.dumps({"x": {"dtype": "F32", "shape": [side, side], "data_offsets": [0, 4 * side * side]}}).encode()
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


def _endless_header(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}")


def _pipe(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    os.mkfifo(directory / WEIGHTS)


def _link_out(directory: Path) -> None:
    outside = directory.parent.parent / "outside"
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to(outside / WEIGHTS)


def _link_loop(directory: Path) -> None:
    (directory / CONFIG).unlink()
    (directory / CONFIG).symlink_to(CONFIG)


def _half(directory: Path) -> None:
    os.truncate(directory / WEIGHTS, (directory / WEIGHTS).stat().st_size // 2)


def _no_config(directory: Path) -> None:
    (directory / CONFIG).unlink()


def _other_method(directory: Path) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | {"use_qalora": True}))


TENSOR_SPOILERS: Final = (_nan, _zero, _wrong_shapes)
SPOILERS: Final[tuple[Callable[[Path], None], ...]] = (
    _huge_header,
    _endless_header,
    _pipe,
    _link_out,
    _link_loop,
    _half,
    _no_config,
    _other_method,
)


class Adversary(Actor):
    """See the module.

    Args:
        world, name, seed, pause_s: see Actor.
        ids: of others, to meddle with.
    """

    def __init__(self, world: World, name: str, seed: int, pause_s: float, ids: list[str]) -> None:
        super().__init__(world, name, seed, pause_s)
        self._ids = ids
        self._bad = [f"bad-{i}" for i in range(4)]
        self._outside = world.root.parent / "outside"
        if not self._outside.exists():
            shutil.copytree(world.contents[0].directory, self._outside)
        # Made once: the libraries that make them keep a little of each.
        tensors = load_file(self._outside / WEIGHTS)
        self._bad_weights = [save(spoil(tensors)) for spoil in TENSOR_SPOILERS]
        self._make_disproven()

    def forget(self) -> None:
        """Remove what was put there."""
        for name in self._bad:
            remove(self.world.root / name)
            remove(self.world.root / f".{name}")

    def act(self) -> None:
        """One operation."""
        actions = (
            self._name_malformed,
            self._invent,
            self._spoil_watched,
            self._load_spoiled,
            self._load_disproven,
            self._escape,
        )
        self.rng.choice(actions)()

    def _name_malformed(self) -> None:
        reference = self.rng.choice([*MALFORMED, *BAD_DIGESTS])
        self._refused("malformed", self._any_call(reference), {"ADAPTER_ID_INVALID", "ADAPTER_DIGEST_INVALID"})

    def _invent(self) -> None:
        for _ in range(NUM_INVENTED):
            name = f"{self.rng.getrandbits(64):016x}"
            self._refused("invented", self._any_call(name), {"ADAPTER_NOT_FOUND"})
        # Not found, or an alias, which has no versions.
        name = f"{self.rng.choice(self._ids)}@{self.rng.getrandbits(128):032x}"
        self._refused(
            "invented version",
            lambda: self.world.app.manager.resolve(name),
            {"ADAPTER_NOT_FOUND", "ADAPTER_ID_INVALID"},
        )

    def _any_call(self, reference: str) -> Callable[[], object]:
        manager = self.world.app.manager
        calls: list[Callable[[], object]] = [
            lambda: manager.resolve(reference),
            lambda: manager.load(reference),
            lambda: manager.plan_load(reference),
            lambda: manager.unload(reference),
            lambda: manager.rollback(reference),
            lambda: manager.pin(reference, Tier.DEVICE, 0.0),
            lambda: manager.unpin(reference),
            lambda: manager.prefetch(reference, Tier.HOST, 0.0),
            lambda: manager.set_alias(f"alias-{self.rng.getrandbits(64):016x}", [(reference, 1.0)]),
            lambda: manager.delete_alias(reference),
            lambda: manager.get(reference),
        ]
        return self.rng.choice(calls)

    def _spoil_watched(self) -> None:
        """Put a folder that must be refused where folders are watched, or take one away."""
        target = self.world.root / self.rng.choice(self._bad)
        remove(target)
        if self.rng.random() < 0.7:
            self.world.count("bad folder")
            os.rename(self._spoiled(target.name), target)

    def _load_spoiled(self) -> None:
        name = self.rng.choice(self._bad)
        self._spoiled(name)
        call = self.rng.choice([self.world.app.manager.load, self.world.app.manager.plan_load])
        self._refused("bad load", lambda: call(f"{name}-called", f".{name}"), REFUSALS)

    def _load_disproven(self) -> None:
        """Its files are fine, and say of themselves that they answer something else."""
        self._refused(
            "disproven load",
            lambda: self.world.app.manager.load("disproven", ".disproven"),
            {"ADAPTER_PROOF_FAILED", "QUEUE_FULL"},
            reads=True,
        )

    def _make_disproven(self) -> None:
        """A content of its own, with the golden file of another scaling."""
        proven = next(content for content in self.world.contents if content.is_proven)
        directory = self.world.root / ".disproven"
        shutil.copytree(proven.directory, directory)
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(config | {"lora_alpha": 3 * config["lora_alpha"]}))
        golden = read_golden(proven.directory, digest=proven.digest)
        assert golden is not None
        digest = digest_of(directory)
        write_golden(directory, dataclasses.replace(golden, digest=digest))
        self.world.never_served.add(digest)

    def _escape(self) -> None:
        source = self.rng.choice(["..", "../outside", str(self._outside), "/", ".staged/../../outside", ".staged/\0"])
        self._refused("escape", lambda: self.world.app.manager.load("escaped", source), {"ADAPTER_ID_INVALID"})

    def _spoiled(self, name: str) -> Path:
        """A hidden folder that no server may accept."""
        directory = self.world.root / f".{name}"
        remove(directory)
        shutil.copytree(self._outside, directory)
        if self.rng.random() < 0.3:
            (directory / WEIGHTS).write_bytes(self.rng.choice(self._bad_weights))
        else:
            self.rng.choice(SPOILERS)(directory)
        return directory

    def _refused(self, operation: str, call: Callable[[], object], allowed: set[str], *, reads: bool = False) -> None:
        result = self.attempt(operation, call, allowed, reads=reads)
        if not isinstance(result, ServingError):
            self.world.report(f"{operation} was accepted: {result}")
