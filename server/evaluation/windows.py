"""A text longer than a model's context, cut into windows so that each token is scored once. Imports no torch.

Windows of `context` tokens begin `stride` tokens apart, and each token is scored in the first window that it is in.
The first window scores all its tokens but the first, which nothing comes before; every later one its last `stride`, and
the last window is moved back so that it is full. So each token after the first window is scored with context - stride
tokens before it at least, and since stride is at most half the context, with at least `stride`. Of 10 tokens, context 4
and stride 2:

    window 0..3 scores 1 2 3,   2..5 scores 4 5,   4..7 scores 6 7,   6..9 scores 8 9

A smaller stride gives tokens more context and takes longer: a text is computed context / stride times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from .errors import EvaluationError, TextTooShortError

DEFAULT_CONTEXT: Final = 1024  # tokens, if the model has so many


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, stop) of a text, of which [first, stop) are scored; first is above start."""

    start: int
    stop: int
    first: int

    @property
    def num_scored(self) -> int:
        """Tokens that are scored here."""
        return self.stop - self.first


class Sizes(NamedTuple):
    """Tokens of a window at most, and between the beginnings of two windows."""

    context: int
    stride: int


def choose_sizes(context: int | None, stride: int | None, max_context: int) -> Sizes:
    """The sizes to take.

    Args:
        context: what was asked for; None: 1024, or all that the model takes if that is less.
        stride: what was asked for; None: half the context.
        max_context: most tokens that the model takes.

    Raises:
        EvaluationError: they are not allowed, or too much for the model.
    """
    if context is not None and context > max_context:
        raise EvaluationError(
            f"The context is {context} tokens; this model takes at most {max_context}.", {"field": "context"}
        )
    chosen = min(DEFAULT_CONTEXT, max_context) if context is None else context
    sizes = Sizes(chosen, max(1, chosen // 2) if stride is None else stride)
    check_sizes(*sizes)
    return sizes


def check_sizes(context: int, stride: int) -> None:
    """Refuse sizes that leave a token without context, or score it twice.

    Raises:
        EvaluationError: names what was given and what is allowed.
    """
    if context < 2:
        raise EvaluationError(f"The context is {context} tokens; allowed: 2 or more.", {"field": "context"})
    if not 1 <= stride <= context // 2:
        raise EvaluationError(
            f"The stride is {stride} tokens; with a context of {context}, allowed: 1 to {context // 2}, half the "
            "context.",
            {"field": "stride"},
        )


def cut(num_tokens: int, context: int, stride: int) -> list[Window]:
    """The windows of one text, in order; none for a text of one token.

    Raises:
        EvaluationError: sizes that are not allowed.
    """
    check_sizes(context, stride)
    found: list[Window] = []
    scored = 1
    while scored < num_tokens:
        stop = min(num_tokens, context if not found else found[-1].stop + stride)
        found.append(Window(max(0, stop - context), stop, scored))
        scored = stop
    return found


def cut_all(texts: Sequence[Sequence[int]], context: int, stride: int, *, least: int = 1) -> list[tuple[int, Window]]:
    """The windows of several texts, each on its own, with the number of the text.

    Args:
        texts: token ids.
        context: tokens of a window at most.
        stride: tokens between the beginnings of two windows.
        least: tokens that are to be scored in all.

    Raises:
        TextTooShortError: fewer than that.
        EvaluationError: sizes that are not allowed.
    """
    found = [(number, window) for number, text in enumerate(texts) for window in cut(len(text), context, stride)]
    num_scored = sum(window.num_scored for _, window in found)
    if num_scored < least:
        raise TextTooShortError(
            f"The text has {sum(map(len, texts))} tokens, of which {num_scored} can be scored (the first of a text has "
            f"nothing before it); at least {least} are needed. Give a longer text.",
            {"field": "text", "scored_tokens": str(num_scored), "least": str(least)},
        )
    return found
