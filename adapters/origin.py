"""Where a version came from. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from .report import AdapterReport


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a version was loaded from, and what was found there.

    Attributes:
        directory: real path; the version can be read from there again as long as its content has the same digest.
        report: what was applied.
        warning: something an operator should know, or None.
        loaded_at: Unix seconds.
        name: of the folder or URI, as clients may see it.
    """

    directory: Path
    report: AdapterReport
    warning: str | None
    loaded_at: float
    name: str = ""
