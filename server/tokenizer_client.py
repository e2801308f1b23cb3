"""The server's side of a tokenizer process (`tokenizer_process.py`): starts it, asks it, kills it when it is late."""

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import structlog

from .tokenizer_process import pack, unpack

START_S: Final = 60.0
MAX_ANSWER_BYTES: Final = 256 * 2**20
_PASSED: Final = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "LC_ALL", "TZ", "HOME")

log = structlog.stdlib.get_logger(__name__)


class LateError(Exception):
    """No answer: it took too long, or more memory than it may have."""


class TokenizerProcess:
    """One process; it starts when it is first asked, and anew after it was killed. Any thread; one question at a time.

    Args:
        base: gives the zlib-compressed tokenizer.json of the base, as it runs and as it lies on the disk.
    """

    def __init__(self, base: Callable[[], Sequence[bytes]]) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def ask(
        self, message: Mapping[str, Any], blobs: Sequence[bytes], seconds: float, cpu_seconds: float | None = None
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Ask and wait.

        Args:
            message: see tokenizer_process.py.
            blobs: beside it.
            seconds: longest time for the answer, the start of the process not counted.
            cpu_seconds: of the process, 2 more at most; None: as many.

        Raises:
            LateError: there was none.
        """
        with self._lock:
            self._ensure_started()
            return self._ask({"cpu_seconds": cpu_seconds or seconds, **message}, blobs, seconds)

    def start(self) -> None:
        """Start it unless it runs, so that the next question need not wait for that.

        Raises:
            LateError: it did not start.
        """
        with self._lock:
            self._ensure_started()

    def close(self) -> None:
        """End it, also while it is being asked."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()

    def _ensure_started(self) -> None:
        if self._is_closed:
            raise LateError
        if self._process is not None and self._process.poll() is None:
            return
        environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
        self._process = subprocess.Popen(  # noqa: S603  # this interpreter and a module of ours
            [sys.executable, "-P", "-m", f"{__package__}.tokenizer_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={
                **environment,
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
        )
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        self._ask({"do": "base", "cpu_seconds": START_S}, self._base(), START_S)
        if self._is_closed:
            self._process.kill()

    def _ask(
        self, message: Mapping[str, Any], blobs: Sequence[bytes], seconds: float
    ) -> tuple[dict[str, Any], list[bytes]]:
        assert self._process is not None
        deadline = time.monotonic() + seconds
        try:
            self._write(pack(message, blobs), deadline)
            size = int.from_bytes(self._read(8, deadline), "little")
            if size > MAX_ANSWER_BYTES:
                raise LateError
            answer, answered = unpack(self._read(size, deadline))
        except (LateError, OSError):
            status = self._end()
            if not self._is_closed:
                log.warning("tokenizer_process_ended", asked=message["do"], status=status, seconds=seconds)
            raise LateError from None
        if answer.get("exhausted"):
            self._end()  # what it holds now is not known
            raise LateError
        return answer, answered

    def _end(self) -> int:
        """Kill it; returns its exit status."""
        process, self._process = self._process, None
        assert process is not None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        return process.wait()

    def _write(self, data: bytes, deadline: float) -> None:
        assert self._process is not None and self._process.stdin is not None
        rest = memoryview(data)
        while rest:
            _wait(self._process.stdin.fileno(), select.POLLOUT, deadline)
            rest = rest[os.write(self._process.stdin.fileno(), rest[: 2**16]) :]

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        data = bytearray()
        while len(data) < size:
            _wait(self._process.stdout.fileno(), select.POLLIN, deadline)
            chunk = os.read(self._process.stdout.fileno(), size - len(data))
            if not chunk:
                raise LateError  # it ended: by its limits, or the kernel took its memory
            data += chunk
        return bytes(data)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
        raise LateError
