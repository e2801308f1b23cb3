"""What every content answers to every prompt, from a quiet server that has only that one adapter."""

import queue
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.golden import Golden, write_golden
from lorikeet.server.app import App
from lorikeet.server.engine.request import Delta, Event, Failed, Finished, Request
from lorikeet.server.engine.sampling_params import SamplingParams

from ..golden.in_process import serving
from .contents import PROVEN, Content

NUM_PROMPTS: Final = 6
MAX_PROMPT: Final = 48
MAX_TOKENS: Final = 48
VOCAB: Final = 384
# Two tokens whose logits are closer than this may swap when a batch is composed in another way; see tests/golden.
NEAR_TIE: Final = 1e-3
# By then the answers of any two contents to a prompt differ, or the prompt is not used.
DISTINCT_BY: Final = 6


@dataclass(frozen=True, slots=True)
class References:
    """Greedy answers.

    Attributes:
        prompts: token ids.
        answers: (digest, or "" for the base; index of the prompt) -> tokens up to the first that might come out as
            another one in another batch.
    """

    prompts: list[list[int]]
    answers: dict[tuple[str, int], list[int]]

    def mismatch(self, digest: str, prompt: int, tokens: list[int]) -> str | None:
        """What is wrong with the first tokens of an answer, or None."""
        want = self.answers[digest, prompt][: len(tokens)]
        if tokens[: len(want)] == want:
            return None
        at = next(i for i, (a, b) in enumerate(zip(tokens, want, strict=False)) if a != b)
        alike = {
            other[:8] or "base"
            for (other, index), answer in self.answers.items()
            if index == prompt and answer[: at + 2] != want[: at + 2] and tokens[at : at + 2] == answer[at : at + 2]
        }
        return f"token {at} of {len(tokens)} is {tokens[at]}, {want[at]} expected; there it is like {alike or 'nobody'}"


def make_references(model: Path, contents: list[Content]) -> References:
    """Ask a server that has one adapter at a time, so that no batch mixes any.

    Also writes golden files of what it answered to the contents that shall have one.
    """
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, MAX_PROMPT, (NUM_PROMPTS + 3,), generator=generator).tolist()
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    with serving(model, contents[0].directory.parent) as app:
        answers = dict(_ask_all(app, "", "", prompts))
        for index, content in enumerate(contents):
            app.manager.load("only", content.directory)
            answers |= _ask_all(app, "only", content.digest, prompts)
            if index in PROVEN:
                _write_golden(app, "only", content, prompts[:2])
            app.manager.unload("only")
    digests = ["", *(content.digest for content in contents)]
    usable = [i for i in range(len(prompts)) if _are_distinct([answers[digest, i] for digest in digests])]
    assert len(usable) >= NUM_PROMPTS, "the contents answer too much alike"
    chosen = usable[:NUM_PROMPTS]
    return References(
        [prompts[i] for i in chosen],
        {(digest, new): answers[digest, old] for digest in digests for new, old in enumerate(chosen)},
    )


def _ask_all(
    app: App, adapter: str, digest: str, prompts: list[list[int]]
) -> Iterator[tuple[tuple[str, int], list[int]]]:
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=2)
    queues: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in prompts]
    for i, prompt in enumerate(prompts):
        adaptation = Adaptation.single(app.manager.resolve(adapter)) if adapter else None
        app.engine.submit(Request(f"{digest}-{i}", list(prompt), params, adaptation, queues[i].put))
    for i, events in enumerate(queues):
        yield (digest, i), _sure_tokens(events)


def _write_golden(app: App, adapter: str, content: Content, prompts: list[list[int]]) -> None:
    logits: list[torch.Tensor] = []
    for i, prompt in enumerate(prompts):
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        params = SamplingParams(temperature=0.0, max_tokens=1)
        adaptation = Adaptation.single(app.manager.resolve(adapter))
        app.engine.submit(Request(f"golden-{i}", list(prompt), params, adaptation, events.put, capture=logits.append))
        while not isinstance(events.get(timeout=60), Finished):
            pass
    golden = Golden(content.digest, tuple(map(tuple, prompts)), torch.stack(logits), 0.2, made_by="a quiet server")
    write_golden(content.directory, golden)


def _sure_tokens(events: queue.SimpleQueue[Event]) -> list[int]:
    tokens: list[int] = []
    is_sure = True
    while True:
        match events.get(timeout=60):
            case Delta(token_ids=token_ids, logprobs=logprobs):
                for token, logprob in zip(token_ids, logprobs, strict=True):
                    (_, best), (_, second) = logprob.top
                    is_sure = is_sure and best - second > NEAR_TIE
                    if is_sure:
                        tokens.append(token)
            case Finished():
                return tokens
            case Failed(error=error):
                raise error


def _are_distinct(answers: list[list[int]]) -> bool:
    beginnings = {tuple(answer[:DISTINCT_BY]) for answer in answers}
    return len(beginnings) == len(answers) and all(len(b) == DISTINCT_BY for b in beginnings)
