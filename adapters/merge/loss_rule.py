"""When a merged model is not written: it has lost too much of what the fine-tune gained. Imports no torch.

A fine-tune takes perplexity on its held-out text from the base's to its own. A merged model whose perplexity gives back
more than half of that is closer to the base than to the adapter. Published, and why `--to nf4` needs consent before
anything is measured: 16-bit adapter on the NF4 base 3.55, merged into NF4 4.33, about what it was before fine-tuning.
"""

import math
from typing import Final

from .targets import Target

MOST_GIVEN_UP: Final = 0.5


def given_up(base: float, unmerged: float, merged: float) -> float:
    """The part of the fine-tune's gain in perplexity that the merge gives back; negative: it gained more.

    Args:
        base, unmerged, merged: perplexities on the same held-out text, the unmerged one below the base's.

    Returns:
        (merged - unmerged) / (base - unmerged).
    """
    assert unmerged < base, "there is no gain to give up"
    return (merged - unmerged) / (base - unmerged)


def refuse_before(to: Target) -> str | None:
    """Why a merge is refused whatever it would measure, or None."""
    if to is not Target.NF4:
        return None
    return (
        "Merged and quantized to NF4 again, an adapter loses most of what it learnt: its delta is smaller than NF4's "
        "steps. Merge to bf16 or autoround, or serve it unmerged"
    )


def refuse_after(base: float, unmerged: float, merged: float) -> str | None:
    """Why a merge whose perplexities are measured is refused, or None."""
    if not unmerged < base:
        return (
            f"The adapter does not lower the perplexity of this text ({base:.2f} without it, {unmerged:.2f} with it), "
            "so the text cannot tell whether the merged model has kept what it learnt: give held-out text of the kind "
            "that it was trained on"
        )
    lost = given_up(base, unmerged, merged)
    if lost <= MOST_GIVEN_UP:  # false for what is no number
        return None
    how_much = f"{lost:.0%} of it" if math.isfinite(lost) else "all of it"
    return (
        f"The fine-tune takes perplexity from {base:.2f} to {unmerged:.2f}; merged it is {merged:.2f}, which gives up "
        f"{how_much}, and at most {MOST_GIVEN_UP:.0%} is accepted"
    )
