"""Which way fits, said in a few lines with the numbers that were measured. Imports no torch."""

from collections.abc import Mapping
from typing import Final

from ...adapters.merge.loss_rule import MOST_GIVEN_UP, given_up
from .measured import Way
from .report import PathResult

_MIB: Final = 2**20
# In the order of preference where several lose as little.
_SIXTEEN_BIT: Final = (Way.MERGED_ONTO_NF4, Way.MERGED_ONTO_ORIGINAL)
_FOUR_BIT: Final = (Way.MERGED_AUTOROUND, Way.MERGED_AWQ, Way.MERGED_GPTQ)
# Twice as large as 16 bit for what rounding costs: told of where there is nothing in 16 bit.
_THIRTY_TWO_BIT: Final = (Way.MERGED_FP32_ONTO_NF4, Way.MERGED_FP32_ONTO_ORIGINAL)


def advise(measured: Mapping[Way, PathResult]) -> list[str]:
    """Lines of advice.

    Args:
        measured: with the NF4 base and the unmerged adapter, and whatever else there is.
    """
    base, unmerged = measured[Way.BASE_NF4], measured[Way.UNMERGED]
    gain = base.perplexity.value - unmerged.perplexity.value
    more = max(0, unmerged.resident_bytes - base.resident_bytes)
    lines = [
        f"Several adapters, or requests of all kinds: serve it unmerged. Perplexity {unmerged.perplexity.value:.2f} "
        f"(the base alone {base.perplexity.value:.2f}), {_mib(more)} of memory beside the base{_step(unmerged)}.",
        _one_file(measured, gain),
    ]
    worst = measured.get(Way.MERGED_NF4)
    if worst is None:
        lines.append(
            "Never merged and quantized to NF4 again: not measured here; published, it gives up nearly all that the "
            "fine-tune gained (perplexity 4.33, unmerged 3.55)."
        )
    else:
        lines.append(f"Never merged and quantized to NF4 again: {_numbers(worst, measured, gain)}.")
    if gain <= 0:
        lines.append("This adapter does not lower the perplexity of the text it was measured on: look at that first.")
    return lines


def _one_file(measured: Mapping[Way, PathResult], gain: float) -> str:
    dense, four = _best(measured, _SIXTEEN_BIT) or _best(measured, _THIRTY_TWO_BIT), _best(measured, _FOUR_BIT)
    if dense is None and four is None:
        return "One adapter and one file: merge it; no merged way was measured here."
    parts = []
    if dense is not None:
        parts.append(f"{dense.value}: {_numbers(measured[dense], measured, gain)}")
    if four is not None:
        fits = gain > 0 and _loss(measured[four], measured) <= MOST_GIVEN_UP
        judged = "where size counts, " if fits else "not "
        parts.append(f"{judged}{four.value}: {_numbers(measured[four], measured, gain)}")
    return f"One adapter and one file: {'; '.join(parts)}."


def _best(measured: Mapping[Way, PathResult], ways: tuple[Way, ...]) -> Way | None:
    """The one of the lowest perplexity."""
    there = [way for way in ways if way in measured]
    return min(there, key=lambda way: measured[way].perplexity.value) if there else None


def _numbers(result: PathResult, measured: Mapping[Way, PathResult], gain: float) -> str:
    kept = f", keeps {1 - _loss(result, measured):.0%} of the gain" if gain > 0 else ""
    apart = "" if result.divergence is None else f", mean KL {result.divergence.mean:.3f}"
    return f"perplexity {result.perplexity.value:.2f}{kept}{apart}, {_mib(result.disk_bytes)} on disk{_step(result)}"


def _loss(result: PathResult, measured: Mapping[Way, PathResult]) -> float:
    base, unmerged = (measured[way].perplexity.value for way in (Way.BASE_NF4, Way.UNMERGED))
    return given_up(base, unmerged, result.perplexity.value)


def _mib(size: int) -> str:
    return f"{size / _MIB:.1f} MiB"


def _step(result: PathResult) -> str:
    return "" if result.step_s is None else f", {result.step_s * 1000:.1f} ms a step"
