"""`lorikeet adapters golden DIR`: writes the golden file that a server replays when it loads the adapter."""

import sys
from pathlib import Path
from typing import Final

from ..adapters.golden import (
    DEFAULT_TOLERANCE,
    MAX_PROMPT_TOKENS,
    MAX_PROMPTS,
    MAX_TOLERANCE,
    Golden,
    write_golden,
)
from ..adapters.golden_comparison import EXACT_TOLERANCE, difference
from ..adapters.inspection import inspect_directory
from .cli_print import mebibytes, print_table
from .errors import ConfigError
from .golden_reference import Reference, encode, made_by, reference_logits, require_packages
from .local_base import find_local_base

# Of different kinds and lengths: an adapter rarely leaves all of them alone.
DEFAULT_PROMPTS: Final = (
    "The meaning of the word freedom is",
    "Once upon a time there was",
    "def add(a, b):\n    return",
    "Question: What is the largest planet of the solar system?\nAnswer:",
    "She opened the letter, read it twice and",
    "The committee met on Tuesday to discuss the budget for the coming year, and after a long debate it",
)


def golden(directory: Path, model: str, prompts: list[str], file: Path | None, tolerance: float | None) -> int:
    """Compute the reference and write the file.

    Args:
        directory: the adapter's.
        model: the base it was trained for.
        prompts: texts.
        file: more of them, one a line; with none of both, DEFAULT_PROMPTS.
        tolerance: largest difference, in nats, that a server may show where it computes in 16 bit; None: the default.

    Returns:
        The exit status: 2 if a server would refuse the adapter.

    Raises:
        ConfigError: an argument, or prompts that prove nothing.
        BaseModelError: the base cannot be found, or a package is missing.
    """
    if tolerance is not None and not 0 < tolerance <= MAX_TOLERANCE:
        raise ConfigError(f"--tolerance is {tolerance}; allowed: above 0 to {MAX_TOLERANCE:g}.")
    texts = [*prompts, *([] if file is None else _read_prompts(file))] or list(DEFAULT_PROMPTS)
    require_packages()
    base = find_local_base(model, weights=True)
    outline = base.outline
    # The golden file that is there is what will be replaced, and a server may be told to allow another base.
    found = inspect_directory(
        directory,
        outline.site_table,
        outline.module_table,
        outline.fingerprint,
        allow_other_base=True,
        check_golden=False,
    )
    for warning in found.warnings:
        sys.stderr.write(f"lorikeet: warning: {warning}\n")
    if found.problem is not None:
        sys.stderr.write(f"lorikeet: a server would refuse it ({found.problem.reason}): {found.problem.message}\n")
        return 2
    token_ids = encode(base.directory, texts)
    _check(texts, token_ids)
    reference = reference_logits(
        base.directory,
        found.directory,
        token_ids,
        vocab_size=None if found.report is None else found.report.vocab_size,
        progress=sys.stderr.isatty(),
    )
    made = Golden(
        digest=found.digest,
        prompts=tuple(map(tuple, token_ids)),
        logits=reference.adapted,
        tolerance=DEFAULT_TOLERANCE if tolerance is None else tolerance,
        made_by=made_by(),
        base_model=outline.fingerprint.name if outline.fingerprint.certain else "",
        base_model_sha256=outline.fingerprint.sha256,
    )
    apart = _distance(reference)
    if max(apart) <= made.tolerance:
        raise ConfigError(
            f"With these prompts the adapter answers like the base: {max(apart):.2g} nats apart at most, and "
            f"{made.tolerance:g} are tolerated. Give prompts of the kind that it was trained for (--prompt), or a "
            "lower --tolerance."
        )
    try:
        path = write_golden(directory, made)
    except OSError as error:
        raise ConfigError(f"The golden file cannot be written into {directory}: {error.strerror}.") from error
    _print(path, made, texts, apart)
    return 0


def _read_prompts(file: Path) -> list[str]:
    """The lines of a file but the empty ones."""
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ConfigError(f"--prompts names {file}, which is not UTF-8 text.") from None
    except OSError as error:
        raise ConfigError(f"--prompts names {file}, which cannot be read: {error.strerror}.") from error


def _check(texts: list[str], token_ids: list[list[int]]) -> None:
    if len(texts) > MAX_PROMPTS:
        raise ConfigError(f"There are {len(texts)} prompts; a golden file holds at most {MAX_PROMPTS}.")
    for text, ids in zip(texts, token_ids, strict=True):
        if not 1 <= len(ids) <= MAX_PROMPT_TOKENS:
            raise ConfigError(f"The prompt {text[:40]!r} has {len(ids)} tokens; allowed: 1 to {MAX_PROMPT_TOKENS}.")


def _distance(reference: Reference) -> list[float]:
    """How far each prompt's answer is from the base's, in nats."""
    distances: list[float] = difference(reference.adapted, reference.plain).tolist()
    return distances


def _print(path: Path, made: Golden, texts: list[str], apart: list[float]) -> None:
    rows = [
        (text if len(text) <= 40 else f"{text[:37]}...", str(len(ids)), f"{nats:.3g}")
        for text, ids, nats in zip((t.replace("\n", " ") for t in texts), made.prompts, apart, strict=True)
    ]
    print_table(("PROMPT", "TOKENS", "NATS FROM BASE"), rows)
    sys.stdout.write(
        f"\nwrote {path} ({mebibytes(path.stat().st_size)}) for version {made.digest[:12]}\n"
        f"A server that computes in 16 bit may be {made.tolerance:g} nats off, one in float32 "
        f"{min(made.tolerance, EXACT_TOLERANCE):g}; without the adapter it would be {max(apart):.3g} off.\n"
    )
