"""Requests for adapters and sums of adapters to a server in this process, and their comparison with PEFT's answers."""

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.server.app import App
from lorikeet.server.engine.request import Delta, Event, Failed, Finished, Request, TokenLogprob
from lorikeet.server.engine.sampling_params import SamplingParams
from torch import Tensor

from .format_oracle import FormatOracle, Members

# (dtype fp32, tolerance): the same fp32 weights on both sides; matmuls are grouped differently. Absolute, and relative.
TOLERANCE = 2e-4
# Two tokens closer than this in PEFT's logits may swap.
NEAR_TIE = 1e-3
ALTERNATIVES = 5


@dataclass
class Asked:
    """One request and what came back.

    Attributes:
        members: adapter and weight; none is the base.
        logits: that the first token was chosen from, float32 [vocab or more].
    """

    members: Members
    prompt: list[int]
    request: Request
    events: "queue.SimpleQueue[Event]"
    logits: list[Tensor] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def wait(self, timeout_s: float = 120.0) -> None:
        """Collect what comes until the end, which must be a good one."""
        while True:
            match self.events.get(timeout=timeout_s):
                case Delta(logprobs=logprobs):
                    self.logprobs += logprobs
                case Finished():
                    return
                case Failed(error=error):
                    raise AssertionError(f"{self.members}: {error!r}")


def ask(app: App, name: str, members: Members, prompt: Sequence[int], tokens: int) -> Asked:
    """Submit a greedy request of exactly so many tokens."""
    (asked,) = ask_together(app, [(name, members, prompt)], tokens)
    return asked


def ask_together(app: App, wanted: Sequence[tuple[str, Members, Sequence[int]]], tokens: int) -> list[Asked]:
    """Submit such requests, each a name, members and a prompt, when all of them are made, and all between two steps:
    else the first would end before the last begin.
    """
    asked = [_prepare(app, *each, tokens) for each in wanted]
    with app.engine._inbox._changed:  # the step thread takes nothing meanwhile
        for each in asked:
            app.engine.submit(each.request)
    return asked


def _prepare(app: App, name: str, members: Members, prompt: Sequence[int], tokens: int) -> Asked:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=ALTERNATIVES)
    versions = [(app.manager.resolve(adapter), weight) for adapter, weight in members]
    adapter = Adaptation.of(versions) if versions else None
    logits: list[Tensor] = []
    request = Request(name, list(prompt), params, adapter, events.put, capture=logits.append)
    return Asked(members, list(prompt), request, events, logits)


def check(asked: Asked, oracle: FormatOracle) -> None:
    """Compare with PEFT, which computes prompt and answer at once, without a cache and with nobody beside.

    Every token that was chosen is PEFT's choice after the same tokens, or nearly ties with it.
    """
    asked.wait()
    chosen = [token.token_id for token in asked.logprobs]
    assert len(chosen) == asked.request.params.max_tokens
    want = oracle.logits(asked.members, asked.prompt + chosen[:-1])[len(asked.prompt) - 1 :]
    (got,) = asked.logits
    about = ", ".join(f"{weight:g} x {name}" for name, weight in asked.members) or "the base"
    size = want.shape[1]
    _close(got[:size], want[0], f"{about}: logits after the prompt")
    assert torch.isneginf(got[size:]).all(), f"{about}: ids that it does not know can be chosen"
    logs = want.log_softmax(dim=-1)
    for row, token in enumerate(asked.logprobs):
        lead = want[row].max() - want[row, token.token_id]
        assert lead < NEAR_TIE, f"{about}: token {row} is {token.token_id}; PEFT prefers another by {lead:.4f}"
        ids = [token.token_id, *(other for other, _ in token.top)]
        values = torch.tensor([token.logprob, *(logprob for _, logprob in token.top)])
        _close(values, logs[row, ids], f"{about}: log probabilities of token {row}")


def _close(got: Tensor, want: Tensor, about: str) -> None:
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text: f"{about}: {text}")
