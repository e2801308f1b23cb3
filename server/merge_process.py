"""Runs one merge in a process of its own (`merge_worker.py`), and sees to it that nothing of it is left when it failed.

Runs on the event loop's thread. The process ends when its standard input is closed: to cancel it is to close that, and
a server that dies, however, closes it too.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from typing import Any, BinaryIO, Final

import structlog

from ..adapters.errors import Code, ServingError
from ..adapters.merge.errors import MergeCancelledError
from ..adapters.merge.staging import remove_leftovers
from .config import ENV_PREFIX, ServerConfig
from .merge_operations import MergeOperation
from .merge_worker import CLEAN_UP_S

# Beyond what the process may take to clean up; then it is killed.
_MORE_S: Final = 5.0
# A line: progress, or a report with its table.
_LINE_BYTES: Final = 2**20
_LOG_BYTES: Final = 4000

log = structlog.stdlib.get_logger(__name__)


class MergeRunner:
    """Implements `RunMerge`.

    Args:
        config: the server's.
    """

    def __init__(self, config: ServerConfig) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        self._environment = {
            **kept,
            # Read by `load_config` there, as by `lorikeet merge`.
            f"{ENV_PREFIX}CACHE_DIR": str(config.cache_dir),
            **({} if config.demo_wheel is None else {f"{ENV_PREFIX}DEMO_WHEEL": str(config.demo_wheel)}),
            "CUDA_VISIBLE_DEVICES": "",  # the device is the server's
            "OMP_NUM_THREADS": str(config.merge_threads),
            "TOKENIZERS_PARALLELISM": "false",
        }

    async def __call__(self, operation: MergeOperation) -> dict[str, Any]:
        """Run it.

        Raises:
            MergeCancelledError: it was cancelled.
            ServingError: it failed; nothing is left of it.
        """
        command = operation.command
        assert command is not None, "it has not ended"
        with tempfile.TemporaryFile(dir=command.work) as said:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                f"{__package__}.merge_worker",
                str(command.work),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=said,
                env=self._environment,
                limit=_LINE_BYTES,
                # Signals of the server's terminal are not for it; its children end with it. Not a session of its own:
                # Linux gives each session a fair share (sched_autogroup), whatever the priority of what runs in it.
                process_group=0,
            )
            ending = asyncio.ensure_future(_end_when_cancelled(process, operation))
            try:
                last = await _follow(process, operation)
            finally:
                ending.cancel()
                _kill(process)  # what auto-round or an evaluation may have left
                status = await process.wait()
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(remove_leftovers, command.out)  # of one that was killed
            if _is_unexpected(last) and not operation.cancelled.is_set():
                log.error("merge_process_ended", operation=operation.name, status=status, log=_tail(said))
        return _result(operation, last, status)


async def _follow(process: asyncio.subprocess.Process, operation: MergeOperation) -> dict[str, Any] | None:
    """Read lines until there are no more; the one that says how it ended."""
    assert process.stdout is not None
    last = None
    async for line in process.stdout:
        message = json.loads(line)
        if "progress" in message:
            operation.tell(**message["progress"])
        else:
            last = message
    return last


async def _end_when_cancelled(process: asyncio.subprocess.Process, operation: MergeOperation) -> None:
    await operation.cancelled.wait()
    assert process.stdin is not None
    process.stdin.close()
    await asyncio.sleep(CLEAN_UP_S + _MORE_S)
    _kill(process)


def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill a process and all that it started; those that it has left are still of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _result(operation: MergeOperation, last: dict[str, Any] | None, status: int) -> dict[str, Any]:
    if last is not None and "done" in last:
        return dict(last["done"])
    if operation.cancelled.is_set():
        raise MergeCancelledError("The merge was cancelled; nothing is left of it.")
    if last is not None:
        raise _error(last["error"])
    if status == -signal.SIGKILL:
        raise ServingError(
            "The process of the merge was killed, most likely because the machine's memory was full; nothing is left "
            "of it. Free memory, or merge without held-out text (unverified)."
        )
    raise ServingError("The merge failed; the server's log has the details. Nothing is left of it.")


def _error(said: dict[str, Any]) -> ServingError:
    """What ended a merge, as its process said it."""
    error = ServingError(said["message"], said["metadata"])
    error.code, error.reason = Code(said["code"]), said["reason"]
    return error


def _is_unexpected(last: dict[str, Any] | None) -> bool:
    """Whether somebody has to look for the reason."""
    return last is None or ("error" in last and last["error"]["code"] == Code.INTERNAL)


def _tail(said: BinaryIO) -> str:
    size = os.fstat(said.fileno()).st_size
    return os.pread(said.fileno(), _LOG_BYTES, max(0, size - _LOG_BYTES)).decode(errors="replace")
