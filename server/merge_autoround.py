"""Quantizes a merged 16-bit model with auto-round, in a process of its own, whose main module is this one.

A process, because auto-round holds the model and its activations in memory, logs to standard output, ends the process
where it finds an error, and can be stopped in no other way. Its argument is the number of an open file with a JSON
object. It goes on as long as its standard input is open: whoever started it may be killed.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..adapters.carried_text import CARRIED_FILE
from ..adapters.merge.errors import MergeError
from ..adapters.merge.progress import CancelCheck, Progress
from ..adapters.merge.targets import Target
from .base.loader import read_tokenizer
from .errors import ConfigError

# Tokens of a calibration sample, and how many samples are used. Fewer than the fewest say too little about a layer.
SAMPLE_TOKENS: Final = 128
FEWEST_SAMPLES: Final = 16
# AWQ computes each block on all samples 60 times over, and needs few (arXiv 2306.00978).
_MOST_SAMPLES: Final = {Target.AUTOROUND: 128, Target.AWQ: 32, Target.GPTQ: 128}
# What auto-round may write of a model's layers while it works, as a share of the model's bytes (0.16.1, `offload.py`).
OFFLOADED: Final = 1.2
_BATCH: Final = 8
_POLL_S: Final = 0.2
_LOG_LINES: Final = 3
# auto-round's name of a layout, and whether its 4-bit values are symmetric, as the readers of that layout expect.
# What is rounded how: AWQ's layout by AWQ, i.e. weights scaled by their inputs (its search for scales, without that for
# clipping) and rounded to the nearest; the other two by AutoRound, which learns how to round. GPTQ's own algorithm is
# not in auto-round, so `gptq` names the layout alone.
_FORMATS: Final = {
    Target.AUTOROUND: ("auto_round", True),
    Target.AWQ: ("auto_awq", False),
    Target.GPTQ: ("auto_gptq", True),
}
# Its progress bar, in which it tells of blocks of layers (0.16.1, `orchestrator.py`).
_BLOCKS_DONE: Final = re.compile(r"Quantizing [^|\r\n]*\|[^|\r\n]*\| (\d+)/\d+ ")
# Weights that share a scale; the layouts need rows that divide into groups, and NF4 has seen to blocks of 64.
_GROUPS: Final = (128, 64)


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Text that a quantization is measured on.

    Attributes:
        files: that it was read from.
        tokens: int64 [samples, SAMPLE_TOKENS].
    """

    files: tuple[Path, ...]
    tokens: Tensor


def calibration_files(given: Path | None, adapters: Sequence[Path]) -> tuple[Path, ...]:
    """Where the text is: what was given, else what the adapters' folders carry of the text that they learnt."""
    if given is not None:
        return (given,)
    return tuple(path for folder in adapters if (path := folder / CARRIED_FILE).is_file())


def require_autoround(to: Target, files: Sequence[Path]) -> None:
    """Raise ConfigError unless auto-round is installed and there is a text to calibrate with."""
    if importlib.util.find_spec("auto_round") is None:
        raise ConfigError(
            f"--to {to} needs the Python package auto-round, which is not installed. Install it with `pip install "
            "'lorikeet-server[merge]'`."
        )
    if not files:
        raise ConfigError(
            f"--to {to} needs text to calibrate with: give a file of it with --calibration, best of the kind that the "
            f"adapter was trained on, or put it into the adapter's folder as {CARRIED_FILE}."
        )


def calibrate(model: Path, files: Sequence[Path], to: Target) -> Calibration:
    """Read a calibration text.

    Args:
        model: directory whose tokenizer reads it.
        files: UTF-8 texts, one at least.
        to: one of CALIBRATED.

    Raises:
        ConfigError: one cannot be read, or they are too short.
    """
    text = "\n\n".join(map(_read_text, files))
    ids = read_tokenizer(model)(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // SAMPLE_TOKENS
    if count < FEWEST_SAMPLES:
        raise ConfigError(
            f"The calibration text {', '.join(map(str, files))} is too short: it has {len(ids)} tokens, and at least "
            f"{FEWEST_SAMPLES * SAMPLE_TOKENS} are needed."
        )
    samples = torch.tensor(ids[: count * SAMPLE_TOKENS]).view(count, SAMPLE_TOKENS)
    # From everywhere in the text.
    chosen = torch.linspace(0, count - 1, min(count, _MOST_SAMPLES[to])).long()
    return Calibration(tuple(files), samples[chosen])


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"The calibration text {file} is not UTF-8 text.") from None
    except OSError as error:
        raise ConfigError(f"The calibration text {file} cannot be read: {error.strerror}.") from error


def quantize(
    source: Path,
    out: Path,
    to: Target,
    calibration: Calibration,
    *,
    iterations: int,
    blocks: int,
    progress: Progress,
    check: CancelCheck,
) -> None:
    """Quantize a model directory.

    Args:
        source: 16-bit.
        out: where the result goes; made here, and may be partly written when this raises. What auto-round moves out
            of memory lies beside it meanwhile.
        to: one of CALIBRATED.
        calibration: text.
        iterations: of AutoRound for each block.
        blocks: decoder layers, for the progress.
        progress: told of blocks.
        check: asked several times a second.

    Raises:
        MergeError: auto-round failed; with the last lines that it wrote.
        MergeCancelledError: it was stopped.
    """
    out.mkdir()
    work = out.with_name(f"{out.name}-work")
    work.mkdir()
    message = {
        "source": str(source),
        "out": str(out),
        "to": to.value,
        "iterations": iterations,
        "tokens": calibration.tokens.tolist(),
    }
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as given:
        given.write(json.dumps(message).encode())
        given.seek(0)
        process = subprocess.Popen(  # noqa: S603  # this interpreter and a module of ours
            [sys.executable, "-P", "-m", __name__, str(given.fileno())],
            pass_fds=[given.fileno()],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"AR_WORK_SPACE": str(work)},
        )
        try:
            done = -1
            while process.returncode is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
                check()
                found = _blocks_done(_read_log(log))
                if found != done:
                    done = found
                    progress(f"Quantizing ({to})", done, blocks)
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
            shutil.rmtree(work, ignore_errors=True)
        if process.returncode:
            lines = [line for line in _read_log(log).splitlines() if line.strip()]
            said = " ".join(lines[-_LOG_LINES:])
            raise MergeError(f"auto-round could not quantize the merged model. It said: {said}")
    _flatten(out)


def _flatten(out: Path) -> None:
    """Put what auto-round wrote into a directory that it named into the one that it was given."""
    for made in [path for path in out.iterdir() if path.is_dir()]:
        for path in made.iterdir():
            path.rename(out / path.name)
        made.rmdir()


def _blocks_done(log: str) -> int:
    """How many blocks of layers the process has told of."""
    told = _BLOCKS_DONE.findall(log)
    return int(told[-1]) if told else 0


def _read_log(log: Any) -> str:
    """Everything that the process has written so far; the file's position, which is the process's, stays."""
    size = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), size, 0).decode(errors="replace")


def round_dense(directory: Path) -> None:
    """Store what is not quantized in 16 bit: on a CPU without bfloat16 auto-round computes in float32, and writes that.

    Args:
        directory: a quantized model; shards are read and written one by one. The type is the one that its config names.
    """
    config = directory / "config.json"
    settings = json.loads(config.read_text())
    dtype = torch.float16 if settings.get("dtype") == "float16" else torch.bfloat16
    total = 0
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        if any(tensor.dtype == torch.float32 for tensor in tensors.values()):
            tensors = {k: v.to(dtype) if v.dtype == torch.float32 else v.clone() for k, v in tensors.items()}
            save_file(tensors, file, {"format": "pt"})
        file.chmod(config.stat().st_mode)  # safetensors makes files that nobody else may read
        total += sum(tensor.nbytes for tensor in tensors.values())
    config.write_text(json.dumps(settings | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(
            json.dumps(json.loads(index.read_text()) | {"metadata": {"total_size": total}}, indent=2) + "\n"
        )


def _end_with_parent() -> None:
    """End the process when its standard input is closed; a thread's work."""
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    """The process's part."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open(int(sys.argv[1]), encoding="utf-8") as file:
        given = json.load(file)
    layout, symmetric = _FORMATS[Target(given["to"])]
    model = AutoModelForCausalLM.from_pretrained(given["source"], dtype=torch.bfloat16, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(given["source"], local_files_only=True)
    samples = [torch.tensor([sample]) for sample in given["tokens"]]
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name]
    how: dict[str, Any] = {"alg_configs": "awq"} if given["to"] == Target.AWQ else {"iters": given["iterations"]}
    quantizer = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        group_size=next(group for group in _GROUPS if not any(linear.in_features % group for linear in linears)),
        sym=symmetric,
        dataset=samples,
        **how,
        seqlen=SAMPLE_TOKENS,
        nsamples=len(samples),
        batch_size=min(_BATCH, len(samples)),
        enable_torch_compile=False,  # takes longer than it saves at few iterations
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        seed=0,
    )
    quantizer.quantize_and_save(given["out"], format=layout)
    for directory in Path(given["out"]).iterdir():
        round_dense(directory)


if __name__ == "__main__":
    main()
