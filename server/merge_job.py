"""Runs a planned merge: writes everything into a hidden directory, checks it, and gives it its name at the end."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from ..adapters.merge.progress import Progress
from ..adapters.merge.staging import staged
from ..adapters.merge.targets import CALIBRATED, Target
from ..adapters.merge.weights import dense_dtype, write_weights
from .base.checkpoint import BaseCheckpoint
from .merge_autoround import quantize
from .merge_card import write_card
from .merge_config import write_config, write_generation_config, write_tokenizer
from .merge_plan import MergePlan

# Looks at a complete merged model before it gets its name. Returns Markdown for its card; raises MergeLossError if the
# model is not to be kept.
Verify = Callable[[Path], Sequence[str]]


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was written.

    Attributes:
        out: the directory.
        weight_bytes: of its safetensors files.
        seconds: that it took.
    """

    out: Path
    weight_bytes: int
    seconds: float


def merge(
    plan: MergePlan, progress: Progress, is_cancelled: Callable[[], bool], verify: Verify | None = None
) -> MergeResult:
    """Merge. When it raises, there is nothing under the final name, nor beside it.

    Args:
        plan: made by `plan_merge`; used once.
        progress: told how far it is.
        is_cancelled: asked about as often.
        verify: looks at the result; None: nobody does.

    Raises:
        MergeCancelledError: it was cancelled.
        MergeDiskError, MergeUnwritableError, MergeOutputExistsError: see `staged`.
        MergeLossError: `verify` refused it.
        MergeError: auto-round failed.
    """
    start = time.monotonic()
    plan.check.is_cancelled = is_cancelled
    request = plan.request
    with staged(request.out) as staging:
        directory = staging
        if request.to in CALIBRATED:
            directory = staging / "merged"
            directory.mkdir()
        _write_model(directory, plan, progress)
        if request.to in CALIBRATED:
            assert plan.calibration is not None
            quantize(
                directory,
                staging / "quantized",
                request.to,
                plan.calibration,
                iterations=request.iterations,
                blocks=plan.base.sites.num_layers,
                progress=progress,
                check=plan.check,
            )
            _replace_by(staging, directory, staging / "quantized")
        plan.check()
        measured = verify(staging) if verify is not None else ()
        write_card(staging, plan, measured)
        plan.check()
        weight_bytes = BaseCheckpoint(staging).nbytes
    return MergeResult(request.out, weight_bytes, time.monotonic() - start)


def _write_model(directory: Path, plan: MergePlan, progress: Progress) -> None:
    to = Target.BF16 if plan.request.to in CALIBRATED else plan.request.to
    itemsize = dense_dtype(to).itemsize
    total = sum(math.prod(parameter.shape) for parameter in plan.parameters) * itemsize
    done = 0

    def count(elements: int) -> None:
        nonlocal done
        done += elements * itemsize
        progress(f"Merging onto {plan.onto.onto}", done, total)

    write_config(directory, plan.base, plan.model, plan.settings, to)
    write_generation_config(directory, plan.base, plan.members)
    write_tokenizer(directory, plan.base, plan.members)
    write_weights(plan.model, plan.parameters, directory, to, count)
    _check_written(directory, plan)


def _check_written(directory: Path, plan: MergePlan) -> None:
    """Make sure that the files can be opened and have every tensor."""
    found: set[str] = set()
    for file in BaseCheckpoint(directory).files:
        with safe_open(file, framework="pt", device="cpu") as shard:
            found.update(shard.keys())
    absent = [parameter.name for parameter in plan.parameters if parameter.name not in found]
    assert not absent, f"not written: {absent[:4]}"


def _replace_by(staging: Path, merged: Path, quantized: Path) -> None:
    """Keep the quantized model, and of the 16-bit one what belongs to its tokenizer, which is as it was given."""
    for path in merged.iterdir():
        keep = path.suffix != ".safetensors" and not path.name.startswith("model.") and path.name != "config.json"
        if keep:
            path.replace(staging / path.name)
        else:
            path.unlink()
    merged.rmdir()
    for path in quantized.iterdir():
        target = staging / path.name
        if not target.exists():
            path.replace(target)
        else:
            path.unlink()
    quantized.rmdir()
