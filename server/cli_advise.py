"""`lorikeet advise`: which way to deploy an adapter fits, from what was measured of it on this machine."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .evaluation.errors import EvaluationError
from .evaluation.measured import MeasuredTable, Way
from .evaluation.report import PathResult, table

REPORT_FILE: Final = "merge_report.json"
_SAME_TEXT: Final = 1e-2  # nats
# (onto, to) of a merge report -> what it measured.
_WAYS: Final = {
    ("original", "bf16"): Way.MERGED_ONTO_ORIGINAL,
    ("nf4", "bf16"): Way.MERGED_ONTO_NF4,
    ("original", "fp32"): Way.MERGED_FP32_ONTO_ORIGINAL,
    ("nf4", "fp32"): Way.MERGED_FP32_ONTO_NF4,
    **{(onto, "autoround"): Way.MERGED_AUTOROUND for onto in ("original", "nf4")},
    **{(onto, "awq"): Way.MERGED_AWQ for onto in ("original", "nf4")},
    **{(onto, "gptq"): Way.MERGED_GPTQ for onto in ("original", "nf4")},
    **{(onto, "nf4"): Way.MERGED_NF4 for onto in ("original", "nf4")},
}


def add_advise(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.description = (
        "Says which way of deploying an adapter fits, with what was measured of it on this machine by `make fidelity`, "
        "or by `lorikeet merge --text` and named with --merged."
    )
    add = parser.add_argument
    add("--adapter", type=Path, required=True, metavar="DIR", help="the adapter's folder")
    add(
        "--merged",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="what `lorikeet merge --text` wrote of it; may be given more than once",
    )
    add("--cache-dir", type=Path, metavar="DIR", help="where measurements are kept [~/.cache/lorikeet]")
    add("--json", action="store_true", help="print one JSON object")


def advise_here(options: argparse.Namespace) -> int:
    """Print the table and the advice.

    Returns:
        The exit status: 2 if nothing was measured.

    Raises:
        EvaluationError: the adapter's folder or a report cannot be read, or is of another adapter.
    """
    from ..adapters.inspection import inspect_directory  # imports torch
    from .config import default_cache_dir
    from .evaluation.advice import advise

    if not options.adapter.is_dir():
        raise EvaluationError(f"{options.adapter} is no directory; give an adapter's.", {"field": "adapter"})
    found = inspect_directory(options.adapter)
    if found.problem is not None:
        raise EvaluationError(f"A server would refuse this adapter: {found.problem.message}", {"field": "adapter"})
    if options.merged:
        measured = _joined([_read_report(directory, found.digest) for directory in options.merged])
    else:
        measured = MeasuredTable(options.cache_dir or default_cache_dir(), found.digest).all()
    if not {Way.BASE_NF4, Way.UNMERGED} <= measured.keys():
        sys.stderr.write(
            "lorikeet: nothing was measured of this adapter on this machine. Merge it with held-out text and name the "
            f"result:\n  lorikeet merge --model BASE --adapter {options.adapter} --text FILE --out OUT\n"
            f"  lorikeet advise --adapter {options.adapter} --merged OUT\n"
            "In a checkout of Lorikeet, `make fidelity` measures every way for the demo's adapters.\n"
        )
        return 2
    lines = advise(measured)
    if options.json:
        rows = {way.value: measured[way].to_json() for way in Way if way in measured}
        sys.stdout.write(json.dumps({"measured": rows, "advice": lines}, indent=2) + "\n")
    else:
        sys.stdout.write(table([measured[way] for way in Way if way in measured]) + "\n\n")
        sys.stdout.write("".join(f"- {line}\n" for line in lines))
    return 0


def _joined(reports: Sequence[Mapping[Way, PathResult]]) -> dict[Way, PathResult]:
    """Several reports as one table.

    Raises:
        EvaluationError: they are not of the same text.
    """
    joined: dict[Way, PathResult] = {}
    for report in reports:
        joined = {**report, **joined}
    # The same text, computed in another order, gives the same loss but for rounding.
    losses = [(report[Way.UNMERGED].perplexity.tokens, report[Way.UNMERGED].perplexity.loss) for report in reports]
    if any(tokens != losses[0][0] or abs(loss - losses[0][1]) > _SAME_TEXT for tokens, loss in losses):
        raise EvaluationError(
            "What --merged names was measured on different texts; merge with the same --text to compare.",
            {"field": "merged"},
        )
    return joined


def _read_report(directory: Path, digest: str) -> Mapping[Way, PathResult]:
    """What a merge measured.

    Raises:
        EvaluationError: there is no report, it is not of this adapter alone at its full strength, or of a form that is
            not advised on.
    """
    try:
        report: dict[str, Any] = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
        members = [(member["version"], member["weight"]) for member in report["adapters"]]
        comparison = report["comparison"]
        onto, to = str(report["onto"]), str(report["to"])
        results = [PathResult.from_json(comparison[name]) for name in ("base", "unmerged", "merged")]
    except (OSError, ValueError, KeyError, TypeError):
        raise EvaluationError(
            f"{directory} has no {REPORT_FILE} that can be read; `lorikeet merge --text FILE` writes one.",
            {"field": "merged"},
        ) from None
    if members != [(digest, 1.0)]:
        raise EvaluationError(
            f"{directory} was merged from another adapter, another version, or with a weight.", {"field": "merged"}
        )
    if (onto, to) not in _WAYS:
        known = ", ".join(sorted({form for _, form in _WAYS}))
        raise EvaluationError(
            f"{directory} was written as {to}, and only these are advised on: {known}. Merge with --to one of them.",
            {"field": "merged"},
        )
    return dict(zip((Way.BASE_NF4, Way.UNMERGED, _WAYS[onto, to]), results, strict=True))
