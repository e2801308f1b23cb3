"""What an evaluation found, as JSON and as a table for people. Imports no torch."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ...adapters.merge.loss_rule import given_up
from .divergence_result import Divergence
from .perplexity import Perplexity


@dataclass(frozen=True, slots=True)
class PathResult:
    """One way to have an adapter's answers.

    Attributes:
        path: what to call it, such as `unmerged on NF4`.
        perplexity: on the text.
        divergence: of its next-token distributions from the unmerged ones; None where that is not to be said.
        disk_bytes: of its weights' files; for a base in NF4, of what is kept of it in 4 bit.
        resident_bytes: of its weights in memory, in the types in which they are stored.
        step_s: median seconds of a decode step of one sequence, timed in turns with the others; None: not timed.
    """

    path: str
    perplexity: Perplexity
    divergence: Divergence | None = None
    disk_bytes: int = 0
    resident_bytes: int = 0
    step_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts; see `from_json`."""
        found = dataclasses.asdict(self)
        found["perplexity"]["value"] = self.perplexity.value if math.isfinite(self.perplexity.value) else None
        return found

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PathResult":
        """What `to_json` made."""
        perplexity = {key: given for key, given in value["perplexity"].items() if key != "value"}
        divergence = value["divergence"]
        return cls(
            **{
                **value,
                "perplexity": Perplexity(**perplexity),
                "divergence": None if divergence is None else Divergence(**divergence),
            }
        )


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """A merged model beside what it was merged from.

    Attributes:
        base: the base in NF4, without an adapter.
        unmerged: the adapters on that.
        merged: the merged model.
        device: where all three ran, such as cpu.
        compute_dtype: of their activations, such as float32.
        context, stride: tokens of the windows (windows.py).
    """

    base: PathResult
    unmerged: PathResult
    merged: PathResult
    device: str
    compute_dtype: str
    context: int
    stride: int

    @property
    def gain(self) -> float:
        """By how much the adapters lower the base's perplexity; 0 or less: they do not help on this text."""
        return self.base.perplexity.value - self.unmerged.perplexity.value

    @property
    def gain_kept(self) -> float | None:
        """Share of that gain that the merged model has; None where there is none to keep."""
        if not self.gain > 0:
            return None
        base, unmerged, merged = (way.perplexity.value for way in (self.base, self.unmerged, self.merged))
        return 1.0 - given_up(base, unmerged, merged)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and numbers, the gain included."""
        ways = {name: getattr(self, name).to_json() for name in ("base", "unmerged", "merged")}
        return {
            **ways,
            "gain_kept": self.gain_kept,
            "device": self.device,
            "compute_dtype": self.compute_dtype,
            "context": self.context,
            "stride": self.stride,
        }

    def table(self) -> str:
        """The three ways, one a line, and what was kept of the gain."""
        kept = self.gain_kept
        gain = (
            "The adapters do not lower the perplexity of this text, so it cannot tell whether they still work."
            if kept is None
            else f"The merged model keeps {kept:.0%} of the perplexity that the adapters gain."
        )
        return f"{table((self.base, self.unmerged, self.merged))}\n{gain}"


_HEADER: Final = ("PATH", "PERPLEXITY", "MEAN KL", "MAX KL", "SAME TOP", "DISK", "MEMORY", "STEP")
_NOTHING: Final = "-"


def table(results: Sequence[PathResult]) -> str:
    """One line each, columns as wide as they need to be."""
    found = rows(results)
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in found
    )


def rows(results: Sequence[PathResult]) -> list[tuple[str, ...]]:
    """The header and a line for each; columns in which there is nothing are left out. KL divergences in nats."""
    found = [_HEADER, *map(_cells, results)]
    columns = [column for column in zip(*found, strict=True) if any(cell != _NOTHING for cell in column[1:])]
    return list(zip(*columns, strict=True))


def _cells(result: PathResult) -> tuple[str, ...]:
    apart = result.divergence
    return (
        result.path,
        f"{result.perplexity.value:.3f}",
        _NOTHING if apart is None else f"{apart.mean:.4f}",
        _NOTHING if apart is None else f"{apart.largest:.3f}",
        _NOTHING if apart is None else f"{apart.agreement:.1%}",
        f"{result.disk_bytes / 2**20:.1f} MiB" if result.disk_bytes else _NOTHING,
        f"{result.resident_bytes / 2**20:.1f} MiB" if result.resident_bytes else _NOTHING,
        _NOTHING if result.step_s is None else f"{result.step_s * 1000:.1f} ms",
    )
