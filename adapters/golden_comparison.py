"""Whether a server's logits are those of a golden file.

*The difference* of two rows of logits is the root mean square, over the 64 tokens that the golden row finds likeliest,
of the difference of their log probabilities (nats). The file's is that of its worst prompt. The likeliest tokens are
those that answers consist of; log probabilities ignore a constant that all logits share; a mean over 64 averages the
rounding of 16-bit arithmetic, which is independent from token to token, and keeps a wrong delta's, which is not.

*The tolerance* depends on the arithmetic of the server: a file's own tolerance, by default DEFAULT_TOLERANCE = 0.2,
holds for 16-bit computing; where the server computes in float32, it is EXACT_TOLERANCE = 0.01. Measured on SmolLM2-135M
with the four demo adapters and the prompts of `lorikeet adapters golden` (2-core CPU, torch 2.13.0, 22 November 2026;
not on a GPU; tests/examples/test_demo_proof.py holds what matters of it):

| what runs                                                    | difference, least and greatest of the four |
|---|---|
| the adapter, float32 / bfloat16                              | 0.000004 to 0.000008 / 0.066 to 0.077 |
| no adapter at all                                            | 2.26 to 5.18  |
| scaling times 1.5 / times 0.5                                | 0.73 to 1.77 / 0.87 to 1.75 |
| scaling times 1.1                                            | 0.16 to 0.41  |
| alpha/r taken for alpha/sqrt(r), or the other way round      | 1.96 to 5.49  |
| every q_proj, or another kind of linear, is left out         | 0.10 to 2.72  |
| one of 30 layers is left out                                 | 0.06 to 0.37  |
| one single linear is left out                                | 0.02 to 0.10  |

So float32 finds a single missing linear; 16-bit arithmetic finds a missing adapter, wrong scaling and most missing
kinds of linears, but not every layer of thirty.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .golden import Golden

TOP_TOKENS: Final = 64
EXACT_TOLERANCE: Final = 0.01
# Logits below 64 that were stored as float16 are up to 0.016 off.
HALF_TOLERANCE: Final = 0.03


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a server answers beside what it should.

    Attributes:
        differences: of each prompt, in nats; infinite where a logit is not a number.
        tolerance: largest that is accepted.
    """

    differences: tuple[float, ...]
    tolerance: float

    @property
    def largest(self) -> float:
        """The difference of the worst prompt."""
        return max(self.differences)

    @property
    def ok(self) -> bool:
        """Whether every prompt is within the tolerance."""
        return self.largest <= self.tolerance

    def __str__(self) -> str:
        """`6 prompts, largest difference 0.012 of 0.2`."""
        count = len(self.differences)
        plural = "" if count == 1 else "s"
        return f"{count} prompt{plural}, largest difference {self.largest:.2g} of {self.tolerance:g}"


def difference(golden: Tensor, logits: Tensor) -> Tensor:
    """How far rows of logits are from golden ones; see the module.

    Args:
        golden: [P, V], finite.
        logits: [P, V].

    Returns:
        float64 [P], in nats; infinite where a row is not finite.
    """
    want, got = golden.double().log_softmax(-1), logits.double().log_softmax(-1)
    top = want.topk(min(TOP_TOKENS, want.shape[-1]), -1).indices
    rms = (want.gather(-1, top) - got.gather(-1, top)).square().mean(-1) ** 0.5
    return torch.nan_to_num(rms, nan=math.inf, posinf=math.inf)


def compare(golden: Golden, logits: Tensor, *, exact: bool) -> Comparison:
    """Compare what a server computed with a golden file.

    Args:
        golden: what it should be.
        logits: [P, V], of each prompt's last position.
        exact: whether it was computed in float32.
    """
    tolerance = golden.tolerance
    if exact:
        half = golden.logits.dtype is torch.float16
        tolerance = min(tolerance, HALF_TOLERANCE if half else EXACT_TOLERANCE)
    return Comparison(tuple(difference(golden.logits, logits).tolist()), tolerance)
