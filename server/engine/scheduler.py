"""Which tokens of which requests run in the next step. Imports no torch; used by the engine on the step thread.

A step has a budget of tokens. Decodes come first (one token each), then prompts that are under way, then the waiting: a
prompt longer than what is left is computed in chunks over several steps. Those that run are ordered by age; of those
that wait, the one whose adapter has received least goes first (`fair_share.py`), and the older one among equals.

A request is admitted when each of its adapters runs fewer requests than it may, they have a slot, and the KV cache has
blocks for all its tokens. Waiting for an adapter holds nobody else up (within the bound of `waiting.py`), nor does an
adapter's own cap; waiting for blocks does, or a large prompt would never get in. When a decode needs a block and there
is none, the youngest running request is preempted: it gives back blocks and slot, keeps its output and its adapter
versions, and is computed again (mostly from the prefix cache) when there is room.

Nobody starves. Let running requests be bounded by max_tokens. A request that runs ends or is preempted: a step computes
a token of every decode and some of the oldest prompt under way, and only finitely many prompts are older than one. Take
the oldest request B that has not ended, of the base, of one adapter or of several.
1. B running is never preempted, except alone, and alone it fits (`check_fits`).
2. B waiting is the elder (`waiting.py`), and nobody becomes older: after `max_wait_s` it goes first, until it runs.
   From then on no other request with one of its adapters is admitted. Those that run end, so none of its adapters is at
   its cap any more (all at once, not one after the other), and B is looked at before everybody else in every pass,
   parked or not: the oldest parked and the oldest untried lane are in each.
3. B is looked at first and its slot is there: nobody is admitted before B has its blocks and a place among the running.
   Those that run end, so it gets them.
4. B is looked at first and its slot is not there: it is the oldest parked request, and after 2 x bound no request with
   an adapter is admitted but B. Those that run end, the reserved slot (below) is given back, B's adapters are asked
   for, no others are, and by the promise of `AdapterPort` its slot comes; then 3.
When B ends, the next oldest is B. Ages never change, and only finitely many requests are older than any given one.

The one request that has its adapter but waits for blocks keeps the activation (`_reserved`), so that its adapter cannot
be evicted again meanwhile. There is never more than one, and a hold or its adapter's cap ends it.
"""

import bisect
import itertools
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ...adapters.errors import ServingError
from ..errors import PromptTooLongError
from .adapter_port import AdapterPort
from .block_manager import BlockManager, IntegrityError
from .chunk_budget import ChunkBudget
from .fair_share import INPUT_TOKEN, OUTPUT_TOKEN, FairShare
from .lanes import Lane
from .limits import LimitsOf, unlimited
from .request import NO_SLOT, Phase, Request
from .waiting import WaitingLanes

_by_order = operator.attrgetter("order")


class ScheduledRequest(NamedTuple):
    """Tokens [start, start + num_tokens) of a request.

    `samples` when its last known token is among them; the rows of the last `num_scored` score the tokens after them.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    num_scored: int = 0


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """What runs in one forward pass: sorted by slot (base first), by age within a slot."""

    requests: list[ScheduledRequest]

    @property
    def num_tokens(self) -> int:
        """Rows of the flat batch."""
        return sum(item.num_tokens for item in self.requests)


@dataclass(slots=True)
class Plan:
    """A step, and what happened to requests while it was made.

    Attributes:
        step: may be empty.
        admitted: requests that run for the first time.
        preempted: requests that went back to waiting.
        failed: requests whose adapter cannot be served any more; the scheduler has forgotten them.
    """

    step: ScheduledStep
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    failed: list[tuple[Request, ServingError]] = field(default_factory=list)


class Scheduler:
    """Continuous batching over paged KV and device slots.

    Args:
        blocks: the KV blocks, all of them the scheduler's.
        adapters: activates adaptations.
        max_running: requests in a step at most, at least 1.
        token_budget: tokens in a step at most, at least max_running.
        limits_of: weight and cap by adapter id.
        starvation_bound_s: seconds a request may be blocked by its adapter before younger ones are held back.
        max_wait_s: seconds an adapter may wait without an admission before it is set back to the others' counters, and
            seconds after which the oldest request of all goes first.
        watermark: share of the blocks to leave for the growth of running requests when another one is admitted.
        max_adapter_tries: vain `try_activate` calls per step.
        max_slowdown: how many times as long as without them a step of decodes may take with tokens of prompts beside
            them, above 1; 0: any. See `chunk_budget.py`.
        padded_sizes: tokens to which steps with tokens of prompts are padded, ascending; none: they are not.
    """

    def __init__(
        self,
        blocks: BlockManager,
        adapters: AdapterPort,
        *,
        max_running: int,
        token_budget: int,
        limits_of: LimitsOf = unlimited,
        starvation_bound_s: float = 2.0,
        max_wait_s: float = 30.0,
        watermark: float = 0.01,
        max_adapter_tries: int = 32,
        max_slowdown: float = 0.0,
        padded_sizes: Sequence[int] = (),
    ) -> None:
        if not 1 <= max_running <= token_budget:
            raise ValueError(f"max_running ({max_running}) must be 1 to token_budget ({token_budget})")
        self.blocks = blocks
        self.limits_of = limits_of
        self.running: list[Request] = []  # oldest first
        self._adapters = adapters
        self._shares = FairShare(limits_of, max_wait_s)
        self._waiting = WaitingLanes(starvation_bound_s, max_adapter_tries, self._shares)
        self._max_running = max_running
        self._token_budget = token_budget
        self._chunks = ChunkBudget(max_slowdown, token_budget, padded_sizes)
        self._spare = round(watermark * blocks.num_blocks)
        self._reserved: Request | None = None
        self._orders = itertools.count()

    @property
    def num_waiting(self) -> int:
        """Requests that wait, preempted ones included."""
        return len(self._waiting)

    @property
    def max_tokens(self) -> int:
        """Prompt plus output of a request at most; the KV of the last token is never needed."""
        return self.blocks.capacity + 1

    @property
    def wants_another_pass(self) -> bool:
        """Whether an empty plan does not yet mean that nothing can run: `schedule` has more to look at."""
        return self._waiting.wants_another_pass

    def check_fits(self, request: Request) -> None:
        """Refuse what could never run. May be called on any thread.

        Raises:
            PromptTooLongError: the prompt and one token more exceed the KV cache.
        """
        length = len(request.prompt_token_ids)
        if length >= self.max_tokens:
            raise PromptTooLongError(
                f"The prompt has {length} tokens; the KV cache of this server holds {self.blocks.capacity}.",
                {"prompt_tokens": str(length), "max_prompt_tokens": str(self.blocks.capacity)},
            )

    def add(self, request: Request) -> None:
        """Put a new request last."""
        request.order = next(self._orders)
        self._waiting.push(request)

    def adapter_ready(self) -> None:
        """Some adapter became resident (`AdapterPort.on_ready`)."""
        self._waiting.adapter_ready()

    def refresh_limits(self) -> None:
        """What `limits_of` returns has changed."""
        self._waiting.refresh_limits()

    def schedule(self, now: float) -> Plan:
        """Plan the next step at `time.monotonic()` second `now`. Running it is not recorded until `complete`."""
        plan = Plan(ScheduledStep([]))
        items = self._decodes(plan)
        budget = min(self._token_budget - len(items), self._chunks.allow(len(items)))
        for request in self.running:
            if budget and not _is_decode(request):
                budget -= self._take(request, budget, items)
        # Who was just preempted would be the first to take the blocks again.
        if not plan.preempted:
            self._admit(now, budget, items, plan)
        items.sort(key=_by_age)  # nearly sorted: stable sorts by one number each take less than one by pairs
        items.sort(key=_by_slot)
        plan.step.requests.extend(items)
        return plan

    def complete(self, step: ScheduledStep) -> None:
        """Record that the step has run: its KV is in the cache. To be called before sampled tokens are appended."""
        size = self.blocks.block_size
        for item in step.requests:
            request, start = item.request, item.start
            request.num_computed_tokens = stop = start + item.num_tokens
            if stop // size > start // size:  # a block is full
                self.blocks.commit(request)

    def measured(self, step: ScheduledStep, seconds: float) -> None:
        """Record what the step took."""
        if not self._chunks.is_bounded:
            return
        decodes = sum(item.num_tokens == 1 for item in step.requests)
        self._chunks.record(decodes, step.num_tokens - decodes, seconds)

    def remove(self, request: Request) -> None:
        """Take back everything a request that has ended holds. Nothing happens the second time."""
        if request.phase is Phase.RUNNING:
            del self.running[bisect.bisect_left(self.running, request.order, key=_by_order)]
            self._give_back(request)
            self._waiting.stopped(request)
        elif request.phase is Phase.WAITING:
            self._waiting.remove(request)
            self._give_back(request)
        request.phase = Phase.FINISHED

    def count_waiting_by_adapter(self) -> dict[str, int]:
        """Waiting requests by adapter id ("" is the base)."""
        return self._shares.waiting_by_adapter()

    def take_waiting_changes(self) -> dict[str, int]:
        """Requests that wait now, of each adapter where that has changed since the last call."""
        return self._shares.take_waiting_changes()

    def check_integrity(self) -> None:
        """Verify every invariant of blocks, lanes and running requests; O(all of them).

        Raises:
            IntegrityError: names what is wrong.
        """
        self.blocks.check_integrity()
        self._waiting.check_integrity()
        orders = [request.order for request in self.running]
        if orders != sorted(set(orders)) or len(orders) > self._max_running:
            raise IntegrityError(f"running: {orders}, at most {self._max_running}")
        for request in self.running:
            if request.phase is not Phase.RUNNING:
                raise IntegrityError(f"{request.request_id} runs and is {request.phase}")
            if (request.slot == NO_SLOT) != (request.adapter is None):
                raise IntegrityError(f"{request.request_id} of {request.adapter} runs in slot {request.slot}")
            if not request.num_computed_tokens < request.num_tokens:
                raise IntegrityError(f"{request.request_id} runs with nothing left to compute")
        running = Counter(adapter_id for request in self.running for adapter_id in request.adapter_ids)
        if running != self._shares.running_by_adapter():
            raise IntegrityError(f"{dict(running)} run, {self._shares.running_by_adapter()} were counted")
        if self.blocks.stats().used != len({block for request in self.running for block in request.block_table}):
            raise IntegrityError("blocks are in use that no running request holds")

    def _decodes(self, plan: Plan) -> list[ScheduledRequest]:
        items: list[ScheduledRequest] = []
        size = self.blocks.block_size
        position = 0
        while position < len(self.running):
            request = self.running[position]
            position += 1
            num_tokens = request.num_tokens
            if request.num_computed_tokens != num_tokens - 1:
                continue
            while len(request.block_table) * size < num_tokens and not self.blocks.grow(request, num_tokens):
                victim = self.running.pop()  # never one of `items`: those are older
                self._preempt(victim)
                plan.preempted.append(victim)
                if victim is request:
                    break
            else:
                self._take(request, 1, items)
        return items

    def _take(self, request: Request, budget: int, items: list[ScheduledRequest]) -> int:
        """Schedule as many of the request's uncomputed tokens as fit, and charge its adapters; returns how many."""
        start = request.num_computed_tokens
        missing, scored = request.num_tokens - start, request.scored
        num_tokens = min(budget, missing)
        samples = num_tokens == missing and scored is None
        num_scored = 0 if scored is None else scored.num_rows(start, start + num_tokens)
        items.append(ScheduledRequest(request, start, num_tokens, samples, num_scored))
        # The one token that a decode computes was counted when it was generated.
        num_input = 0 if start >= len(request.prompt_token_ids) and num_tokens == 1 else num_tokens
        self._waiting.charge(request, num_input * INPUT_TOKEN + samples * OUTPUT_TOKEN)
        return num_tokens

    def _preempt(self, request: Request) -> None:
        self._give_back(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.phase = Phase.WAITING
        self._waiting.push(request)
        self._waiting.stopped(request)

    def _give_back(self, request: Request) -> None:
        """Free the request's blocks and its activation, as far as it has any."""
        self.blocks.free(request)
        if request.slot != NO_SLOT:
            assert request.adapter is not None
            request.slot = NO_SLOT
            self._adapters.deactivate(request.adapter)
            self._waiting.deactivated(request.adapter)
        if request is self._reserved:
            self._reserved = None

    def _admit(self, now: float, budget: int, items: list[ScheduledRequest], plan: Plan) -> None:
        if not len(self._waiting):
            return
        self._waiting.begin(now)
        if self._reserved is not None and not self._waiting.may_pass(self._reserved):
            self._reserve(None)
        while budget and len(self.running) < self._max_running:
            lane = self._waiting.next()
            if lane is None:
                return
            request = lane.head
            try:
                if not self._activate(lane, now):
                    continue
            except ServingError as error:
                for failed in list(lane.requests):
                    self.remove(failed)
                    plan.failed.append((failed, error))
                continue
            num_cached = self.blocks.allocate(request, spare=self._spare if self.running else 0)
            if num_cached is None:
                self._reserve(request)
                return
            self._start(request, num_cached, now, plan)
            budget -= self._take(request, budget, items)
            self._waiting.again(lane)

    def _activate(self, lane: Lane, now: float) -> bool:
        """Make sure that the lane's head has a slot if it needs one; False if its adapter is not there."""
        request = lane.head
        if lane.adaptation is None or request.slot != NO_SLOT:
            return True
        slot = self._adapters.try_activate(lane.adaptation)
        if slot is None:
            self._waiting.park(lane, now)
            return False
        request.slot = slot
        self._waiting.activated(lane.adaptation)
        return True

    def _reserve(self, request: Request | None) -> None:
        """Let `request`, and no other one, keep its slot while it waits for blocks."""
        if self._reserved is not None and self._reserved is not request:
            self._give_back(self._reserved)
        self._reserved = request if request is not None and request.slot != NO_SLOT else None

    def _start(self, request: Request, num_cached: int, now: float, plan: Plan) -> None:
        self._waiting.admitted(request)
        if request is self._reserved:
            self._reserved = None
        request.phase = Phase.RUNNING
        request.num_computed_tokens = num_cached
        if request.first_scheduled is None:
            request.first_scheduled = now
            request.num_cached_tokens = num_cached
            plan.admitted.append(request)
        bisect.insort(self.running, request, key=_by_order)


def _by_age(item: ScheduledRequest) -> int:
    return item.request.order


def _by_slot(item: ScheduledRequest) -> int:
    return item.request.slot


def _is_decode(request: Request) -> bool:
    return request.num_computed_tokens == request.num_tokens - 1
