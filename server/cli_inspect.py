"""`lorikeet adapters inspect DIR`: what a folder holds and whether a server would take it, without a server."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..adapters.card import CARD_FILE, HASH_KEY
from ..adapters.fingerprint import BaseFingerprint
from ..adapters.golden import Golden
from ..adapters.inspection import InspectedModule, Inspection, inspect_directory
from .cli_print import mebibytes, print_json_value, print_table

_HEADER = ("MODULES", "COUNT", "RANK", "SCALING", "DELTA NORM")
_OTHERS_HEADER = ("MODULES", "COUNT", "BESIDE LOW RANK")


def inspect(directory: Path, model: str | None, as_json: bool) -> int:
    """Print what was found.

    Args:
        directory: the adapter's.
        model: base to check against, or None.
        as_json: print one JSON object instead of text.

    Returns:
        0 if the files are in order, 2 if a server would refuse them.

    Raises:
        BaseModelError: the base cannot be found or served.
    """
    base = None
    if model is None:
        found = inspect_directory(directory)
    else:
        from .local_base import find_local_base  # imports transformers

        outline = find_local_base(model, weights=False).outline
        base = outline.fingerprint
        found = inspect_directory(
            directory, outline.site_table, outline.module_table, base, vocab_size=outline.vocab_size
        )
    if as_json:
        print_json_value(_as_dict(directory, found, base))
    else:
        _print(directory, found, base)
    return 2 if found.problem else 0


def _print(directory: Path, found: Inspection, base: BaseFingerprint | None) -> None:
    for name, value in _facts(directory, found, base):
        if value:
            sys.stdout.write(f"{name:<14} {value}\n")
    if found.modules:
        sys.stdout.write("\n")
        print_table(_HEADER, _rows(found))
    if found.others:
        sys.stdout.write("\n")
        print_table(_OTHERS_HEADER, _other_rows(found))
    if found.modules or found.others:
        sys.stdout.write("\n")
    for warning in found.warnings:
        sys.stdout.write(f"warning: {warning}\n")
    if found.problem is not None:
        sys.stdout.flush()
        sys.stderr.write(f"lorikeet: a server would refuse it ({found.problem.reason}): {found.problem.message}\n")
    elif found.checked_against_base:
        sys.stdout.write("The files are in order, and names and shapes fit the base.\n")
    else:
        sys.stdout.write(
            "The files are in order. Names and shapes are compared with the base when a server loads them, or with "
            "--model.\n"
        )


def _facts(directory: Path, found: Inspection, base: BaseFingerprint | None) -> Iterator[tuple[str, str]]:
    yield "folder", str(directory)
    yield "version", found.digest
    yield "tensors", str(found.num_tensors or "")
    yield "weights", mebibytes(found.weights_bytes) if found.weights_bytes else ""
    report = found.report
    if report is not None:
        yield "method", report.method
        yield "modules", f"{report.num_modules}, of rank {report.max_rank} at most"
        yield "full modules", str(len(report.full_modules) or "")
        yield "vocabulary", "" if report.vocab_size is None else f"{report.vocab_size} tokens of its own"
        yield "trained for", report.trained_for
    if found.card.base_model_sha256:
        yield "  with hash", f"{found.card.base_model_sha256} ({HASH_KEY} in {CARD_FILE})"
    yield "tokenizer", ", ".join(found.tokenizer.files)
    yield "golden file", "" if found.golden is None else _describe(found.golden)
    if base is not None:
        yield "base", base.name
        yield "  with hash", base.sha256 or "unknown, its weights are not on this machine"


def _describe(golden: Golden) -> str:
    count = len(golden.prompts)
    prompts = f"{count} prompt{'s' if count > 1 else ''}"
    return f"{prompts}, tolerance {golden.tolerance:g}; made by {golden.made_by or 'unknown software'}"


def _rows(found: Inspection) -> Iterator[tuple[str, ...]]:
    """One row for each kind of linear."""
    kinds: dict[str, list[InspectedModule]] = {}
    for name, module in found.modules.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(module)
    for kind, modules in sorted(kinds.items()):
        yield (
            kind,
            str(len(modules)),
            _range(module.scaling.rank for module in modules),
            _range(module.scaling.factor for module in modules),
            _range(module.delta_norm for module in modules),
        )


def _other_rows(found: Inspection) -> Iterator[tuple[str, ...]]:
    """One row for each kind of module and what there is of it."""
    counts = Counter((name.rpartition(".")[2], what) for name, parts in found.others.items() for what in parts)
    for (kind, what), count in sorted(counts.items()):
        yield kind, str(count), what


def _range(values: Iterable[float]) -> str:
    """`2`, or `2 to 5`."""
    ordered = sorted(values)
    least, greatest = f"{ordered[0]:.4g}", f"{ordered[-1]:.4g}"
    return least if least == greatest else f"{least} to {greatest}"


def _as_dict(directory: Path, found: Inspection, base: BaseFingerprint | None) -> dict[str, object]:
    golden, report = found.golden, found.report
    return {
        "folder": str(directory),
        "version": found.digest,
        "tensors": found.num_tensors,
        "weights_bytes": found.weights_bytes,
        "method": report.method if report else "",
        "trained_for": report.trained_for if report else "",
        HASH_KEY: found.card.base_model_sha256 or "",
        "modules": {
            name: {
                "rank": module.scaling.rank,
                "scaling": module.scaling.factor,
                "delta_norm": module.delta_norm,
            }
            for name, module in found.modules.items()
        },
        "other_parts": {name: list(parts) for name, parts in found.others.items()},
        "full_modules": sorted(report.full_modules) if report else [],
        "vocab_size": report.vocab_size if report else None,
        "tokenizer": list(found.tokenizer.files),
        "golden": golden and {"prompts": len(golden.prompts), "tolerance": golden.tolerance, "made_by": golden.made_by},
        "base": base and {"name": base.name, "sha256": base.sha256},
        "checked_against_base": found.checked_against_base,
        "warnings": list(found.warnings),
        "problem": found.problem and {"reason": found.problem.reason, "message": found.problem.message},
    }
