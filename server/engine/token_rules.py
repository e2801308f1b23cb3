"""What token ids mean to a request whose adapter brought a tokenizer of its own. Imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class TokenRules:
    """How a request's tokens are read.

    Attributes:
        decode: all ids to text, without special tokens; bytes that are no UTF-8 become U+FFFD. None: as the base's.
        eos_token_ids: what ends the request unless it ignores them, the base's included.
    """

    decode: Decode | None
    eos_token_ids: frozenset[int]
