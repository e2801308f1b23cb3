"""Log probabilities of given tokens, out of the logits of a step's scored rows. Step thread only.

A chunk of a text that is scored needs the logits of nearly all its rows, where a chunk of a prompt needs at most one.
So that the logits of a whole step never exist at a time (512 rows of a vocabulary of 128,000 are 262 MB in float32),
they are computed in pieces. Of each piece remains what was asked for; it comes to the host in one copy at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .distribution import likeliest
from .request import Request, TokenLogprob
from .scheduler import ScheduledRequest, ScheduledStep
from .upload import upload


class Run(NamedTuple):
    """Rows of one request beside each other.

    Attributes:
        request: its `scored` is set.
        first: index in its text of the token that the first row scores.
        num_rows: how many.
    """

    request: Request
    first: int
    num_rows: int


@dataclass(slots=True)
class Piece:
    """Rows whose logits exist at the same time.

    Attributes:
        rows: of the flat batch, in order.
        runs: whose they are, in the same order.
    """

    rows: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """(batch slot, rows) in order."""
        return [(run.request.slot, run.num_rows) for run in self.runs]

    @property
    def targets(self) -> list[int]:
        """The token that each row scores."""
        return [token for request, first, n in self.runs for token in _text(request)[first : first + n]]


def cut_step(step: ScheduledStep, max_rows: int) -> list[Piece]:
    """The scored rows of a step in pieces of at most `max_rows`; none if nothing is scored."""
    pieces: list[Piece] = []
    end = 0
    for item in step.requests:
        end += item.num_tokens
        done = 0
        while done < item.num_scored:
            if not pieces or len(pieces[-1].rows) == max_rows:
                pieces.append(Piece())
            piece = pieces[-1]
            count = min(item.num_scored - done, max_rows - len(piece.rows))
            row = end - item.num_scored + done
            piece.rows.extend(range(row, row + count))
            piece.runs.append(Run(item.request, _first_target(item) + done, count))
            done += count
    return pieces


class Scorer:
    """Collects what the pieces of one step give."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._found: list[Tensor] = []
        self._num_top = 0

    def begin(self, pieces: Sequence[Piece]) -> None:
        """Forget the last step; `pieces` are those of the next."""
        texts = [run.request.scored for piece in pieces for run in piece.runs]
        self._num_top = max((text.num_top for text in texts if text is not None), default=0)
        self._runs, self._found = [], []

    def add(self, piece: Piece, logits: Tensor) -> None:
        """Take a piece's logits, float32 [n, vocab]; they are used up."""
        start = 0
        for request, first, count in piece.runs:
            on_logits = None if request.scored is None else request.scored.on_logits
            if on_logits is not None:
                on_logits(first, logits[start : start + count])
            start += count
        self._runs += piece.runs
        self._num_top = min(self._num_top, logits.shape[-1])  # of a vocabulary that has no more
        self._found.append(_pack(logits, piece.targets, self._num_top))

    def take(self) -> dict[Request, list[TokenLogprob] | None]:
        """Of each request with scored rows, their tokens in order; None where logits were not finite. Waits once."""
        # Let go of at once: the next step with scored rows can be far away, and requests are kept alive by theirs.
        runs, packed, n = self._runs, self._found, self._num_top
        self._runs, self._found = [], []
        if not packed:
            return {}
        words = torch.cat([piece[:, : 2 + 2 * n] for piece in packed]).cpu()
        columns = (
            words[:, 0].tolist(),
            words[:, 1].contiguous().view(torch.float32).tolist(),
            words[:, 2::2].tolist(),
            words[:, 3::2].contiguous().view(torch.float32).tolist(),
        )
        scores: dict[Request, list[TokenLogprob] | None] = {}
        start = 0
        for request, first, count in runs:
            rows = slice(start, start + count)
            start += count
            finite, chosen, ids, alternatives = (column[rows] for column in columns)
            before = scores.setdefault(request, [])
            if before is None or not all(finite):
                scores[request] = None
                continue
            wanted = 0 if request.scored is None else request.scored.num_top
            for token, logprob, others, values in zip(
                _text(request)[first : first + count], chosen, ids, alternatives, strict=True
            ):
                before.append(TokenLogprob(token, logprob, tuple(zip(others[:wanted], values[:wanted], strict=True))))
        return scores


def _pack(logits: Tensor, targets: Sequence[int], num_top: int) -> Tensor:
    """What is wanted of each row, as the host gets it: int32 [n, 2 + 2 num_top].

    Whether the logits are finite (ids that a row's vocabulary lacks are -inf, and are no fault), the bits of the
    target's log probability in float32, then each of the likeliest tokens and the bits of its own. Uses `logits` up.
    """
    at = upload(targets, torch.int64, logits.device).unsqueeze(-1)
    chosen, (values, ids) = logits.gather(-1, at), likeliest(logits, num_top)
    best = logits.amax(-1, keepdim=True)
    # log softmax, in place: there is no room for another tensor of that size.
    total = best + logits.sub_(best).exp_().sum(-1, keepdim=True).log_()
    bits = [(found - total).contiguous().view(torch.int32) for found in (chosen, values)]
    return torch.cat([best.isfinite().int(), bits[0], torch.stack([ids.int(), bits[1]], -1).flatten(1)], -1)


def _first_target(item: ScheduledRequest) -> int:
    return item.start + item.num_tokens - item.num_scored + 1


def _text(request: Request) -> list[int]:
    assert request.scored is not None
    return request.scored.token_ids
