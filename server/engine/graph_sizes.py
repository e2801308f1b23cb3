"""The sizes that steps are padded to in order to be replayed as captured graphs, as plain numbers. Imports no torch.

Steps of decodes have one row a request: their graphs have as many rows as requests, close together where a step is
short. Steps with tokens of prompts have more rows than requests. There the rows decide what a step costs, since the
matmul takes 64 at a time, and requests without a row next to nothing: a program of attention and LoRA each that leaves
at once. So their graphs are few: six numbers of tokens by up to four of requests.
"""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import chain
from typing import Final, NamedTuple

# Larger steps are the device's own work, not its launches.
MAX_GRAPH_ROWS: Final = 512
# Rows of steps with tokens of prompts. From 256 on a weight is dequantized, whatever the rows: 64 more cost less there.
_TOKENS: Final = (64, 128, 192, 256, 384, MAX_GRAPH_ROWS)
# Requests of such steps: round numbers of decodes and up to eight prompts.
_REQUESTS: Final = (8, 24, 72, 264)


class GraphSize(NamedTuple):
    """What a graph computes.

    Attributes:
        tokens: rows.
        requests: as many where it is of decodes alone, else fewer.
    """

    tokens: int
    requests: int

    @property
    def is_decode(self) -> bool:
        """Whether no request has more than one row, and each samples."""
        return self.tokens == self.requests


class GraphSizes:
    """What is captured where a step has so many tokens and requests at most.

    Args:
        step_tokens: of a step at most.
        max_requests: of a step at most.

    Attributes:
        decodes: rows of steps of decodes, ascending.
        tokens: rows of steps with tokens of prompts, ascending.
        requests: of steps with tokens of prompts, ascending.
    """

    def __init__(self, step_tokens: int, max_requests: int) -> None:
        steps = chain((1, 2, 4), range(8, 128, 8), range(128, 256, 32), range(256, MAX_GRAPH_ROWS, 64))
        self.decodes = _up_to(min(max_requests, MAX_GRAPH_ROWS), steps)
        self.tokens = _up_to(min(step_tokens, MAX_GRAPH_ROWS), _TOKENS)
        self.requests = _up_to(min(max_requests, _REQUESTS[-1]), _REQUESTS)

    def all(self) -> list[GraphSize]:
        """Those of all graphs, ascending."""
        mixed = (GraphSize(tokens, count) for tokens in self.tokens for count in self.requests if count < tokens)
        return sorted([*(GraphSize(rows, rows) for rows in self.decodes), *mixed])

    def of_decodes(self, requests: int) -> GraphSize | None:
        """The least that has room for so many decodes; None: they are too many."""
        index = bisect_left(self.decodes, requests)
        return GraphSize(self.decodes[index], self.decodes[index]) if index < len(self.decodes) else None

    def of_mixed(self, tokens: int, requests: int) -> GraphSize | None:
        """The least that has room for a step with tokens of prompts; None: it is too large."""
        first = bisect_left(self.requests, requests)
        for rows in self.tokens[bisect_left(self.tokens, tokens) :]:
            if first < len(self.requests) and self.requests[first] < rows:
                return GraphSize(rows, self.requests[first])
        return None


def _up_to(largest: int, sizes: Iterable[int]) -> list[int]:
    return [*(size for size in sizes if size < largest), largest]
