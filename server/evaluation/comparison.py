"""A merged model beside the base and the unmerged adapters that it was made of, on the same text."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from ...adapters.merge.progress import Progress
from ..config import ServerConfig
from .divergence import DivergenceMeter, logprobs_of
from .divergence_result import Divergence
from .errors import EvaluationError
from .local_engine import BASE, LocalEngine, Members, local_engine
from .perplexity import Perplexity, PerplexityMeter
from .report import ComparisonReport, PathResult
from .step_times import Stepper, step_times
from .transformers_model import TransformersModel, disk_bytes
from .windows import Window, choose_sizes, cut_all

LEAST_TOKENS: Final = 128  # below, a perplexity says too little to judge a merge by
_ROUNDS: Final = 5  # in which the models take turns to be timed
_STEPS: Final = 4  # of each in a round


class LogitsSource(Stepper, Protocol):
    """A model that says what comes next."""

    def logits(self, token_ids: Sequence[int], first: int) -> Tensor:
        """Logits that predict the tokens from `first` on: float [len(token_ids) - first, vocab]."""
        ...


class Counter:
    """Counts tokens, for a bar and for whoever else wants to know.

    Args:
        total: how many there are.
        bar: moved on.
        tell: told; None: nobody is.
    """

    def __init__(self, total: int, bar: "tqdm[Any]", tell: Progress | None) -> None:
        self._total, self._bar, self._tell = total, bar, tell
        self._done = 0

    def update(self, tokens: int) -> None:
        """So many more were read."""
        self._bar.update(tokens)
        self._done += tokens
        if self._tell is not None:
            self._tell("Comparing", self._done, self._total)


class Unmerged:
    """Adapters on a local engine, or its base alone, as a `LogitsSource`."""

    is_timed = True

    def __init__(self, engine: LocalEngine, members: Members = BASE) -> None:
        self._engine = engine
        self._members = members

    def logits(self, token_ids: Sequence[int], first: int) -> Tensor:
        """Through the engine's own forward pass."""
        return self._engine.logits(token_ids, first, self._members)

    def decode_step_s(self, prompt: Sequence[int], steps: int) -> float:
        """Of one request alone."""
        return self._engine.decode_step_s(prompt, steps, self._members)

    @property
    def size(self) -> tuple[int, int]:
        """Bytes on disk and in memory: the base in 4 bit, and the adapters."""
        folders = {folder for folder, _ in self._members}
        base = self._engine.base_bytes
        return (
            base + sum(disk_bytes(folder) for folder in folders),
            base + sum(self._engine.adapter_bytes(folder) for folder in folders),
        )


def measure(
    source: LogitsSource,
    texts: Sequence[Sequence[int]],
    windows: Sequence[tuple[int, Window]],
    *,
    reference: LogitsSource | None = None,
    bar: Counter | None = None,
) -> tuple[Perplexity, Divergence | None]:
    """Perplexity of a model, and how far it is from another one; window by window, so that nothing long is kept.

    Args:
        source: the model.
        texts: token ids.
        windows: of them, from `cut_all`.
        reference: whose distributions its own are compared with; None: they are not.
        bar: moved on by the tokens of each window.

    Raises:
        EvaluationError: the vocabularies differ.
    """
    perplexity, divergence = PerplexityMeter(), DivergenceMeter()
    for number, window in windows:
        tokens = list(texts[number][window.start : window.stop])
        first = window.first - window.start
        logits = source.logits(tokens, first)
        targets = torch.tensor(tokens[first:], device=logits.device)
        perplexity.add(logprobs_of(logits, targets).tolist())
        if reference is not None:
            divergence.add(reference.logits(tokens, first), logits)
        if bar is not None:
            bar.update(window.num_scored)
    return perplexity.result(), None if reference is None else divergence.result()


def compare_models(
    config: ServerConfig,
    members: Members,
    merged: Path,
    texts: Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    digests: Sequence[tuple[Path, str]] = (),
    progress: bool = False,
    tell: Progress | None = None,
) -> ComparisonReport:
    """Evaluate base, unmerged adapters and merged model.

    Both models are in memory at the same time, so that nothing but one window's logits is.

    Args:
        config: the base, and where it runs: what `lorikeet serve` would be started with.
        members: adapter folders, with what their effect is multiplied by.
        merged: a model directory that transformers loads; its tokenizer reads the texts.
        texts: held-out text, each on its own.
        context: tokens of a window; None: 1024, or what the model was trained for if that is less.
        stride: tokens between windows; None: half the context.
        digests: adapter folders, with the version that was merged of each.
        progress: show bars on standard error.
        tell: told how far it is, in tokens; None: nobody is.

    Raises:
        TextTooShortError: fewer than LEAST_TOKENS tokens can be scored.
        EvaluationError: a model cannot be evaluated, a size is not allowed, only the adapter knows tokens of the text,
            or a folder has another version by now.
        ServingError: the base or an adapter cannot be served.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(merged, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{merged} has no tokenizer that transformers loads.", {"field": "model"}) from error
    encoded: list[list[int]] = [tokenizer.encode(text) for text in texts]
    # Before minutes are spent on loading.
    cut_all(encoded, *choose_sizes(context, stride, 2**31), least=LEAST_TOKENS)
    with local_engine(config, [folder for folder, _ in members], context=context or 0, progress=progress) as engine:
        _check_comparable(engine, encoded, digests)
        sizes = choose_sizes(context, stride, engine.max_context)
        windows = cut_all(encoded, *sizes, least=LEAST_TOKENS)
        model = TransformersModel(merged, device=engine.device, compute_dtype=engine.compute_dtype)
        base, unmerged = Unmerged(engine), Unmerged(engine, members)
        num_scored = sum(window.num_scored for _, window in windows)
        results: list[PathResult] = []
        with tqdm(total=3 * num_scored, desc="Evaluating", unit="token", disable=not progress) as shown:
            bar = Counter(3 * num_scored, shown, tell)
            for name, source, reference, (disk, resident) in (
                ("base in NF4", base, None, base.size),
                ("unmerged on NF4", unmerged, None, unmerged.size),
                ("merged", model, unmerged, (model.disk_bytes, model.resident_bytes)),
            ):
                perplexity, divergence = measure(source, encoded, windows, reference=reference, bar=bar)
                results.append(PathResult(name, perplexity, divergence, disk, resident))
        models: tuple[Stepper, ...] = (base, unmerged, model)
        times = step_times(dict(enumerate(models)), encoded, rounds=_ROUNDS, steps=_STEPS)
        in_nf4, adapted, as_merged = (
            replace(result, step_s=median(times[number]) if number in times else None)
            for number, result in enumerate(results)
        )
        return ComparisonReport(
            in_nf4,
            adapted,
            as_merged,
            device=str(engine.device),
            compute_dtype=str(engine.compute_dtype).removeprefix("torch."),
            context=sizes.context,
            stride=sizes.stride,
        )


def _check_comparable(
    engine: LocalEngine, encoded: Sequence[Sequence[int]], digests: Sequence[tuple[Path, str]]
) -> None:
    """Raise EvaluationError unless all models can read the texts, and adapters are those that were merged."""
    for folder, digest in digests:
        if engine.digest(folder) != digest:
            raise EvaluationError(
                f"The adapter's folder changed while it was merged: {folder.name} is version "
                f"{engine.digest(folder)[:12]}, and {digest[:12]} was merged. Merge it again.",
                {"field": "adapter"},
            )
    if max(itertools.chain.from_iterable(encoded)) >= engine.vocab_size:
        raise EvaluationError(
            "The text uses tokens that only the adapter knows, so the base cannot be compared on it; give text without "
            "them, or --unverified.",
            {"field": "text"},
        )
