"""What was measured of an adapter on this machine, way by way; kept so that a long run goes on and advice can be given.

One small JSON file for each way, in a folder named by the adapter's digest below the cache directory. Imports no torch.
"""

import json
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from .report import PathResult


class Way(StrEnum):
    """How an adapter can be deployed, and the two bases that it is compared with."""

    BASE_16BIT = "16-bit base"
    BASE_NF4 = "NF4 base"
    UNMERGED = "unmerged on NF4"
    MERGED_ONTO_ORIGINAL = "merged 16-bit onto original"
    MERGED_ONTO_NF4 = "merged 16-bit onto NF4"
    MERGED_AUTOROUND = "merged AutoRound"
    MERGED_AWQ = "merged AWQ"
    MERGED_NF4 = "merged NF4"


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
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{way.name.lower()}.json"
        written = path.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps({"settings": dict(settings), "result": result.to_json()}, indent=2) + "\n")
        written.replace(path)

    def all(self) -> dict[Way, PathResult]:
        """Everything that was measured in the same way as the unmerged adapter; empty while that is not there."""
        kept = {way: found for way in Way if (found := self._read(way)) is not None}
        if Way.UNMERGED not in kept:
            return {}
        text = kept[Way.UNMERGED]["settings"].get("text")
        return {
            way: PathResult.from_json(found["result"])
            for way, found in kept.items()
            if found["settings"].get("text") == text
        }

    def _read(self, way: Way) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self._directory / f"{way.name.lower()}.json").read_text())
            PathResult.from_json(found["result"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if isinstance(found.get("settings"), dict) else None
