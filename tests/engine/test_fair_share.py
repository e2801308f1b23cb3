"""Weighted fair share between adapters: the bound of the paper, the lift, floods, and memory that ids do not grow."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.server.engine.block_manager import BlockManager
from lorikeet.server.engine.fair_share import INPUT_TOKEN, MAX_IDLE, OUTPUT_TOKEN, FairShare
from lorikeet.server.engine.limits import AdapterLimits, unlimited
from lorikeet.server.engine.request import Phase, Request
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.engine.scheduler import Scheduler

from .fake_adapters import FakeAdapters, version

NEVER_S = 1e9
LONGEST_PROMPT = 12
LONGEST_OUTPUT = 8
DEAREST = LONGEST_PROMPT * INPUT_TOKEN + LONGEST_OUTPUT * OUTPUT_TOKEN  # one request


class Bench:
    """A scheduler and nobody who runs the steps; every request ends after the tokens it wanted.

    `service` is what each adapter received, in weighted tokens, counted here from the steps.
    """

    def __init__(self, num_blocks: int = 200, weights: dict[str, float] | None = None, **options) -> None:
        limits = {adapter_id: AdapterLimits(weight) for adapter_id, weight in (weights or {}).items()}
        self.adapters = FakeAdapters(16)
        options = {"max_running": 4, "token_budget": 16, "max_wait_s": NEVER_S, **options}
        self.scheduler = Scheduler(
            BlockManager(num_blocks, 4, prefix_cache=False),
            self.adapters.port,
            limits_of=lambda adapter_id: limits.get(adapter_id, AdapterLimits()),
            watermark=0.0,
            starvation_bound_s=NEVER_S,
            **options,
        )
        self.now = 0.0
        self.service: dict[str, float] = {}
        self.num_waiting: dict[str, int] = {}
        self.num_admitted: dict[str, int] = {}

    def add(self, adapter: Adaptation | None, num_prompt: int, num_output: int) -> Request:
        params = SamplingParams(temperature=0.0, max_tokens=num_output)
        request = Request("r", [1] * num_prompt, params, adapter, lambda _: None, arrival=self.now)
        self.adapters.pin(adapter)
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        self.adapters.step_work()
        plan = self.scheduler.schedule(self.now)
        if self.scheduler.num_waiting < 200:  # it looks at all of them
            self.scheduler.check_integrity()
        self.scheduler.complete(plan.step)
        for request in plan.admitted:
            self.num_admitted[request.adapter_id] = self.num_admitted.get(request.adapter_id, 0) + 1
        for item in plan.step.requests:
            request = item.request
            decode = item.start >= len(request.prompt_token_ids) and item.num_tokens == 1
            received = (0 if decode else item.num_tokens) * INPUT_TOKEN + item.samples * OUTPUT_TOKEN
            self.service[request.adapter_id] = self.service.get(request.adapter_id, 0.0) + received
            if item.samples:
                request.output_token_ids.append(1)
                if len(request.output_token_ids) == request.params.max_tokens:
                    self.scheduler.remove(request)
        self.num_waiting = self.scheduler.count_waiting_by_adapter()
        self.now += 1.0

    def bring_in(self, *adapters: Adaptation) -> None:
        """Nobody waits for its adapter to come from here on."""
        self.adapters.put(*adapters)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    weights=st.tuples(st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([0.5, 1.0, 4.0])),
    sizes=st.tuples(*[st.tuples(st.integers(1, LONGEST_PROMPT), st.integers(1, LONGEST_OUTPUT))] * 2),
    same_size=st.booleans(),
    with_base=st.booleans(),
    num_blocks=st.sampled_from([6, 20, 200]),
    max_running=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_services_of_two_that_always_wait_differ_by_a_constant(
    weights, sizes, same_size, with_base, num_blocks, max_running, seed
):
    """Theorem 4.4 of the paper, for any request sizes and arrival rates, beside a third whose requests come and go."""
    rng = random.Random(seed)
    ids = ["f", "" if with_base else "g"]
    pair = [version("f"), None if with_base else version("g")]
    weight = dict(zip(ids, weights, strict=True))
    bench = Bench(num_blocks, weight, max_running=max_running)
    bench.bring_in(*(adapter for adapter in (*pair, version("third")) if adapter is not None))

    def arrive(which: int) -> None:
        prompt, output = sizes[which]
        if not same_size:
            prompt, output = rng.randint(1, prompt), rng.randint(1, output)
        bench.add(pair[which], prompt, output)

    bound = 2 * max_running * DEAREST / min(weights)
    since: dict[str, float] = {}
    for _ in range(400):
        for which, adapter_id in enumerate(ids):
            # One floods, the other has just enough to wait always.
            while bench.num_waiting.get(adapter_id, 0) < max_running + 1:
                arrive(which)
                bench.num_waiting[adapter_id] = bench.num_waiting.get(adapter_id, 0) + 1
        if rng.random() < 0.2:
            arrive(0)
        if rng.random() < 0.1:
            bench.add(version("third"), rng.randint(1, LONGEST_PROMPT), rng.randint(1, LONGEST_OUTPUT))
        bench.step()
        since = since or dict(bench.service)
        gain = [(bench.service.get(i, 0.0) - since.get(i, 0.0)) / weight[i] for i in ids]
        assert abs(gain[0] - gain[1]) <= bound
    assert sum(bench.service.values()) > 400  # and it was not for want of service


def test_weights_divide_the_service():
    bench = Bench(weights={"a": 3.0, "b": 1.0})
    bench.bring_in(version("a"), version("b"))
    for i in range(1000):
        bench.add(version("ab"[i % 2]), 6, 4)
    for _ in range(300):
        bench.step()
    assert bench.num_waiting["a"] and bench.num_waiting["b"]
    assert bench.service["a"] / bench.service["b"] == pytest.approx(3.0, rel=0.1)


def test_short_requests_get_as_much_service_as_long_ones():
    bench = Bench()
    bench.bring_in(version("short"), version("long"))
    for _ in range(2000):
        bench.add(version("short"), 1, 1)
    for _ in range(200):
        bench.add(version("long"), LONGEST_PROMPT, LONGEST_OUTPUT)
    for _ in range(400):
        bench.step()
    assert bench.num_waiting["short"] and bench.num_waiting["long"]
    assert bench.service["short"] / bench.service["long"] == pytest.approx(1.0, rel=0.1)
    assert bench.num_admitted["short"] > 5 * bench.num_admitted["long"]


def test_time_without_requests_earns_nothing():
    bench = Bench()
    bench.bring_in(version("busy"), version("late"))
    for _ in range(500):
        bench.add(version("busy"), 4, 4)
    for _ in range(200):
        bench.step()
    before = dict(bench.service)
    for _ in range(500):
        bench.add(version("late"), 4, 4)
    for _ in range(100):
        bench.step()
    gained = {adapter_id: bench.service[adapter_id] - before.get(adapter_id, 0.0) for adapter_id in bench.service}
    assert gained["late"] == pytest.approx(gained["busy"], abs=2 * 4 * DEAREST)


def test_what_was_served_while_nobody_waited_is_not_held_against_anyone():
    bench = Bench(max_running=8, token_budget=64)
    bench.bring_in(version("much"), version("little"))
    for i in range(100):  # never more than run at a time
        bench.add(version("much"), 4, 4)
        if i % 10 == 0:
            bench.add(version("little"), 4, 4)
        for _ in range(5):
            bench.step()
        assert not bench.num_waiting
    assert bench.service["much"] > 5 * bench.service["little"]
    before = dict(bench.service)
    for _ in range(300):
        bench.add(version("little"), 4, 4)
        bench.add(version("much"), 4, 4)
    for _ in range(100):
        bench.step()
    gained = {adapter_id: bench.service[adapter_id] - before[adapter_id] for adapter_id in before}
    assert gained["much"] == pytest.approx(gained["little"], abs=2 * 8 * DEAREST)


def test_debt_is_not_lost_by_ending_all_requests_for_a_moment():
    """One sends bursts and waits for all answers before the next: it gets no more than one that always waits."""
    bench = Bench()
    bench.bring_in(version("steady"), version("bursts"))
    for _ in range(2000):
        bench.add(version("steady"), 4, 4)
    burst: list[Request] = []
    for _ in range(600):
        if all(request.phase is Phase.FINISHED for request in burst):
            burst = [bench.add(version("bursts"), 10, 30) for _ in range(3)]
        bench.step()
    one_burst = 3 * (10 * INPUT_TOKEN + 30 * OUTPUT_TOKEN)
    assert bench.service["bursts"] <= bench.service["steady"] + one_burst


def waits_beside_a_flood(flood_rate: int) -> tuple[float, float]:
    """Rounds that the longest waiting request of a quiet adapter, and of the flooding one, waits for its admission."""
    rng = random.Random(1)
    bench = Bench(max_running=4)
    bench.bring_in(version("flood"), version("quiet"))
    requests: list[Request] = []
    for i in range(600):
        for adapter_id in ["flood"] * flood_rate + ["quiet"] * (i % 12 == 0):  # well below half of what can be served
            size = rng.randint(1, LONGEST_PROMPT), rng.randint(1, LONGEST_OUTPUT)
            requests.append(bench.add(version(adapter_id), *size))
        bench.step()
    waits = {"flood": 0.0, "quiet": 0.0}
    for request in requests:
        until = bench.now if request.first_scheduled is None else request.first_scheduled
        waits[request.adapter_id] = max(waits[request.adapter_id], until - request.arrival)
    return waits["quiet"], waits["flood"]


def test_flood_of_one_adapter_does_not_make_another_wait():
    modest, _ = waits_beside_a_flood(1)
    flooded, behind = waits_beside_a_flood(20)
    # The next place is its own: somebody's output, and a prompt under way, whatever stands in the flood's queue.
    longest_turn = LONGEST_OUTPUT + LONGEST_PROMPT
    assert modest <= longest_turn and flooded <= longest_turn
    assert behind > 500, "the flood waits, for itself"


def test_flood_holds_for_queues_longer_than_max_wait():
    """The bound on waiting is an adapter's: requests that wait behind their own adapter's overrule no shares."""
    bench = Bench(max_wait_s=20.0)
    bench.bring_in(version("flood"), version("fair"))
    for _ in range(1000):
        bench.add(version("flood"), 6, 4)
    for _ in range(300):
        bench.add(version("fair"), 6, 4)
        bench.step()
    assert bench.service["fair"] >= bench.service["flood"] - 2 * 4 * DEAREST


def test_adapter_of_hardly_any_weight_gets_a_request_in_max_wait():
    bench = Bench(weights={"heavy": 1.0, "light": 1e-6}, max_wait_s=50.0)
    bench.bring_in(version("heavy"), version("light"))
    for _ in range(2000):
        bench.add(version("heavy"), 4, 4)
    for _ in range(30):
        bench.add(version("light"), 4, 4)
    for _ in range(1000):
        bench.step()
    longest_turn = LONGEST_OUTPUT + LONGEST_PROMPT
    assert 1000 / (50 + longest_turn) - 1 <= bench.num_admitted["light"] <= 1000 / 50 + 1


def test_oldest_of_those_that_waited_too_long_goes_first():
    bench = Bench(weights={"light": 1e-6, "lighter": 1e-9}, max_running=1, max_wait_s=10.0)
    bench.bring_in(version("heavy"), version("light"), version("lighter"))
    for adapter_id in ("lighter", "light"):  # in debt
        bench.add(version(adapter_id), 4, 1)
        bench.step()
    for _ in range(50):
        bench.add(version("heavy"), 4, 4)
    bench.step()
    order = [bench.add(version("lighter"), 4, 1), bench.add(version("light"), 4, 1)]
    while any(request.first_scheduled is None for request in order):
        bench.step()
    assert order[0].first_scheduled < order[1].first_scheduled <= 30.0


def test_requests_that_wait_for_their_adapter_do_not_save_up():
    bench = Bench()
    bench.bring_in(version("here"))
    bench.adapters._load_steps = 200
    for _ in range(1000):
        bench.add(version("here"), 4, 4)
        bench.add(version("comes"), 4, 4)
    while not bench.num_admitted.get("comes"):
        bench.step()
    before = dict(bench.service)
    for _ in range(100):
        bench.step()
    gained = {adapter_id: bench.service[adapter_id] - before[adapter_id] for adapter_id in before}
    assert gained["comes"] == pytest.approx(gained["here"], abs=2 * 4 * DEAREST)


def test_nothing_grows_with_the_number_of_adapters_that_were_used():
    """10,000 adapters, one after the other, beside one that always waits and to which all of them are in debt."""
    bench = Bench(num_blocks=16, weights={"": 1e6})
    shares, lanes = bench.scheduler._shares, bench.scheduler._waiting
    most_idle = 0
    for i in range(10_000):
        request = bench.add(version(f"v{i}"), 1, 1)
        while request.phase is not Phase.FINISHED:
            while bench.num_waiting.get("", 0) < 8:
                bench.add(None, 1, 2)
                bench.num_waiting[""] = bench.num_waiting.get("", 0) + 1
            bench.step()
        assert len(shares._shares) + len(shares._unserved) + len(shares.take_waiting_changes()) < 10
        assert len(lanes._lanes) + len(lanes._siblings) < 10
        most_idle = max(most_idle, len(shares._idle))
    assert MAX_IDLE / 2 < most_idle <= MAX_IDLE
    while bench.scheduler.running or bench.scheduler.num_waiting:
        bench.step()
    assert not shares._shares and not shares._idle and shares.floor == 0.0


def test_whoever_comes_to_an_empty_queue_starts_where_the_last_one_is_now():
    shares = FairShare(unlimited, 30.0)
    last = shares.enter("last", 0.0)
    shares.admit(last)
    shares.charge([last.adapter_id], 100.0)
    shares.lift(shares.enter("next", 0.0))
    assert shares["next"].counter == 100.0


def test_counters_kept_for_absent_adapters_are_the_largest_debts():
    shares = FairShare(unlimited, 30.0)
    shares.enter("here", 0.0)
    for i in range(MAX_IDLE + 100):
        share = shares.enter(f"v{i}", 0.0)
        shares.admit(share)
        shares.charge([share.adapter_id], float(i))
        shares.stop(share)
    assert len(shares._idle) <= MAX_IDLE
    assert shares.enter(f"v{MAX_IDLE + 99}", 0.0).counter == MAX_IDLE + 99
    assert shares.enter("v1", 0.0).counter == 0.0
