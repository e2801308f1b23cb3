"""Block tables that are kept from step to step, and what else a step reads."""

import random

import pytest
import torch
from lorikeet.server.engine import block_tables
from lorikeet.server.engine.block_tables import BlockTables
from lorikeet.server.engine.scheduler import ScheduledRequest, ScheduledStep
from lorikeet.server.engine.step_inputs import StepInputs

from ..devices import CPU, GPU


class Holder:
    """A request, as far as its blocks go."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.block_table: list[int] = []
        self.again()

    def again(self) -> None:
        """As after a preemption."""
        self.block_table = [self.rng.randrange(1000) for _ in range(self.rng.randint(0, 6))]

    def grow(self) -> None:
        self.block_table.extend(self.rng.randrange(1000) for _ in range(min(2, 9 - len(self.block_table))))


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.gpu, id="cuda")])
def test_rows_are_the_requests_tables_whatever_comes_goes_grows_and_starts_again(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_tables, "_PATCH", 7)  # uploads in several parts
    rng = random.Random(11)
    tables = BlockTables(8, 9, device)
    address = tables.rows(8).data_ptr()
    holders = [Holder(rng) for _ in range(12)]
    for _ in range(200):
        change = rng.choice(holders)
        rng.choice([change.grow, change.grow, change.grow, change.again])()
        if rng.random() < 0.2:
            rng.shuffle(holders)
        step = holders[: rng.randint(1, 8)]
        tables.fill(step)
        rows = tables.rows(len(step)).cpu()
        width = max(len(holder.block_table) for holder in step)
        narrow = tables.narrow(len(step), width).cpu()
        assert narrow.is_contiguous() and narrow.shape == (len(step), width)
        for i, holder in enumerate(step):
            known = len(holder.block_table)
            assert rows[i, :known].tolist() == holder.block_table == tables.host[i, :known].tolist()
            assert narrow[i, :known].tolist() == holder.block_table
    assert tables.rows(3).data_ptr() == address


def test_a_step_of_the_same_requests_uploads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    tables = BlockTables(4, 9, CPU)
    holders = [Holder(rng) for _ in range(4)]
    tables.fill(holders)
    uploads: list[int] = []
    fill = tables._values.fill
    monkeypatch.setattr(tables._values, "fill", lambda values: (uploads.append(len(values)), fill(values))[1])
    tables.fill(holders)
    tables.fill(holders[:2])
    assert not uploads
    holders[1].grow()
    tables.fill(holders)
    assert uploads == [2]


class Tokens:
    """A request: token i is 100 * number + i."""

    def __init__(self, number: int, block_table: list[int]) -> None:
        self.number = number
        self.block_table = block_table

    def token_ids(self, start: int, stop: int) -> list[int]:
        return [100 * self.number + i for i in range(start, stop)]


def inputs_of(items: list[ScheduledRequest], max_tokens: int, max_requests: int) -> StepInputs:
    tables = BlockTables(max_requests, 16, CPU)
    tables.fill([item.request for item in items])
    return StepInputs(max_tokens, max_requests, tables, 4, CPU)


def test_inputs_of_a_step_with_a_chunk() -> None:
    """The example of the module."""
    a, b = Tokens(1, [3, 7, 9]), Tokens(2, [1, 2, 4, 5, 6, 8, 10, 11])
    items = [ScheduledRequest(a, 6, 3, False), ScheduledRequest(b, 30, 1, True)]  # type: ignore[arg-type]
    inputs = inputs_of(items, 8, 3)
    assert inputs.fill(ScheduledStep(items)) == 1
    given = inputs.tensors(4, 2)
    assert given.ids.tolist() == [106, 107, 108, 230] and given.positions.tolist() == [6, 7, 8, 30]
    assert given.kv_slots.tolist() == [7 * 4 + 2, 7 * 4 + 3, 9 * 4, 11 * 4 + 2]
    assert given.query_starts.tolist() == [0, 3, 4] and given.context_lens.tolist() == [9, 31]
    assert given.rows.tolist()[:1] == [3]
    assert given.query_starts.dtype == given.context_lens.dtype == torch.int32


def test_inputs_of_a_padded_step_stay_in_place() -> None:
    requests = [Tokens(1, [3, 7, 9]), Tokens(2, [1, 2, 4, 5, 6, 8, 10, 11])]
    items = [ScheduledRequest(requests[0], 9, 1, True), ScheduledRequest(requests[1], 30, 1, True)]  # type: ignore[arg-type]
    inputs = inputs_of(items, 4, 4)
    given = inputs.tensors(4, 4)
    for _ in range(2):
        assert inputs.fill(ScheduledStep(items), 4, 4) == 2
        assert given.ids.tolist() == [109, 230, 0, 0] and given.positions.tolist() == [9, 30, 0, 0]
        assert given.kv_slots.tolist() == [9 * 4 + 1, 11 * 4 + 2, -1, -1]
        assert given.query_starts.tolist() == [0, 1, 2, 2, 2] and given.context_lens.tolist() == [10, 31, 0, 0]
        assert given.rows.tolist() == [0, 1, 0, 0]
        inputs.fill(ScheduledStep([]), 4, 4)
        assert given.ids.tolist() == [0] * 4 and given.kv_slots.tolist() == [-1] * 4
        assert given.query_starts.tolist() == [0] * 5 and given.context_lens.tolist() == [0] * 4


def test_inputs_of_random_steps_are_those_of_each_request_and_aligned() -> None:
    rng = random.Random(5)
    for _ in range(50):
        items = []
        for number in range(rng.randint(1, 9)):
            start, count = rng.randrange(40), rng.choice([1, 1, 1, 7, 20])
            table = rng.sample(range(1000), -(-(start + count) // 4))
            items.append(ScheduledRequest(Tokens(number, table), start, count, rng.random() < 0.7))  # type: ignore[arg-type]
        step = ScheduledStep(items)
        inputs = inputs_of(items, 200, 10)
        num_rows = inputs.fill(step)
        given = inputs.tensors(step.num_tokens, len(items))
        starts = given.query_starts.tolist()
        assert given.rows[:num_rows].tolist() == [starts[i + 1] - 1 for i, item in enumerate(items) if item.samples]
        for i, (request, start, count, *_) in enumerate(items):
            part = slice(starts[i], starts[i + 1])
            places = [request.block_table[p // 4] * 4 + p % 4 for p in range(start, start + count)]
            assert given.positions[part].tolist() == list(range(start, start + count))
            assert given.ids[part].tolist() == request.token_ids(start, start + count)
            assert given.kv_slots[part].tolist() == places
            assert given.context_lens[i] == start + count
        base = inputs.tensors(step.num_tokens, len(items)).ids.data_ptr()
        assert all((field.data_ptr() - base) % 64 == 0 for field in given)
