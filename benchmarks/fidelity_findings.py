"""Whether the ways of deploying an adapter come in the published order, and why where they do not, with figures."""

from collections.abc import Mapping
from itertools import pairwise

from lorikeet.server.evaluation.measured import Way
from lorikeet.server.evaluation.report import PathResult

Found = Mapping[Way, PathResult]

PUBLISHED = {Way.UNMERGED: 3.55, Way.MERGED_ONTO_ORIGINAL: 3.60, Way.MERGED_AWQ: 3.88, Way.MERGED_NF4: 4.33}
"""Perplexities; of merged NF4 it is said to be about that of the base before it was fine-tuned."""
GROUPS = (
    (Way.UNMERGED, Way.MERGED_ONTO_NF4, Way.MERGED_ONTO_ORIGINAL),
    (Way.MERGED_AUTOROUND, Way.MERGED_AWQ),
    (Way.MERGED_NF4,),
)
"""From best to worst as published, those that are about as good in one group."""
CLOSE = 0.05
"""Share of the fine-tune's gain that two ways may be apart and still be as good."""


def shares(found: Found) -> dict[Way, float]:
    """Of the perplexity that the adapter gains on the NF4 base, what each way keeps; nothing without a gain."""
    if not {Way.UNMERGED, Way.BASE_NF4} <= found.keys():
        return {}
    base, unmerged = found[Way.BASE_NF4].perplexity.value, found[Way.UNMERGED].perplexity.value
    if not unmerged < base:
        return {}
    ways = [way for group in GROUPS for way in group if way in found]
    return {way: (base - found[way].perplexity.value) / (base - unmerged) for way in ways}


def findings(found: Found, unchanged: float | None) -> list[str]:
    """Sentences, one a line; none while base and unmerged are not measured.

    Args:
        found: what was measured.
        unchanged: share of the NF4 values that are the base's after merging (fidelity_codes.py), if known.
    """
    if not {Way.UNMERGED, Way.BASE_NF4} <= found.keys():
        return []
    kept = shares(found)
    if not kept:
        return ["The adapter does not lower the perplexity of this text."]
    return [_order(kept), *_reasons(found, kept, unchanged)]


def _order(kept: Mapping[Way, float]) -> str:
    """Whether the ways come as published, and which do not."""
    groups = [[way for way in group if way in kept] for group in GROUPS]
    turned = [
        f"{worse} ({kept[worse]:.0%} of the gain) comes before {better} ({kept[better]:.0%})"
        for upper, lower in pairwise(group for group in groups if group)
        for better in upper
        for worse in lower
        if kept[worse] > kept[better] + CLOSE
    ]
    turned += [
        f"{way} ({kept[way]:.0%}) is {'better' if kept[way] > 1 else 'worse'} than unmerged, not about as good"
        for way in groups[0]
        if abs(kept[way] - 1) > CLOSE
    ]
    return f"The order is not as published: {'; '.join(turned)}." if turned else "The order is as published."


def _reasons(found: Found, kept: Mapping[Way, float], unchanged: float | None) -> list[str]:
    perplexity = {way: result.perplexity.value for way, result in found.items()}
    base, unmerged = perplexity[Way.BASE_NF4], perplexity[Way.UNMERGED]
    lines = []
    onto_nf4 = found.get(Way.MERGED_ONTO_NF4)
    if onto_nf4 is not None and onto_nf4.divergence is not None:
        lines.append(
            f"Merged onto NF4's values it is the unmerged adapter but for one rounding to bfloat16: {unmerged:.2f} and "
            f"{perplexity[Way.MERGED_ONTO_NF4]:.2f}, mean KL {onto_nf4.divergence.mean:.4f}."
        )
    original = found.get(Way.MERGED_ONTO_ORIGINAL)
    if original is not None and original.divergence is not None and Way.BASE_16BIT in found:
        better = kept[Way.MERGED_ONTO_ORIGINAL] > 1
        lines.append(
            f"NF4 itself costs this base {base - perplexity[Way.BASE_16BIT]:.2f} of perplexity "
            f"({perplexity[Way.BASE_16BIT]:.2f} in 16 bit, {base:.2f} in NF4). A merge onto the 16-bit weights "
            f"{'does not pay that' if better else 'changes what the adapter is added to'}: "
            f"{perplexity[Way.MERGED_ONTO_ORIGINAL]:.2f} where the unmerged adapter has {unmerged:.2f}, mean KL "
            f"{original.divergence.mean:.2f}."
        )
    quantized = [way for way in GROUPS[1] if way in found]
    if quantized and onto_nf4 is not None:
        costs = " and ".join(f"{way} {perplexity[way] - onto_nf4.perplexity.value:+.2f}" for way in quantized)
        lines.append(
            f"What is quantized again, from the values of NF4 to another grid of 4 bits, is rounded twice: {costs} of "
            "perplexity on the 16-bit model that it is made of."
        )
    if Way.MERGED_NF4 in found:
        merged, share = perplexity[Way.MERGED_NF4], kept[Way.MERGED_NF4]
        line = f"Quantized to NF4 again it has {merged:.2f}, {share:.0%} of the gain from {base:.2f} to {unmerged:.2f}"
        if unchanged is not None:
            line += (
                f": what the adapter adds is small beside NF4's steps, and of the 4-bit values in the weights that it "
                f"changes {unchanged:.2%} are those of the base"
            )
        lines.append(f"{line}.")
    return lines
