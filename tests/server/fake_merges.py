"""A MergeService whose merges are played instead of run in a process."""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path

from lorikeet.adapters.errors import ServingError
from lorikeet.adapters.fingerprint import BaseFingerprint
from lorikeet.adapters.merge.errors import MergeCancelledError
from lorikeet.server.config import ServerConfig
from lorikeet.server.merge_command import REQUEST_FILE, MergeCommand
from lorikeet.server.merge_service import MergePlace, MergeService

REPORT = {
    "output": "out", "base": "org/base", "base_sha256": "b" * 64, "onto": "nf4", "onto_reason": "it was asked for",
    "adapters": [{"id": "kjv", "version": "d" * 64, "weight": 1.0}], "to": "bf16", "weight_bytes": 5, "seconds": 1.5,
    "warnings": ["mind"], "accepted_loss": None, "table": "a table", "a_later_field": 1,
    "comparison": {
        "base": {"path": "base in NF4", "perplexity": {"tokens": 9, "loss": float("inf"), "error": 0.0, "value": None},
                 "divergence": None, "disk_bytes": 1, "resident_bytes": 2, "step_s": 0.1},
        "gain_kept": 0.9, "device": "cpu", "compute_dtype": "float32", "context": 64, "stride": 32,
    },
}  # fmt: skip


@dataclass
class FakeMerges:
    """See the module. Each merge waits for `go`, if it is clear, and then makes its directory or fails.

    Attributes:
        settings: of the server.
        fail: raised by every merge.
        scratch: where what is merged is prepared.
        commands: as the processes would have read them.
        seen: (queued, running) and outcomes, as metrics were told.
    """

    settings: dict = field(default_factory=dict)
    fail: ServingError | None = None
    go: asyncio.Event = field(default_factory=asyncio.Event)
    commands: list[MergeCommand] = field(default_factory=list)
    seen: list[object] = field(default_factory=list)
    scratch: Path = Path("/nonexistent/merges")

    def service(self, manager, access=None) -> MergeService:
        place = MergePlace(ServerConfig(**self.settings), BaseFingerprint("org/base", sha256="b" * 64), self.scratch)
        return MergeService(manager, place, self, access, self._run)

    async def _run(self, operation):
        self.commands.append(
            MergeCommand.from_json(json.loads((operation.command.work / REQUEST_FILE).read_text(encoding="utf-8")))
        )
        operation.tell("Merging onto nf4", 1, 4, "bytes")
        waits = [asyncio.ensure_future(event.wait()) for event in (self.go, operation.cancelled)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if operation.cancelled.is_set():
            raise MergeCancelledError("The merge was cancelled; nothing is left of it.")
        if self.fail is not None:
            raise self.fail
        operation.command.out.mkdir()
        return REPORT | {"output": operation.output}

    def on_merges(self, queued, running):
        self.seen.append((queued, running))

    def on_merge_progress(self, share):
        self.seen.append(share)

    def on_merge_ended(self, outcome, seconds):
        self.seen.append(outcome)
