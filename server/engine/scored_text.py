"""What a request asks for that scores a text in place of generating one. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, eq=False)
class ScoredText:
    """A text, and of which of its tokens the log probabilities are wanted, each given all tokens before it.

    The prompt of the request is the text without its last token: what comes after that nobody wants to know. So row i
    of the prompt gives the distribution of token i + 1.

    Attributes:
        token_ids: the text, at least 2.
        next: the next token to score, at first the first one, 1 or more. Those before it have been delivered: a
            preempted request goes on here. Owned by the step thread.
        num_top: how many likeliest alternatives of each token, 0 or more.
        on_logits: for evaluations in this process: receives the logits that tokens are scored with, as the index of the
            first one and float32 [n, vocab], right until it returns; the same again if a step had to be repeated.
            Called on the step thread.
    """

    token_ids: list[int]
    next: int
    num_top: int = 0
    on_logits: "Callable[[int, Tensor], None] | None" = None

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt of its request."""
        return self.token_ids[:-1]

    def num_rows(self, start: int, stop: int) -> int:
        """How many of the prompt's rows [start, stop), the last ones, give distributions that are wanted."""
        return max(0, stop - max(start, self.next - 1))
