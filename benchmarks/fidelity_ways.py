"""The ways of deploying one adapter, measured one by one; what was measured before is taken from the cache."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorikeet.server.config import ServerConfig
from lorikeet.server.evaluation.comparison import LogitsSource, Unmerged, measure, step_seconds
from lorikeet.server.evaluation.errors import EvaluationError
from lorikeet.server.evaluation.local_engine import LocalEngine, local_engine
from lorikeet.server.evaluation.measured import MeasuredTable, Way
from lorikeet.server.evaluation.report import PathResult
from lorikeet.server.evaluation.transformers_model import TransformersModel
from lorikeet.server.evaluation.windows import cut_all
from tqdm import tqdm

# What `lorikeet merge` is told for a merged way.
MERGES = {
    Way.MERGED_ONTO_ORIGINAL: ("--onto", "original", "--to", "bf16"),
    Way.MERGED_ONTO_NF4: ("--onto", "nf4", "--to", "bf16"),
    Way.MERGED_AUTOROUND: ("--to", "autoround"),
    Way.MERGED_AWQ: ("--to", "awq"),
    Way.MERGED_NF4: ("--to", "nf4", "--accept-loss"),
}
CALIBRATED = (Way.MERGED_AUTOROUND, Way.MERGED_AWQ)


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
    """

    config: ServerConfig
    base: Path
    context: int
    stride: int
    iterations: int
    work: Path
    fresh: bool

    def settings(self, subject: Subject, way: Way) -> dict[str, Any]:
        """What a result depends on: only one with the same is taken from the cache."""
        text = hashlib.sha256("\0".join(subject.texts).encode()).hexdigest()
        found: dict[str, Any] = {"text": text, "context": self.context, "stride": self.stride}
        found |= {"model": self.config.model, "device": self.config.device, "dtype": self.config.compute_dtype}
        if way in CALIBRATED and subject.calibration is not None:
            calibration = hashlib.sha256(subject.calibration.read_bytes()).hexdigest()
            found |= {"iterations": self.iterations, "calibration": calibration}
        return found


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
    table = MeasuredTable(setup.config.cache_dir, subject.digest)
    results: dict[Way, PathResult] = {}
    for way in ways:
        kept = table.get(way, setup.settings(subject, way))
        if kept is not None and not setup.fresh:
            results[way] = kept
            bar.update()
    missing: dict[Way, str] = {}
    left = [way for way in ways if way not in results]
    if not left:
        return results, missing
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


def _measure_way(way: Way, subject: Subject, setup: Setup, engine: LocalEngine) -> PathResult:
    unmerged = Unmerged(engine, [(subject.adapter, 1.0)])
    match way:
        case Way.BASE_NF4:
            source = Unmerged(engine)
            return _result(way, source, None, source.size, subject, setup, engine)
        case Way.UNMERGED:
            return _result(way, unmerged, None, unmerged.size, subject, setup, engine)
        case Way.BASE_16BIT:
            model = _model(setup.base, engine)
            sizes = model.disk_bytes, model.resident_bytes
            return _result(way, model, unmerged, sizes, subject, setup, engine)
    with _merged(way, subject, setup) as directory:
        model = _model(directory, engine)
        sizes = model.disk_bytes, model.resident_bytes
        return _result(way, model, unmerged, sizes, subject, setup, engine)


def _model(directory: Path, engine: LocalEngine) -> TransformersModel:
    return TransformersModel(directory, device=engine.device, compute_dtype=engine.compute_dtype)


def _result(
    way: Way,
    source: LogitsSource,
    reference: LogitsSource | None,
    sizes: tuple[int, int],
    subject: Subject,
    setup: Setup,
    engine: LocalEngine,
) -> PathResult:
    tokens = [engine.encode(text) for text in subject.texts]
    windows = cut_all(tokens, setup.context, setup.stride)
    perplexity, divergence = measure(source, tokens, windows, reference=reference)
    return PathResult(way.value, perplexity, divergence, *sizes, step_seconds(source, tokens))


@contextmanager
def _merged(way: Way, subject: Subject, setup: Setup) -> Iterator[Path]:
    """The adapter merged in a process of its own, until the block ends.

    Raises:
        EvaluationError: with the last line that the merge wrote.
    """
    out = setup.work / f"{subject.name}-{way.name.lower()}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-P", "-c", "from lorikeet.server.cli import main; main()", "merge", *MERGES[way]]
    command += ["--model", setup.config.model, "--adapter", str(subject.adapter), "--out", str(out), "--unverified"]
    if way in CALIBRATED:
        if subject.calibration is None:
            raise EvaluationError("There is no text to calibrate with.")
        command += ["--calibration", str(subject.calibration), "--iterations", str(setup.iterations)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise EvaluationError((done.stderr.strip().splitlines() or ["`lorikeet merge` failed."])[-1])
        yield out
    finally:
        shutil.rmtree(out, ignore_errors=True)
