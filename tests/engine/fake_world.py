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
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.composition import CompositionPort
from lorikeet.adapters.errors import AdapterUnloadedError
from lorikeet.adapters.record import LEASE_S
from lorikeet.adapters.version import AdapterVersion
from lorikeet.server.engine.block_manager import BlockManager
from lorikeet.server.engine.detokenizer import Detokenizer
from lorikeet.server.engine.engine import Engine
from lorikeet.server.engine.limits import AdapterLimits
from lorikeet.server.engine.request import Delta, Event, Failed, Finished, Request
from lorikeet.server.engine.sampler import Sampler
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.engine.scheduler import ScheduledStep, Scheduler
from lorikeet.server.engine.stop_strings import StopStrings

VOCAB = 26
LEASE_ROUNDS = 8
NEVER = 10**9  # load_steps of an adapter that does not come in
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def version(adapter_id: str, content: str = "1") -> Adaptation:
    """One adapter as it was trained."""
    digest = hashlib.sha256(f"{adapter_id}/{content}".encode()).hexdigest()
    return Adaptation.single(AdapterVersion(adapter_id, digest))


def blend(*parts: tuple[str, float]) -> Adaptation:
    """Several of them, with weights."""
    return Adaptation.of((version(adapter_id).versions[0], weight) for adapter_id, weight in parts)


# What adapts a token: digests and weights.
Applied = tuple[tuple[str, float], ...]


def _applied(adapter: Adaptation | None) -> Applied:
    return tuple((member.version.digest, member.weight) for member in adapter.members) if adapter else ()


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
            entries.append(_entry(_applied(adapter), tokens[len(entries)], len(entries), entries))
        if len(output) == num_tokens:
            return output
        logits = _logits(entries)
        output.append(logits.index(max(logits)))
        tokens.append(output[-1])


class FakeAdapters:
    """An adapter manager with a few device slots; the engine sees it through `port`.

    The loader brings in one wanted version per `step_work`, `load_steps` rounds after it was asked. With `seed` the
    order is random, and unused versions are thrown out now and then, as far as the promises of the port allow.

    What was brought in stays for LEASE_ROUNDS, and so does what is kept for a composition. `now` counts rounds.
    """

    def __init__(self, num_slots: int, *, load_steps: int = 0, seed: int | None = None) -> None:
        self.on_ready = lambda: None
        self.now = 0.0
        self.port = CompositionPort(self, num_slots, clock=lambda: self.now * LEASE_S / LEASE_ROUNDS)
        self.slots: list[AdapterVersion | None] = [None] * num_slots
        self._kept_until: dict[AdapterVersion, float] = {}
        self.active: Counter[AdapterVersion] = Counter()
        self.pins: Counter[AdapterVersion] = Counter()
        self.num_releases = 0
        self.failed: set[AdapterVersion] = set()
        self.num_step_works = 0
        self._wanted: OrderedDict[AdapterVersion, int] = OrderedDict()
        self._used: list[AdapterVersion] = []  # least recently first
        self._load_steps = load_steps
        self._random = random.Random(seed) if seed is not None else None

    def pin(self, adapter: Adaptation | None) -> None:
        self.pins.update(adapter.versions if adapter is not None else ())

    def unpin(self, adapter: Adaptation | None) -> None:
        """What the service does for a request that was refused."""
        self.pins.subtract(adapter.versions if adapter is not None else ())

    def put(self, *adapters: Adaptation) -> None:
        """They are in the first slots from now on."""
        for slot, version in enumerate(version for adapter in adapters for version in adapter.versions):
            self.slots[slot] = version

    def num_users(self, adapter: Adaptation) -> int:
        """Activations of one adapter."""
        return self.active[adapter.versions[0]]

    def fail(self, adapter: Adaptation) -> None:
        """Its versions were dropped by force."""
        self.failed.update(adapter.versions)

    def try_activate(self, adapter: AdapterVersion) -> int | None:
        if adapter in self.failed:
            raise AdapterUnloadedError("gone")
        assert self.pins[adapter] > 0, "asked for a version that nobody pins"
        if adapter not in self.slots:
            self._wanted.setdefault(adapter, self._load_steps)
            if self._load_steps < NEVER:
                self.on_ready()
            return None
        return self._use(adapter)

    def try_activate_all(self, versions: Sequence[AdapterVersion], *, keep: bool) -> list[int] | None:
        if self.failed.intersection(versions):
            raise AdapterUnloadedError("gone")
        if all(version in self.slots for version in versions):
            return [self._use(version) for version in versions]
        for version in versions:
            if version not in self.slots:
                assert self.try_activate(version) is None
            elif keep:
                self._kept_until[version] = self.now + LEASE_ROUNDS
        return None

    def deactivate(self, adapter: AdapterVersion) -> None:
        assert self.active[adapter] > 0, "deactivated more often than activated"
        self.active[adapter] -= 1
        self.on_ready()

    def release(self, adapter: AdapterVersion) -> None:
        assert self.pins[adapter] > 0, "released more often than pinned"
        self.pins[adapter] -= 1
        self.num_releases += 1

    def step_work(self) -> None:
        self.num_step_works += 1
        self.now += 1
        if self._random is not None and self._random.random() < 0.3:
            self._evict()
        for adapter in self._wanted:
            self._wanted[adapter] -= 1
        due = [adapter for adapter, steps in self._wanted.items() if steps <= 0]
        if not due:
            return
        adapter = self._random.choice(due) if self._random else due[0]
        if None not in self.slots:
            self._evict()
        if None in self.slots:
            self.slots[self.slots.index(None)] = adapter
            self._kept_until[adapter] = self.now + 1.5
            self._touch(adapter)
            del self._wanted[adapter]

    def _use(self, adapter: AdapterVersion) -> int:
        self.active[adapter] += 1
        self._kept_until.pop(adapter, None)
        self._touch(adapter)
        return self.slots.index(adapter)

    def _touch(self, adapter: AdapterVersion) -> None:
        if adapter in self._used:
            self._used.remove(adapter)
        self._used.append(adapter)

    def _evict(self) -> None:
        kept = {adapter for adapter, until in self._kept_until.items() if until > self.now}
        idle = [adapter for adapter in self._used if not self.active[adapter] and adapter not in kept]
        if idle:
            victim = self._random.choice(idle) if self._random else idle[0]
            self._used.remove(victim)
            self.slots[self.slots.index(victim)] = None


class FakeRunner:
    """A ModelRunner over the fake KV cache."""

    def __init__(self, adapters: FakeAdapters, num_blocks: int, block_size: int) -> None:
        self.steps: list[ScheduledStep] = []
        self.error: BaseException | None = None  # raised once by the next forward
        self.oom_above: int | None = None  # tokens in a step
        self.nan_for: Request | None = None
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
            if item.samples:
                row = _logits([self._kv[place] for place in places])
                rows.append([float("nan")] * VOCAB if request is self.nan_for else row)
        # Like a real runner's, a step that does not fit may have written some of its KV already.
        if self.oom_above is not None and step.num_tokens > self.oom_above:
            raise torch.OutOfMemoryError("fake")
        self.steps.append(step)
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), VOCAB)

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
            assert item.samples == (item.start + item.num_tokens == request.num_tokens)
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
    ) -> Client:
        """A request that is not submitted yet; its version is pinned."""
        events: list[Event] = []
        request = Request(
            f"r{len(self.clients)}", prompt, params, adapter, events.append, deadline, arrival=self.clock()
        )
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
