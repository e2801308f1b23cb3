"""The table of the fidelity benchmark, for a terminal and as the page docs/fidelity.md."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from lorikeet.server.evaluation.measured import Way
from lorikeet.server.evaluation.report import HEADER, PathResult, cells, table

Results = Mapping[str, Mapping[Way, PathResult]]
Missing = Mapping[str, Mapping[Way, str]]

PUBLISHED = (Way.UNMERGED, Way.MERGED_ONTO_NF4, Way.MERGED_ONTO_ORIGINAL, Way.MERGED_AUTOROUND, Way.MERGED_AWQ)
"""From best to worst as published, ways that are equally good beside each other; merged NF4 comes last."""
CLOSE = 0.05
"""Share of the fine-tune's gain that two ways may be apart and still be as good."""

HEAD = """\
# What each way of deploying an adapter costs

<!-- Written by `make fidelity`. -->

An adapter can be served unmerged on the NF4 base, or merged into one model that is kept in 16 bit or quantized again.
For each of the demo's adapters and its held-out text, every way side by side. All text is scored token by token, each
paragraph on its own, by the log probabilities that each model gives; the ways on NF4 by Lorikeet's own engine, the
others by transformers. KL is the divergence of a way's next-token distributions from those of the unmerged adapter, in
nats. Memory is what the weights take in the types that they are stored in; a step is one decoded token of one sequence.
"""


def text_table(results: Results, missing: Missing) -> str:
    """For a terminal."""
    parts = []
    for name, found in results.items():
        lines = [name, table([found[way] for way in Way if way in found])]
        lines += [f"{way}: missing: {why}" for way, why in missing[name].items()]
        lines += [f"order: {line}" for line in order(found)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def page(results: Results, missing: Missing, settings: Mapping[str, Any], machine: str, plot: str) -> str:
    """The page.

    Args:
        results: by adapter and way.
        missing: why others have none.
        settings: of the run.
        machine: where it ran, in a line.
        plot: path of the picture, from the page.
    """
    parts = [HEAD, f"`{settings['command']}` on {machine}.\n", f"![perplexity and divergence by way]({plot})\n"]
    for name, found in results.items():
        rows = [cells(found[way]) for way in Way if way in found]
        lines = [f"## {name}\n", _markdown(HEADER, rows)]
        lines += [f"\nNot measured: {way}: {why}" for way, why in missing[name].items()]
        lines += [f"\n{line}" for line in order(found)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def order(found: Mapping[Way, PathResult]) -> list[str]:
    """Whether the ways come in the published order: unmerged and merged 16-bit, then 4-bit, then merged NF4."""
    if not {Way.UNMERGED, Way.BASE_NF4} <= found.keys():
        return []
    base, best = found[Way.BASE_NF4].perplexity.value, found[Way.UNMERGED].perplexity.value
    gain = base - best
    if gain <= 0:
        return ["The adapter does not lower the perplexity of this text."]
    kept = {way: (base - found[way].perplexity.value) / gain for way in (*PUBLISHED, Way.MERGED_NF4) if way in found}
    lines = ["Of the perplexity that the adapter gains on the NF4 base, kept: " + _shares(kept) + "."]
    groups = [[kept[way] for way in group if way in kept] for group in (PUBLISHED[:3], PUBLISHED[3:], [Way.MERGED_NF4])]
    as_published = all(
        min(better) >= max(worse) - CLOSE for better, worse in pairwise([group for group in groups if group])
    )
    lines.append(f"The order is {'' if as_published else 'not '}as published.")
    original, sixteen = kept.get(Way.MERGED_ONTO_ORIGINAL), found.get(Way.BASE_16BIT)
    if sixteen is not None and original is not None and original > 1 + CLOSE:
        lines.append(
            "Merged onto the 16-bit weights it is better than unmerged on NF4, because NF4 costs this base itself "
            f"perplexity ({sixteen.perplexity.value:.2f} in 16 bit, {base:.2f} in NF4); such a merge does not pay it."
        )
    return lines


def _shares(kept: Mapping[Way, float]) -> str:
    return ", ".join(f"{way} {share:.0%}" for way, share in kept.items())


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
