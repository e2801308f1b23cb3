"""The ways of deploying one adapter, measured one by one; what was measured before is taken from the cache.

Step times are taken apart from the rest, of all ways of one adapter in turns: see fidelity_steps.py.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorikeet.server.config import ServerConfig
from lorikeet.server.evaluation.comparison import LogitsSource, Unmerged, measure
from lorikeet.server.evaluation.errors import EvaluationError
from lorikeet.server.evaluation.local_engine import LocalEngine, local_engine
from lorikeet.server.evaluation.measured import MeasuredTable, Way
from lorikeet.server.evaluation.report import PathResult
from lorikeet.server.evaluation.transformers_model import TransformersModel
from lorikeet.server.evaluation.windows import cut_all
from tqdm import tqdm

# What `lorikeet merge` is told for a merged way. Quantized ones are made of what the adapters' server answers with.
MERGES = {
    Way.MERGED_ONTO_ORIGINAL: ("--onto", "original", "--to", "bf16"),
    Way.MERGED_ONTO_NF4: ("--onto", "nf4", "--to", "bf16"),
    Way.MERGED_FP32_ONTO_ORIGINAL: ("--onto", "original", "--to", "fp32"),
    Way.MERGED_FP32_ONTO_NF4: ("--onto", "nf4", "--to", "fp32"),
    Way.MERGED_AUTOROUND: ("--onto", "nf4", "--to", "autoround"),
    Way.MERGED_AWQ: ("--onto", "nf4", "--to", "awq"),
    Way.MERGED_GPTQ: ("--onto", "nf4", "--to", "gptq"),
    Way.MERGED_NF4: ("--onto", "nf4", "--to", "nf4", "--accept-loss"),
}
CALIBRATED = (Way.MERGED_AUTOROUND, Way.MERGED_AWQ, Way.MERGED_GPTQ)
# Those that are measured if nobody says which. GPTQ's layout has AutoRound's values, as AutoRound's own has.
USUAL = tuple(
    way for way in Way if way not in (Way.MERGED_GPTQ, Way.MERGED_FP32_ONTO_ORIGINAL, Way.MERGED_FP32_ONTO_NF4)
)


@dataclass(frozen=True, slots=True)
class Subject:
    """One adapter and what it is measured with.

    Attributes:
        name: of the adapter.
        adapter: its folder.
        digest: of its version.
        texts: held-out, each on its own.
        calibration: text of the kind that it was trained on, for auto-round; None: there is none.
    """

    name: str
    adapter: Path
    digest: str
    texts: list[str]
    calibration: Path | None


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same for all adapters.

    Attributes:
        config: base, device and cache.
        base: directory of the 16-bit base.
        context, stride: of the windows.
        iterations: of auto-round.
        work: where merged models lie while they are measured.
        fresh: measure again what was measured before.
        keep: the adapter whose merged models stay there, to be timed; None: none.
    """

    config: ServerConfig
    base: Path
    context: int
    stride: int
    iterations: int
    work: Path
    fresh: bool
    keep: str | None = None

    def settings(self, subject: Subject, way: Way) -> dict[str, Any]:
        """What a result depends on: only one with the same is taken from the cache."""
        text = hashlib.sha256("\0".join(subject.texts).encode()).hexdigest()
        found: dict[str, Any] = {"text": text, "context": self.context, "stride": self.stride}
        found |= {"model": self.config.model, "device": self.config.device, "dtype": self.config.compute_dtype}
        if way in CALIBRATED and subject.calibration is not None:
            calibration = hashlib.sha256(subject.calibration.read_bytes()).hexdigest()
            found |= {"iterations": self.iterations, "calibration": calibration}
        return found


def kept_ways(subject: Subject, setup: Setup, ways: list[Way]) -> dict[Way, PathResult]:
    """What was measured before with the same settings, without step times: those are taken apart."""
    table = MeasuredTable(setup.config.cache_dir, subject.digest)
    found = {way: table.get(way, setup.settings(subject, way)) for way in ways}
    return {way: replace(result, step_s=None) for way, result in found.items() if result is not None}


def measure_ways(
    subject: Subject, setup: Setup, ways: list[Way], bar: "tqdm[Any]"
) -> tuple[dict[Way, PathResult], dict[Way, str]]:
    """Results by way, and why the others have none.

    Args:
        subject: the adapter.
        setup: everything else.
        ways: to measure.
        bar: moved on by one for each way.
    """
    results = {} if setup.fresh else kept_ways(subject, setup, ways)
    bar.update(len(results))
    missing: dict[Way, str] = {}
    left = [way for way in ways if way not in results]
    if not left:
        return results, missing
    table = MeasuredTable(setup.config.cache_dir, subject.digest)
    with local_engine(setup.config, [subject.adapter], context=setup.context) as engine:
        for way in left:
            bar.set_description(f"{subject.name}: {way}")
            try:
                results[way] = _measure_way(way, subject, setup, engine)
                table.put(way, setup.settings(subject, way), results[way])
            except EvaluationError as error:
                missing[way] = error.message
            bar.update()
    return results, missing


@contextmanager
def deployed(
    way: Way, subject: Subject, setup: Setup, engine: LocalEngine
) -> Iterator[tuple[LogitsSource, tuple[int, int]]]:
    """A way, loaded: a model, and its bytes on disk and in memory.

    Raises:
        EvaluationError: it cannot be merged or loaded.
    """
    match way:
        case Way.BASE_NF4:
            base = Unmerged(engine)
            yield base, base.size
        case Way.UNMERGED:
            unmerged = Unmerged(engine, [(subject.adapter, 1.0)])
            yield unmerged, unmerged.size
        case Way.BASE_16BIT:
            model = _model(setup.base, engine)
            yield model, (model.disk_bytes, model.resident_bytes)
        case _:
            with _merged(way, subject, setup) as directory:
                model = _model(directory, engine)
                yield model, (model.disk_bytes, model.resident_bytes)


def _measure_way(way: Way, subject: Subject, setup: Setup, engine: LocalEngine) -> PathResult:
    has_reference = way not in (Way.BASE_NF4, Way.UNMERGED)
    reference = Unmerged(engine, [(subject.adapter, 1.0)]) if has_reference else None
    tokens = [engine.encode(text) for text in subject.texts]
    windows = cut_all(tokens, setup.context, setup.stride)
    with deployed(way, subject, setup, engine) as (source, sizes):
        perplexity, divergence = measure(source, tokens, windows, reference=reference)
    return PathResult(way.value, perplexity, divergence, *sizes)


def _model(directory: Path, engine: LocalEngine) -> TransformersModel:
    return TransformersModel(directory, device=engine.device, compute_dtype=engine.compute_dtype)


def merged_directory(way: Way, subject: Subject, setup: Setup) -> Path:
    """Where a way's merged model lies: named by all that it depends on, so one that is there can be taken."""
    settings = setup.settings(subject, way)
    made_of = json.dumps(
        [MERGES[way], subject.digest, *(settings.get(key) for key in ("model", "iterations", "calibration"))]
    )
    return setup.work / f"{subject.name}-{way.name.lower()}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"


@contextmanager
def _merged(way: Way, subject: Subject, setup: Setup) -> Iterator[Path]:
    """The adapter merged in a process of its own, until the block ends.

    Raises:
        EvaluationError: with the last line that the merge wrote.
    """
    out = merged_directory(way, subject, setup)
    try:
        if not out.is_dir():
            _merge(way, subject, setup, out)
        yield out
    finally:
        if subject.name != setup.keep:
            shutil.rmtree(out, ignore_errors=True)


def _merge(way: Way, subject: Subject, setup: Setup, out: Path) -> None:
    command = [sys.executable, "-P", "-c", "from lorikeet.server.cli import main; main()", "merge", *MERGES[way]]
    command += ["--model", setup.config.model, "--adapter", str(subject.adapter), "--out", str(out), "--unverified"]
    if way in CALIBRATED:
        if subject.calibration is None:
            raise EvaluationError("There is no text to calibrate with.")
        command += ["--calibration", str(subject.calibration), "--iterations", str(setup.iterations)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise EvaluationError((done.stderr.strip().splitlines() or ["`lorikeet merge` failed."])[-1])
