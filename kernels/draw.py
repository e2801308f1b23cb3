"""One token of each row of logits on a CPU, all rows in one native call: temperature, top-k, top-p, min-p, the draw.

A row stays in a core's cache from the first step to the last, and what no filter can keep is left out early. The same
as `server/engine/distribution.py`, which runs where there is no library, but for rounding: weights are added up in
another order, and compared instead of their logarithms.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .contract import check
from .native.functions import ADDRESS, COUNT, NUMBER, function

# logits with their row stride; rows, vocab, draws, tokens, threads
_DRAW: Final = ("lorikeet_draw", ADDRESS, COUNT, COUNT, COUNT, ADDRESS, ADDRESS, NUMBER)
_draw: Final = function(*_DRAW)
# `Draw` in native/draw.cpp.
_TABLE: Final = np.dtype(
    [
        ("uniform", np.float64),
        ("inverse_temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
    ]
)


class Draw(NamedTuple):
    """How the token of one row is drawn.

    Attributes:
        uniform: what the cumulative distribution is inverted at, in [0, 1).
        inverse_temperature: above 0, finite.
        top_p: in (0, 1]; of what top_k leaves.
        min_p: a share of the largest probability, in [0, 1].
        top_k: 1 or more; 0: all tokens.
    """

    uniform: float
    inverse_temperature: float
    top_p: float
    min_p: float
    top_k: int


def is_available() -> bool:
    """Whether there is a native library; `draw` is not to be called without."""
    return _draw is not None


def draw(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Draw one token of each row by inverting its cumulative distribution: int64 [n].

    Tokens tied with the last one that a filter keeps are kept, too. A row that holds NaN, or whose largest logit is not
    finite, gives some token of the vocabulary.

    Args:
        logits: float32 [n, vocab] on the CPU, rows contiguous.
        draws: of each row.

    Raises:
        RuntimeError: a tensor breaks this contract.
    """
    num_rows, vocab = logits.shape
    check(
        logits.is_cpu
        and logits.dtype is torch.float32
        and logits.stride(1) == 1
        and len(draws) == num_rows
        and vocab > 0,
        lambda: (
            f"logits must be float32 [{len(draws)}, vocab] on the CPU, rows contiguous,"
            f" got {logits.dtype} {list(logits.shape)} on {logits.device}, strides {list(logits.stride())}"
        ),
    )
    assert _draw is not None  # asked before
    table = np.array(draws, dtype=_TABLE)
    tokens = torch.empty(num_rows, dtype=torch.int64)
    threads = torch.get_num_threads()
    _draw(logits.data_ptr(), logits.stride(0), num_rows, vocab, table.ctypes.data, tokens.data_ptr(), threads)
    return tokens
