"""The same requests to two servers that must answer alike."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lorikeet.server.app import App

from ..golden.format_oracle import Members
from ..golden.format_requests import Asked, ask

# Two tokens whose log probabilities differ by less may swap.
NEAR_TIE = 1e-3


class Wanted(NamedTuple):
    """A request: adapters with weights (none: the base), prompt, number of tokens."""

    members: Members
    prompt: list[int]
    tokens: int


def answer_all(app: App, wanted: Sequence[Wanted]) -> list[Asked]:
    """All at once; returned when the last has ended well."""
    calls = [ask(app, f"r{i}", members, prompt, tokens) for i, (members, prompt, tokens) in enumerate(wanted)]
    for call in calls:
        call.wait()
    return calls


def token_ids(asked: Asked) -> list[int]:
    """What was answered."""
    return [token.token_id for token in asked.logprobs]


def assert_alike(
    some: Sequence[Asked], others: Sequence[Asked], tolerance: float, near_tie: float = NEAR_TIE, *, least: float = 0.5
) -> None:
    """Logits after the prompt are alike, and so is every token with its log probability, until one falls at a near-tie.

    Args:
        some: the answers of one server.
        others: those of the other to the same requests.
        tolerance: absolute and relative, of logits.
        near_tie: difference of log probabilities below which tokens may swap.
        least: share of the tokens that must be compared, or the comparison says nothing.
    """
    compared = total = 0
    for one, other in zip(some, others, strict=True):
        assert one.members == other.members and one.prompt == other.prompt
        about = " + ".join(f"{weight:g} x {name}" for name, weight in one.members) or "the base"
        (want,), (got,) = one.logits, other.logits
        torch.testing.assert_close(
            got, want, atol=tolerance, rtol=tolerance, msg=lambda text, about=about: f"{about}: {text}"
        )
        total += len(one.logprobs)
        for first, second in zip(one.logprobs, other.logprobs, strict=True):
            likeliest, runner_up = (logprob for _, logprob in first.top[:2])
            if first.token_id != second.token_id:
                assert likeliest - runner_up < near_tie, about
                break
            # Two logits and the sum of all go into a log probability.
            assert abs(first.logprob - second.logprob) < 3 * tolerance * (1 + abs(first.logprob)), about
            compared += 1
    assert compared >= least * total, f"{compared} of {total} tokens were compared"
