"""The scheduler step by step, with fake adapters and nobody who runs the steps."""

import sys

import pytest
from lorikeet.adapters.errors import AdapterUnloadedError
from lorikeet.server.engine.block_manager import BlockManager
from lorikeet.server.engine.request import Phase, Request
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.engine.scheduler import Plan, Scheduler
from lorikeet.server.errors import PromptTooLongError

from .fake_adapters import NEVER, FakeAdapters, version

A, B, C = version("a"), version("b"), version("c")


class Bench:
    """A scheduler; `step` plans a step, records it as run and gives each sampling request the token 1."""

    def __init__(self, num_slots: int = 4, num_blocks: int = 64, load_steps: int = 0, **settings) -> None:
        self.adapters = FakeAdapters(num_slots, load_steps=load_steps)
        self.blocks = BlockManager(num_blocks, 4)
        defaults = {"max_running": 8, "token_budget": 16, "watermark": 0.0, "starvation_bound_s": 100.0}
        self.scheduler = Scheduler(self.blocks, self.adapters.port, **(defaults | settings))
        self.now = 0.0
        self.count = 0

    def add(self, length: int, adapter=None, name: str = "r") -> Request:
        """A prompt that shares no prefix with another."""
        self.count += 1
        prompt = [self.count, *range(1000, 999 + length)]
        request = Request(name, prompt, SamplingParams(), adapter, lambda _: None, arrival=self.now)
        self.adapters.pin(adapter)
        self.scheduler.add(request)
        return request

    def plan(self) -> Plan:
        self.adapters.step_work()
        plan = self.scheduler.schedule(self.now)
        self.scheduler.check_integrity()
        return plan

    def step(self) -> Plan:
        plan = self.plan()
        self.scheduler.complete(plan.step)
        for item in plan.step.requests:
            if item.samples:
                item.request.output_token_ids.append(1)
        self.now += 1.0
        return plan


def shape(plan: Plan) -> list[tuple[str, int, int, bool]]:
    return [(item.request.request_id, item.start, item.num_tokens, item.samples) for item in plan.step.requests]


def test_prompt_longer_than_the_budget_runs_in_chunks_beside_decodes():
    bench = Bench(token_budget=8)
    bench.add(3, name="short")
    bench.add(12, name="long")
    assert shape(bench.step()) == [("short", 0, 3, True), ("long", 0, 5, False)]
    assert shape(bench.step()) == [("short", 3, 1, True), ("long", 5, 7, True)]
    assert shape(bench.step()) == [("short", 4, 1, True), ("long", 12, 1, True)]


def test_decodes_come_before_older_prompts():
    bench = Bench(token_budget=4, max_running=4)
    bench.add(20, name="long")
    bench.step()
    short = bench.add(1, name="short")
    while not short.output_token_ids:
        bench.step()
    plan = bench.step()
    assert ("short", 1, 1, True) in shape(plan)
    assert plan.step.num_tokens <= 4


def test_step_is_sorted_by_slot_base_first_then_by_age():
    bench = Bench(num_slots=2, token_budget=100)
    for name, adapter in [("b1", B), ("a1", A), ("n1", None), ("b2", B), ("n2", None), ("a2", A)]:
        bench.add(2, adapter, name)
    while len(bench.scheduler.running) < 6:
        bench.step()
    step = bench.step().step
    assert [item.request.request_id for item in step.requests[:2]] == ["n1", "n2"]
    slots = [item.request.slot for item in step.requests]
    assert slots == [-1, -1, 0, 0, 1, 1]
    assert [item.request.request_id[1] for item in step.requests] == ["1", "2"] * 3


def test_no_more_run_than_max_running():
    bench = Bench(max_running=2)
    requests = [bench.add(1, name=str(i)) for i in range(4)]
    bench.step()
    assert [request.phase for request in requests] == [Phase.RUNNING] * 2 + [Phase.WAITING] * 2
    bench.scheduler.remove(requests[0])
    bench.step()
    assert requests[2].phase is Phase.RUNNING


def test_request_waiting_for_its_adapter_holds_nobody_up():
    bench = Bench(load_steps=3)
    slow = bench.add(4, A, "slow")
    bench.add(4, None, "base")
    bench.add(4, None, "base2")
    assert [name for name, *_ in shape(bench.step())] == ["base", "base2"]
    for _ in range(5):
        bench.step()
    assert slow.phase is Phase.RUNNING


def test_request_waiting_for_blocks_is_not_overtaken():
    bench = Bench(num_blocks=4)
    first = bench.add(8, name="first")
    bench.step()
    large = bench.add(12, name="large")
    small = bench.add(1, name="small")
    bench.step()
    assert large.phase is small.phase is Phase.WAITING
    bench.scheduler.remove(first)
    bench.step()
    assert large.phase is small.phase is Phase.RUNNING


def test_youngest_is_preempted_and_keeps_output_and_pin_but_not_its_slot():
    bench = Bench(num_blocks=5, num_slots=2)
    old = bench.add(8, name="old")
    young = bench.add(7, A, "young")
    bench.step()
    bench.step()
    assert young.slot == 0
    preempted = []
    while not preempted:
        preempted = bench.step().preempted
    assert preempted == [young]
    assert young.phase is Phase.WAITING
    assert young.slot == -1 and bench.adapters.num_users(A) == 0 and bench.adapters.pins[A.versions[0]] == 1
    assert young.block_table == [] and young.num_computed_tokens == 0
    assert young.output_token_ids
    num_output = len(young.output_token_ids)
    bench.scheduler.remove(old)
    plan = bench.step()
    item = plan.step.requests[0]
    assert item.request is young and item.samples
    assert item.start > 0, "its computed blocks should have been in the prefix cache"
    assert item.start + item.num_tokens == 7 + num_output
    assert not plan.admitted, "it was admitted before"


def test_preempted_request_is_ahead_of_younger_ones():
    bench = Bench(num_blocks=4)
    old, young = bench.add(7, name="old"), bench.add(6, name="young")
    bench.step()
    late = bench.add(1, name="late")
    while young.phase is Phase.RUNNING:
        bench.step()
    assert late.phase is Phase.WAITING
    bench.scheduler.remove(old)
    bench.step()
    assert young.phase is late.phase is Phase.RUNNING
    assert [request.request_id for request in bench.scheduler.running] == ["young", "late"]


def test_adapter_of_a_request_that_waits_for_blocks_stays_active():
    bench = Bench(num_blocks=4, num_slots=1)
    first = bench.add(8, name="first")
    bench.step()
    large = bench.add(12, A, "large")
    other = bench.add(1, B, "other")
    for _ in range(5):
        bench.step()
        assert first.num_preemptions == 0
    assert large.phase is Phase.WAITING and large.slot == 0 and bench.adapters.num_users(A) == 1
    bench.scheduler.remove(first)
    bench.step()
    assert large.phase is Phase.RUNNING
    bench.scheduler.remove(large)
    assert bench.adapters.num_users(A) == 0
    for _ in range(3):
        bench.step()
    assert other.phase is Phase.RUNNING


def test_removing_a_waiting_request_gives_its_reserved_slot_back():
    bench = Bench(num_blocks=3, num_slots=1)
    bench.add(8)
    bench.step()
    blocked = bench.add(9, A)
    bench.step()
    bench.step()
    assert bench.adapters.num_users(A) == 1
    bench.scheduler.remove(blocked)
    bench.scheduler.remove(blocked)
    assert bench.adapters.num_users(A) == 0
    assert bench.scheduler.num_waiting == 0


def test_all_waiting_requests_of_a_failed_version_fail_and_no_others():
    bench = Bench(num_slots=2)
    doomed = [bench.add(2, A), bench.add(2, A)]
    alive = bench.add(2, B)
    bench.adapters.fail(A)
    plan = bench.step()
    assert [request for request, _ in plan.failed] == doomed
    assert all(isinstance(error, AdapterUnloadedError) for _, error in plan.failed)
    assert all(request.phase is Phase.FINISHED for request in doomed)
    bench.step()
    assert alive.phase is Phase.RUNNING
    assert bench.scheduler.num_waiting == 0


def test_watermark_leaves_blocks_for_those_that_run():
    bench = Bench(num_blocks=10, watermark=0.2)
    bench.add(16, name="first")
    second = bench.add(20, name="second")
    bench.step()
    assert second.phase is Phase.WAITING  # 4 + 5 of 10 blocks would leave 1
    third = Bench(num_blocks=10, watermark=0.2)
    alone = third.add(40)
    third.step()
    assert alone.phase is Phase.RUNNING  # with nobody else it may take all


def test_prompt_that_can_never_fit_is_refused():
    bench = Bench(num_blocks=2)
    prompt = list(range(9))
    with pytest.raises(PromptTooLongError, match="9 tokens"):
        bench.scheduler.check_fits(Request("r", prompt, SamplingParams(), None, lambda _: None))
    bench.scheduler.check_fits(Request("r", prompt[:8], SamplingParams(), None, lambda _: None))


def test_more_running_requests_than_tokens_are_refused():
    with pytest.raises(ValueError, match="max_running"):
        Bench(max_running=17, token_budget=16)


@pytest.mark.parametrize("adapters", ["base", "one each"], ids=str)
def test_work_of_a_step_does_not_grow_with_the_queue(adapters):
    def calls_per_step(num_waiting: int) -> int:
        bench = Bench(num_slots=2, max_running=4, num_blocks=1000)
        for i in range(4):
            bench.add(4, name=f"running{i}")
        bench.step()
        for i in range(num_waiting):
            bench.add(4, version(f"v{i}") if adapters == "one each" else None)
        bench.scheduler.remove(bench.scheduler.running[0])
        counts = []
        for _ in range(20):
            count = 0

            def trace(frame, event, argument):
                nonlocal count
                count += event in ("call", "c_call")

            sys.setprofile(trace)
            try:
                plan = bench.scheduler.schedule(bench.now)
            finally:
                sys.setprofile(None)
            bench.scheduler.complete(plan.step)
            for item in plan.step.requests:
                if item.samples:
                    item.request.output_token_ids.append(1)
            counts.append(count)
        return max(counts)

    assert calls_per_step(5000) <= 1.2 * calls_per_step(100)


def test_every_parked_version_is_tried_again_when_more_wait_than_tries():
    bench = Bench(num_slots=2, load_steps=1, max_adapter_tries=4)
    requests = [bench.add(2, version(f"v{i}"), str(i)) for i in range(30)]
    for _ in range(400):
        for request in list(bench.scheduler.running):
            if request.output_token_ids:
                bench.scheduler.remove(request)
        bench.step()
    assert all(request.phase is Phase.FINISHED for request in requests)


def test_adapter_that_is_ready_is_found_among_many_that_are_not():
    bench = Bench(num_slots=1, load_steps=NEVER, max_adapter_tries=4)
    requests = [bench.add(2, version(f"v{i}")) for i in range(30)]
    bench.step()
    while bench.scheduler.wants_another_pass:
        bench.step()
    bench.adapters.put(requests[20].adapter)
    bench.scheduler.adapter_ready()
    passes = 0
    while bench.scheduler.wants_another_pass:
        bench.step()
        passes += 1
    assert requests[20].phase is Phase.RUNNING
    assert passes <= 30


def test_wants_another_pass_only_while_there_is_something_to_try():
    bench = Bench(num_slots=2, load_steps=NEVER, max_adapter_tries=4)
    for i in range(12):
        bench.add(2, version(f"v{i}"))
    passes = 0
    bench.step()
    while bench.scheduler.wants_another_pass:
        bench.step()
        passes += 1
    assert passes <= 12
    bench.scheduler.adapter_ready()
    passes = 0
    while bench.scheduler.wants_another_pass:
        bench.step()
        passes += 1
    assert 0 < passes <= 12
    for request in [lane.head for lane in list(bench.scheduler._waiting._lanes.values()) if lane.requests]:
        bench.scheduler.remove(request)
    bench.scheduler.adapter_ready()
    assert not bench.scheduler.wants_another_pass
