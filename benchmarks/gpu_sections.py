"""Runs the parts of a benchmark in order of importance within a time budget, and keeps what each found at once.

A part that fails, or that there is no time for, is named with the reason, and the next one runs: a rented card is not
held twice for one mistake. After an error that leaves the device unusable nothing more can run.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class Budget:
    """Seconds from now on.

    Args:
        seconds: in all.
        clock: seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds that are left; below 0: overdrawn."""
        return self._end - self._clock()


@dataclass(frozen=True, slots=True)
class Section:
    """One part.

    Attributes:
        name: key of its result.
        seconds: that it needs about; it is skipped where less is left.
        run: measures; what it returns is kept as JSON. Gets the seconds that it may take.
    """

    name: str
    seconds: float
    run: Callable[[float], Any]


class Results:
    """What was found so far, in a file.

    Args:
        path: of the JSON; its folder is made if missing.
        head: of the file: machine, settings.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**head, "sections": {}, "skipped": {}, "seconds": {}}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        """Write all of it; a reader never sees half a file."""
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)


def run_sections(sections: Sequence[Section], budget: Budget, results: Results) -> bool:
    """Run what there is time for; returns whether nothing failed."""
    has_failed = False
    is_lost = False
    for section in sections:
        left = budget.left()
        if is_lost:
            _skip(results, section, "the device was lost before")
            continue
        if left < section.seconds:
            _skip(results, section, f"{left:.0f} s are left and it needs about {section.seconds:.0f}")
            continue
        sys.stderr.write(f"{section.name}: {left:.0f} s are left\n")
        begin = time.monotonic()
        try:
            results.content["sections"][section.name] = section.run(left)
        except Exception as error:
            has_failed = True
            traceback.print_exc(file=sys.stderr)
            _skip(results, section, f"failed: {type(error).__name__}: {str(error)[:300]}")
        is_lost = not _release_cached()
        results.content["seconds"][section.name] = round(time.monotonic() - begin, 1)
        results.save()
    return not has_failed


def _skip(results: Results, section: Section, why: str) -> None:
    sys.stderr.write(f"{section.name}: skipped, {why}\n")
    results.content["skipped"][section.name] = why
    results.save()


def _release_cached() -> bool:
    """Give back what a section leaves in the allocator's cache; returns whether the device still answers.

    An illegal access takes the whole process's context with it.
    """
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
