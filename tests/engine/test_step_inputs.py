"""Block tables that are kept from step to step, and the inputs of captured decode steps."""

import random
from types import SimpleNamespace

import pytest
import torch
from lorikeet.server.engine import block_tables
from lorikeet.server.engine.block_tables import BlockTables
from lorikeet.server.engine.decode_inputs import DecodeInputs
from lorikeet.server.engine.scheduler import ScheduledRequest, ScheduledStep

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


def test_inputs_of_a_padded_step() -> None:
    """The example of the module."""
    tables = BlockTables(4, 8, CPU)
    requests = [
        SimpleNamespace(block_table=[3, 7, 9], token_ids=lambda start, stop: [17]),
        SimpleNamespace(block_table=[1, 2, 4, 5, 6, 8, 10, 11], token_ids=lambda start, stop: [4]),
    ]
    inputs = DecodeInputs(4, tables, SimpleNamespace(block_size=4), 32, CPU)  # type: ignore[arg-type]
    items = [ScheduledRequest(requests[0], 9, 1, True), ScheduledRequest(requests[1], 30, 1, True)]  # type: ignore[arg-type]
    for _ in range(2):
        tables.fill(requests)
        inputs.fill(ScheduledStep(items))
        ids, positions, paged = inputs.tensors(4)
        assert ids.tolist() == [17, 4, 0, 0] and positions.tolist() == [9, 30, 0, 0]
        assert paged.kv_slots.tolist() == [9 * 4 + 1, 11 * 4 + 2, -1, -1]
        assert paged.query_starts.tolist() == [0, 1, 2, 2, 2] and paged.context_lens.tolist() == [10, 31, 0, 0]
        assert paged.query_starts.dtype == paged.context_lens.dtype == paged.block_tables.dtype == torch.int32
        assert (paged.max_query_len, paged.max_context_len) == (1, 32)
        inputs.blank()  # in place
        assert ids.tolist() == [0] * 4 and paged.kv_slots.tolist() == [-1] * 4
        assert paged.query_starts.tolist() == [0] * 5 and paged.context_lens.tolist() == [0] * 4
