"""What a merged model is written as. Imports no torch."""

from enum import StrEnum
from typing import Final


class Onto(StrEnum):
    """The weights that adapters are added to."""

    ORIGINAL = "original"  # the 16-bit ones
    NF4 = "nf4"  # the values of the NF4 ones, which a server holds and QLoRA trains on


class Target(StrEnum):
    """What the result is written as."""

    BF16 = "bf16"
    FP32 = "fp32"  # twice as large; for comparisons without a rounding
    NF4 = "nf4"
    AUTOROUND = "autoround"
    AWQ = "awq"
    GPTQ = "gptq"


# Those in which linears are not quantized.
DENSE: Final = frozenset({Target.BF16, Target.FP32})
# Those that auto-round makes of a merged 16-bit model; they need text to calibrate with.
CALIBRATED: Final = frozenset({Target.AUTOROUND, Target.AWQ, Target.GPTQ})
