"""A world for the engine without a model: a runner whose output depends on everything that must not go wrong.

The fake KV cache is a flat list of numbers, one per token. The runner writes a number for each token at the place that
the block table says; it is a hash of the adapter *that is in the request's slot*, of the token, of its position, and of
all numbers of the positions before, read through the block table. Logits are a hash of the numbers of the whole prefix.
So a wrong, shared or stale block, a wrong slot, a chunk left out or a stale prefix hit each change the tokens, which
`expected_tokens` gives without any of that machinery.
"""

import functools
import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.server.engine.block_manager import BlockManager
from lorikeet.server.engine.detokenizer import Detokenizer
from lorikeet.server.engine.engine import Engine
from lorikeet.server.engine.limits import AdapterLimits
from lorikeet.server.engine.request import Delta, Event, Failed, Finished, Request, TokenLogprob
from lorikeet.server.engine.sampler import Sampler
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.engine.scheduler import ScheduledStep, Scheduler
from lorikeet.server.engine.scored_text import ScoredText
from lorikeet.server.engine.scoring import Scorer, cut_step
from lorikeet.server.engine.stop_strings import StopStrings

from .fake_adapters import Applied, FakeAdapters, applied

VOCAB = 26
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@functools.cache
def _number(applied: Applied) -> int:
    return int.from_bytes(hashlib.sha256(repr(applied).encode()).digest()[:7])


def _entry(applied: Applied, token: int, position: int, before: list[int]) -> int:
    return hash((_number(applied), token, position, *before))


def _logits(entries: list[int]) -> list[float]:
    state = hash(tuple(entries))
    return [(hash((state, token)) % 65536) / 4096 for token in range(VOCAB)]


def expected_tokens(adapter: Adaptation | None, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of a request that is alone in the world."""
    tokens, entries, output = list(prompt), [], []
    while True:
        while len(entries) < len(tokens):
            entries.append(_entry(applied(adapter), tokens[len(entries)], len(entries), entries))
        if len(output) == num_tokens:
            return output
        logits = _logits(entries)
        output.append(logits.index(max(logits)))
        tokens.append(output[-1])


def expected_scores(adapter: Adaptation | None, tokens: list[int]) -> list[float]:
    """Log probabilities of every token but the first."""
    entries: list[int] = []
    scores: list[float] = []
    for position, token in enumerate(tokens):
        if entries:
            scores.append(torch.tensor(_logits(entries)).log_softmax(-1)[token].item())
        entries.append(_entry(applied(adapter), token, position, entries))
    return scores


class FakeRunner:
    """A ModelRunner over the fake KV cache."""

    def __init__(self, adapters: FakeAdapters, num_blocks: int, block_size: int) -> None:
        self.steps: list[ScheduledStep] = []
        self.error: BaseException | None = None  # raised once by the next forward
        self.oom_above: int | None = None  # tokens in a step
        self.nan_for: Request | None = None
        self._scorer = Scorer()
        self._adapters = adapters
        self._size = block_size
        self._kv = [0] * (num_blocks * block_size)

    def forward(self, step: ScheduledStep) -> torch.Tensor:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self._check(step)
        rows = []
        written: set[int] = set()
        flat: list[list[float]] = []  # logits of every row
        for item in step.requests:
            request = item.request
            applied = self._applied(request.slot)
            places = [
                request.block_table[p // self._size] * self._size + p % self._size
                for p in range(item.start + item.num_tokens)
            ]
            tokens = request.token_ids(item.start, item.start + item.num_tokens)
            for position, token in enumerate(tokens, item.start):
                before = [self._kv[place] for place in places[:position]]
                assert places[position] not in written, "two tokens of a step in one place"
                written.add(places[position])
                self._kv[places[position]] = _entry(applied, token, position, before)
                row = _logits([self._kv[place] for place in places[: position + 1]])
                flat.append([float("nan")] * VOCAB if request is self.nan_for else row)
            if item.samples:
                rows.append(flat[-1])
        pieces = cut_step(step, 3)
        self._scorer.begin(pieces)
        for piece in pieces:
            self._scorer.add(piece, torch.tensor([flat[row] for row in piece.rows]))
        # Like a real runner's, a step that does not fit may have written some of its KV already.
        if self.oom_above is not None and step.num_tokens > self.oom_above:
            raise torch.OutOfMemoryError("fake")
        self.steps.append(step)
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), VOCAB)

    def scores(self) -> dict[Request, list[TokenLogprob] | None]:
        return self._scorer.take()

    def _applied(self, slot: int) -> Applied:
        """What is in the device slots that a batch slot stands for, right now."""
        found = []
        for device_slot, weight in () if slot == -1 else self._adapters.port.expand(slot):
            version = self._adapters.slots[device_slot]
            assert version is not None
            found.append((version.digest, weight))
        return tuple(found)

    def _check(self, step: ScheduledStep) -> None:
        slots = [item.request.slot for item in step.requests]
        assert slots == sorted(slots), "rows of a slot are not contiguous"
        assert len({item.request for item in step.requests}) == len(step.requests)
        for item in step.requests:
            request = item.request
            assert item.num_tokens > 0
            is_last = item.start + item.num_tokens == request.num_tokens
            assert item.samples == (is_last and request.scored is None)
            assert 0 <= item.num_scored <= (0 if request.scored is None else item.num_tokens)
            for version in request.adapter.versions if request.adapter is not None else ():
                assert self._adapters.active[version] > 0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Observer:
    """Writes down what it hears."""

    calls: list[tuple[object, ...]] = field(default_factory=list)

    def on_admitted(self, *args: object) -> None:
        self.calls.append(("admitted", *args))

    def on_first_token(self, *args: object) -> None:
        self.calls.append(("first_token", *args))

    def on_token(self, *args: object) -> None:
        self.calls.append(("token", *args))

    def on_finished(self, *args: object) -> None:
        self.calls.append(("finished", *args))

    def on_step(self, *args: object) -> None:
        self.calls.append(("step", *args))

    def on_preempted(self, *args: object) -> None:
        self.calls.append(("preempted", *args))

    def of(self, name: str) -> list[tuple[object, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


@dataclass(eq=False)
class Client:
    """A request, and what came back."""

    request: Request
    events: list[Event] = field(default_factory=list)

    @property
    def terminals(self) -> list[Event]:
        return [event for event in self.events if not isinstance(event, Delta)]

    @property
    def end(self) -> Finished | Failed | None:
        """The terminal event, checked to be single and last."""
        terminals = self.terminals
        assert len(terminals) <= 1, terminals
        assert not terminals or self.events[-1] is terminals[0]
        return terminals[0] if terminals else None

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events if isinstance(event, Delta) for token in event.token_ids]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))


def greedy(max_tokens: int = 8, **params: Any) -> SamplingParams:
    """Parameters of a greedy request."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **params)


def reason_of(client: Client) -> str:
    """Why a request failed."""
    assert isinstance(client.end, Failed), client.end
    return client.end.error.reason


def make_stream(request: Request) -> Detokenizer:
    """Token 0 is "a", token 25 is "z"."""
    stops = StopStrings(request.params.stop, include_stop=request.params.include_stop)
    return Detokenizer(lambda ids: "".join(chr(97 + i) for i in ids), request.prompt_token_ids, stops)


class World:
    """An engine with everything around it fake."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        num_slots: int = 4,
        max_running: int = 8,
        token_budget: int = 16,
        max_context: int = 200,
        max_waiting: int = 1000,
        eos: tuple[int, ...] = (),
        load_steps: int = 0,
        seed: int | None = None,
        prefix_cache: bool = True,
        watermark: float = 0.0,
        starvation_bound_s: float = 10.0,
        max_wait_s: float = 30.0,
        limits: Mapping[str, AdapterLimits] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.limits = dict(limits or {})  # by adapter id; whoever changes it calls `engine.limits_changed`
        self.clock = clock or Clock()
        self.adapters = FakeAdapters(num_slots, load_steps=load_steps, seed=seed)
        self.blocks = BlockManager(num_blocks, block_size, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(
            self.blocks,
            self.adapters.port,
            max_running=max_running,
            token_budget=token_budget,
            limits_of=lambda adapter_id: self.limits.get(adapter_id, AdapterLimits()),
            starvation_bound_s=starvation_bound_s,
            max_wait_s=max_wait_s,
            watermark=watermark,
            max_adapter_tries=4,
        )
        self.runner = FakeRunner(self.adapters, num_blocks, block_size)
        self.observer = Observer()
        self.engine = Engine(
            self.runner,
            self.scheduler,
            Sampler(eos),
            make_stream,
            self.adapters.port,
            self.observer,
            eos,
            max_context,
            max_waiting,
            clock=self.clock,
        )
        self.clients: list[Client] = []

    def client(
        self,
        prompt: list[int],
        params: SamplingParams = GREEDY,
        adapter: Adaptation | None = None,
        deadline: float | None = None,
        scored: ScoredText | None = None,
    ) -> Client:
        """A request that is not submitted yet; its version is pinned."""
        events: list[Event] = []
        name, arrival = f"r{len(self.clients)}", self.clock()
        request = Request(name, prompt, params, adapter, events.append, deadline, arrival=arrival, scored=scored)
        client = Client(request, events)
        self.clients.append(client)
        self.adapters.pin(adapter)
        return client

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams = GREEDY,
        adapter: Adaptation | None = None,
        deadline: float | None = None,
    ) -> Client:
        client = self.client(prompt, params, adapter, deadline)
        self.engine.submit(client.request)
        return client

    def score(self, text: ScoredText, adapter: Adaptation | None = None, deadline: float | None = None) -> Client:
        client = self.client(text.prompt_token_ids, SamplingParams(), adapter, deadline, text)
        self.engine.submit(client.request)
        return client

    def run(self, max_rounds: int = 2000) -> None:
        """Rounds of the engine until every client has its end."""
        for _ in range(max_rounds):
            if all(client.end for client in self.clients):
                return
            self.engine.step()
            self.clock.now += 0.5
        raise AssertionError([client.request for client in self.clients if not client.end])

    def check_nothing_is_held(self) -> None:
        """After the last request has ended."""
        self.scheduler.check_integrity()
        assert self.blocks.stats().used == 0
        assert not +self.adapters.active
        assert not +self.adapters.pins
        assert self.scheduler.num_waiting == 0 and not self.scheduler.running


def prompt_of(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]
