"""What was measured of an adapter on this machine, way by way; kept so that a long run goes on and advice can be given.

One small JSON file for each way, in a folder named by the adapter's digest below the cache directory. Imports no torch.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any, Final

from .report import PathResult

_STEPS: Final = "steps"  # what step times are kept under; no way is called so


class Way(StrEnum):
    """How an adapter can be deployed, and the two bases that it is compared with."""

    BASE_16BIT = "16-bit base"
    BASE_NF4 = "NF4 base"
    UNMERGED = "unmerged on NF4"
    MERGED_ONTO_ORIGINAL = "merged 16-bit onto original"
    MERGED_ONTO_NF4 = "merged 16-bit onto NF4"
    MERGED_FP32_ONTO_ORIGINAL = "merged 32-bit onto original"
    MERGED_FP32_ONTO_NF4 = "merged 32-bit onto NF4"
    MERGED_AUTOROUND = "merged AutoRound"
    MERGED_AWQ = "merged AWQ"
    MERGED_GPTQ = "merged GPTQ"
    MERGED_NF4 = "merged NF4"


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Decode step times of several ways, taken in turns (step_times.py).

    Attributes:
        machine: where and when, in a line.
        steps: of each way in a round.
        seconds: a value for each round, round i of all ways side by side.
    """

    machine: str
    steps: int
    seconds: Mapping[Way, list[float]]


class MeasuredTable:
    """The results of one adapter.

    Args:
        cache_dir: where models are kept.
        digest: of the adapter's version.
    """

    def __init__(self, cache_dir: Path, digest: str) -> None:
        self._directory = cache_dir / "fidelity" / digest

    def get(self, way: Way, settings: Mapping[str, Any]) -> PathResult | None:
        """What was measured with just these settings; None: nothing."""
        found = self._read(way)
        return None if found is None or found["settings"] != settings else PathResult.from_json(found["result"])

    def put(self, way: Way, settings: Mapping[str, Any], result: PathResult) -> None:
        """Keep a result, whole or not at all."""
        self._write(way.name.lower(), {"settings": dict(settings), "result": result.to_json()})

    def put_steps(self, steps: StepTimes) -> None:
        """Keep step times in place of those that were there, whole or not at all."""
        seconds = {way.value: values for way, values in steps.seconds.items()}
        self._write(_STEPS, {"machine": steps.machine, "steps": steps.steps, "seconds": seconds})

    def steps(self) -> StepTimes | None:
        """The step times; None: there are none."""
        found = self._load(_STEPS)
        try:
            seconds = {Way(name): [float(each) for each in values] for name, values in found["seconds"].items()}
            return StepTimes(str(found["machine"]), int(found["steps"]), seconds)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def all(self) -> dict[Way, PathResult]:
        """Everything that was measured in the same way as the unmerged adapter; empty while that is not there.

        Step times are those that were taken side by side, or none.
        """
        kept = {way: found for way in Way if (found := self._read(way)) is not None}
        if Way.UNMERGED not in kept:
            return {}
        text = kept[Way.UNMERGED]["settings"].get("text")
        steps = self.steps()
        seconds = {} if steps is None else {way: median(values) for way, values in steps.seconds.items()}
        return {
            way: replace(PathResult.from_json(found["result"]), step_s=seconds.get(way))
            for way, found in kept.items()
            if found["settings"].get("text") == text
        }

    def _read(self, way: Way) -> dict[str, Any] | None:
        found = self._load(way.name.lower())
        try:
            PathResult.from_json(found["result"])
        except (ValueError, KeyError, TypeError):
            return None
        return found if isinstance(found.get("settings"), dict) else None

    def _load(self, name: str) -> dict[str, Any]:
        """What is kept under a name; empty: nothing that can be read."""
        try:
            found: object = json.loads((self._directory / f"{name}.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{name}.json"
        written = path.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(value, indent=2) + "\n")
        written.replace(path)
