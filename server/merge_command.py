"""What a server tells the process of a merge. Imports no torch."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..adapters.merge.targets import Onto, Target

if TYPE_CHECKING:
    from .merge_plan import MergeRequest

REQUEST_FILE: Final = "request.json"
CALIBRATION_FILE: Final = "calibration"


@dataclass(frozen=True, slots=True)
class MergeCommand:
    """One merge.

    Attributes:
        work: directory of this merge alone, with the adapters' files.
        model: directory or hub id of the base, or `demo`.
        base_sha256: hash of the base that the server has loaded.
        base_names: other names of it.
        adapters: directories below `work`, each called like its adapter.
        weights: one for each of them.
        onto: what they are added to; None: what their files say.
        to: what the result is written as.
        out: the model's directory.
        has_calibration: there is a text in the file CALIBRATION_FILE of `work`.
        iterations: of auto-round.
        texts: held-out; empty: nothing is compared.
        accept_loss: write the model whatever it lost.
        allow_other_base: adapters may name another base.
        adapter_bytes: enough memory for the adapters while they are compared.
        threads: of the CPU.
        priority: idle, low or normal; see `--merge-priority`.
    """

    work: Path
    model: str
    base_sha256: str
    base_names: tuple[str, ...]
    adapters: tuple[Path, ...]
    weights: tuple[float, ...]
    onto: Onto | None
    to: Target
    out: Path
    has_calibration: bool
    iterations: int
    texts: tuple[str, ...]
    accept_loss: bool
    allow_other_base: bool
    adapter_bytes: int
    threads: int
    priority: str

    def write(self) -> None:
        """Write it where the process looks for it.

        Raises:
            OSError: the disk is full, or failed.
        """
        (self.work / REQUEST_FILE).write_text(json.dumps(dataclasses.asdict(self), default=str), encoding="utf-8")

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "MergeCommand":
        """What `write` wrote."""
        return cls(
            **{
                **value,
                "work": Path(value["work"]),
                "base_names": tuple(value["base_names"]),
                "adapters": tuple(map(Path, value["adapters"])),
                "weights": tuple(value["weights"]),
                "onto": None if value["onto"] is None else Onto(value["onto"]),
                "to": Target(value["to"]),
                "out": Path(value["out"]),
                "texts": tuple(value["texts"]),
            }
        )

    def to_request(self) -> "MergeRequest":
        """What `lorikeet merge` would have made of the same flags."""
        from .merge_plan import MergeRequest  # imports torch

        return MergeRequest(
            model=self.model,
            adapters=self.adapters,
            weights=self.weights,
            to=self.to,
            out=self.out,
            onto=self.onto,
            allow_other_base=self.allow_other_base,
            calibration=self.work / CALIBRATION_FILE if self.has_calibration else None,
            iterations=self.iterations,
            base_names=self.base_names,
        )
