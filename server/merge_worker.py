"""The process of one merge that a server was asked for; `merge_process.py` starts it.

A process, because a merge computes for minutes: neither the interpreter lock nor the step thread is touched, and it can
be stopped at any moment. By default it takes cores that nobody else wants, and a tenth of one that is wanted. Its
argument is a directory with `request.json` (a `MergeCommand`) and what that names. On standard output it writes a JSON
object a line: `progress` often, then `done` or `error`. It goes on as long as its standard input is open, so it ends
when it is cancelled and when the server is gone, however that came.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, TextIO

from ..adapters.errors import ServingError
from ..adapters.merge.errors import MergeCancelledError
from ..adapters.merge.targets import DENSE
from .lean_imports import lean_imports
from .merge_command import REQUEST_FILE, MergeCommand

# Between two lines about progress.
_TELL_S: Final = 0.2
# Of priority low, relative to the server's.
_LOW_NICE: Final = 19
# How long it may take to clean up once it shall end.
CLEAN_UP_S: Final = 10.0
_UNITS: Final = {"Merging": "bytes", "Quantizing": "layers", "Comparing": "tokens"}
# Flags of `lorikeet merge`, which messages name, that are fields of a request; and those that are called otherwise.
_FLAG: Final = re.compile(r"--(accept-loss|allow-other-base|calibration|iterations|onto|out|text|to|unverified)\b")
_FIELDS: Final = {"out": "output", "text": "texts"}


class _StoppedError(BaseException):
    """The merge shall end. No Exception: whoever turns those into answers must not see it."""


class _Stop:
    """Whether the merge shall end.

    Attributes:
        is_asked: it shall.
        may_interrupt: whatever the main thread does may be left at any point; else it asks by itself.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self.may_interrupt = True

    def watch(self) -> None:
        """End the process when its standard input is closed; a thread's work."""
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # to the main thread, which cleans up
        time.sleep(CLEAN_UP_S)
        os.killpg(0, signal.SIGKILL)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """End as soon as that leaves nothing behind."""
        self.is_asked = True
        if self.may_interrupt:
            self.may_interrupt = False
            raise _StoppedError


class _Channel:
    """The lines that the server reads."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stage = ""
        self._told = 0.0

    def send(self, kind: str, value: object) -> None:
        """Write a line; a server that is gone reads none."""
        with contextlib.suppress(BrokenPipeError):
            self._stream.write(json.dumps({kind: value}) + "\n")
            self._stream.flush()

    def progress(self, stage: str, done: int, total: int) -> None:
        """A `Progress`: at the beginning and end of each stage, and now and then."""
        now = time.monotonic()
        if stage != self._stage or done == total or now - self._told >= _TELL_S:
            self._stage, self._told = stage, now
            unit = _UNITS.get(stage.partition(" ")[0], "")
            self.send("progress", {"stage": stage, "done": done, "total": total, "unit": unit})


def set_priority(priority: str) -> None:
    """Leave the cores to others: the process, and what it starts.

    Linux throttles it, because that takes nothing of a core that nobody else wants, however many the machine has, and
    nothing has to be stopped, continued or woken. Beside a thread of the server on the same core it gets 15 of
    1024 + 15 parts of it (`sched_prio_to_weight`, kernel/sched/core.c), and what the steps' threads leave while they
    wait for each other: together about a tenth of a core. At nice 10 it got twice that, and held up steps too long.
    Of a process that is scheduled as idle, reads and writes are idle, too (`task_nice_ioclass`, block/ioprio.c).

    Args:
        priority: idle, low or normal.
    """
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        if priority == "low":
            os.nice(_LOW_NICE)
        if priority == "idle":
            os.nice(19)
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main() -> int:
    """Run the merge.

    Returns:
        The exit status: 0 if the last line says how it ended.
    """
    command = MergeCommand.from_json(json.loads((Path(sys.argv[1]) / REQUEST_FILE).read_bytes()))
    set_priority(command.priority)
    channel = _Channel(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # what libraries print
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop.on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        threading.Thread(target=stop.watch, daemon=True).start()
        channel.progress("Starting", 0, 0)
        channel.send("done", _merge(command, stop, channel))
    except _StoppedError:
        channel.send(
            "error", _described(MergeCancelledError("The merge was cancelled; nothing is left of it."), command)
        )
    except ServingError as error:
        channel.send("error", _described(error, command))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _merge(command: MergeCommand, stop: _Stop, channel: _Channel) -> dict[str, Any]:
    """Plan, merge, verify; what a `done` line has."""
    # They import torch and transformers. To load a model with it, or to quantize, takes what lean imports leave out.
    lean = command.to in DENSE and not command.texts
    with lean_imports() if lean else contextlib.nullcontext():
        import torch

        from .config_loading import load_config
        from .errors import BaseModelError
        from .logs import configure_logs
        from .merge_card import notes
        from .merge_job import merge
        from .merge_plan import plan_merge
        from .merge_report import MergeVerifier, describe, require_reader

    configure_logs("warning", "json")
    torch.set_num_threads(command.threads)
    config = load_config(["--model", command.model])
    config = config.model_copy(
        update={
            "device": "cpu",  # whatever the server has is full
            "threads": command.threads,
            "base_names": command.base_names,
            "adapter_allow_other_base": command.allow_other_base,
            "adapter_device_bytes": max(config.adapter_device_bytes, command.adapter_bytes),
            "adapter_host_bytes": max(config.adapter_host_bytes, command.adapter_bytes),
        }
    )
    channel.progress("Reading adapters", 0, 0)
    plan = plan_merge(command.to_request())
    if plan.base.fingerprint.sha256 != command.base_sha256:
        raise BaseModelError(
            "The files of the base are not those any more that the server was started with, and the adapters belong to "
            "these. Start the server again, or put them back."
        )
    verifier = None
    if command.texts:
        require_reader(command.to)
        verifier = MergeVerifier(
            plan, config, command.texts, accept_loss=command.accept_loss, progress=False, tell=channel.progress
        )

    def verify(directory: Path) -> Sequence[str]:
        if verifier is None:
            return ()
        stop.may_interrupt = True
        channel.progress("Loading models to compare", 0, 0)
        try:
            return verifier(directory)
        finally:
            stop.may_interrupt = False

    stop.may_interrupt = False
    result = merge(plan, channel.progress, lambda: stop.is_asked, verify)
    report = None if verifier is None else verifier.report
    accepted = None if verifier is None else verifier.accepted
    return {
        **describe(plan, report, accepted),
        "output": command.out.name,
        "weight_bytes": result.weight_bytes,
        "seconds": round(result.seconds, 3),
        "warnings": [*(_public(warning, command) for warning in plan.warnings), *notes(command.to)],
        "table": "" if report is None else report.table(),
    }


def _described(error: ServingError, command: MergeCommand) -> dict[str, Any]:
    metadata = {key: _public(value, command) for key, value in error.metadata.items()}
    if "field" in metadata:
        metadata["field"] = _FIELDS.get(metadata["field"], metadata["field"])
    return {
        "code": error.code.value,
        "reason": error.reason,
        "message": _public(error.message, command),
        "metadata": metadata,
    }


def _public(text: str, command: MergeCommand) -> str:
    """A message as a client needs it: without directories of this machine, and with its fields for our flags."""
    for directory in (command.work, command.out.parent):
        text = text.replace(f"{directory}/", "")
    model = Path(command.model)
    if model.is_absolute():
        text = text.replace(f"{model}", model.name)
    return _FLAG.sub(lambda found: _FIELDS.get(found[1], found[1].replace("-", "_")), text)


if __name__ == "__main__":
    status = main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)  # to tear torch and transformers down takes seconds
