"""LoRA's kernels on CUDA where only a GPU can tell: captured and replayed, early and beside others, far into memory."""

from contextlib import contextmanager

import pytest
import torch
from lorikeet.kernels import lora, overlap
from lorikeet.kernels.lora_reference import lora_expand_reference_, lora_shrink_reference

from .lora_cases import make_case
from .popularity import get_segments

pytestmark = pytest.mark.gpu

WIDTHS = (576, 192, 192)
K = 1040
# (name, switches); see `overlap`.
WAYS = {
    "after": {"lora_side_stream": False, "dependent_launch": False},
    "dependent": {"lora_side_stream": False, "dependent_launch": True},
    "beside": {"lora_side_stream": True, "side_stream_rows": 1, "dependent_launch": True},
}


@contextmanager
def switched(**values):
    before = dict(vars(overlap.switches))
    vars(overlap.switches).update(values)
    try:
        yield
    finally:
        vars(overlap.switches).update(before)


class Step:
    """A base matmul with LoRA, all of it in tensors that stay where they are."""

    def __init__(self, num_rows):
        ranks = [(1 + 5 * i % 40, 16, 4) for i in range(32)]
        every_slot = [(slot, 1) for slot in range(32)]  # so that every block is filled
        case = make_case(
            every_slot, in_features=K, slice_widths=WIDTHS, ranks=ranks, dtype=torch.bfloat16, device="cuda"
        )
        gains = torch.rand(2 * sum(WIDTHS) * 8, device="cuda").to(torch.bfloat16)
        self.arena = torch.cat([case.arena, gains])
        self.offsets, self.ranks, _, _ = case.tables
        places = [-1 if slot % 9 == 8 else slot % 9 * 2 * sum(WIDTHS) + case.arena.numel() for slot in range(32)]
        self.affines = torch.tensor([*places, -1], device="cuda")
        self.max_rank = int(self.ranks.sum(dim=1).max())
        self.base = torch.randn(sum(WIDTHS), K, device="cuda", dtype=torch.bfloat16) / K**0.5
        self.x = torch.randn(num_rows, K, device="cuda", dtype=torch.bfloat16)
        self.starts = torch.zeros(num_rows + 1, dtype=torch.int32, device="cuda")
        self.slots = torch.full((num_rows,), -1, dtype=torch.int32, device="cuda")
        self.weights = torch.rand(num_rows, device="cuda")
        self.side = overlap.SideStream(torch.device("cuda", torch.cuda.current_device()))
        self.out = torch.zeros(num_rows, sum(WIDTHS), device="cuda", dtype=torch.bfloat16)

    def fill(self, segments):
        """Rows and segments that are left over are empty, as in the tables of a captured step."""
        ends = torch.tensor([0, *(rows for _, rows in segments)]).cumsum(0).to(torch.int32)
        self.starts.fill_(int(ends[-1]))[: len(ends)].copy_(ends)
        slots = torch.tensor([slot for slot, _ in segments], dtype=torch.int32)
        self.slots.fill_(-1)[: len(segments)].copy_(slots)
        self.x.normal_()
        self.weights.normal_()
        torch.cuda.synchronize()

    def run(self):
        tables = (self.arena, self.offsets, self.ranks, self.starts, self.slots)
        h = None
        if overlap.lora_runs_beside(len(self.x)):
            with self.side.beside():
                h = lora.lora_shrink(self.x, *tables, self.max_rank, self.weights)
        y = torch.mm(self.x, self.base.t()) * 2
        if h is None:
            h = lora.lora_shrink(self.x, *tables, self.max_rank, self.weights)
        else:
            self.side.join()
        lora.lora_expand_(y, h, *tables, WIDTHS, K, self.affines)
        del h  # its memory is used again for what follows, while it may still be read
        again = lora.lora_shrink(self.x, *tables, self.max_rank)
        lora.lora_expand_(y, again, *tables, WIDTHS, K)
        self.out.copy_(y)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_rows", [8, 64, 200])
def test_graph_captured_with_one_adapter_replays_with_many(num_rows, way):
    """Only what the tables hold changes between capture and replay."""
    step = Step(num_rows)
    step.fill([(3, num_rows)])
    with switched(**WAYS[way]):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), overlap.rehearsal():
            step.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.run()
    for popularity in ("distinct", "zipf", "base", "uniform", "identical"):
        step.fill(get_segments(popularity, num_rows - 3, 32))
        step.run()
        expected = step.out.clone()
        step.out.fill_(torch.nan)
        for _ in range(3):
            graph.replay()
        torch.testing.assert_close(step.out[: num_rows - 3], expected[: num_rows - 3], atol=0, rtol=0)


def test_graph_overlaps_nothing_unless_it_is_captured():
    device = torch.device("cuda", torch.cuda.current_device())
    few, many = overlap.switches.side_stream_rows - 1, overlap.switches.side_stream_rows
    assert not overlap.launches_dependently(device) and not overlap.lora_runs_beside(many)
    with overlap.rehearsal():
        assert overlap.lora_runs_beside(many) and not overlap.lora_runs_beside(few)
        assert overlap.launches_dependently(device) == (torch.cuda.get_device_capability() >= (9, 0))
    assert not overlap.launches_dependently(device) and not overlap.lora_runs_beside(many)


def test_elements_beyond_32_bits():
    """Blocks that start, and rows of x and y that lie, more than 2^31 elements into their memory."""
    far = 2**31 + 64
    case = make_case([(0, 1), (-1, 1), (1, 2)], in_features=K, slice_widths=WIDTHS, ranks=[(16, 3, 1), (2, 16, 5)])
    case_arena = case.arena.to("cuda", torch.bfloat16)
    arena = torch.empty(far + case_arena.numel(), dtype=torch.bfloat16, device="cuda")
    arena[far:] = case_arena
    offsets, *rest = (table.cuda() for table in case.tables)
    tables = (arena, offsets + far, *rest)
    num_rows = case.num_rows
    stride = 2**31 // (num_rows - 1) + 8  # the last row lies behind 2^31
    x, y = case.x[:num_rows].to("cuda", torch.bfloat16), case.y[:num_rows].to("cuda", torch.bfloat16)
    far_x = torch.empty((num_rows - 1) * stride + K, dtype=torch.bfloat16, device="cuda")
    far_x = far_x.as_strided((num_rows, K), (stride, 1)).copy_(x)
    h = lora.lora_shrink(far_x, *tables, 24)
    del far_x
    far_y = torch.empty((num_rows - 1) * stride + sum(WIDTHS), dtype=torch.bfloat16, device="cuda")
    far_y = far_y.as_strided((num_rows, sum(WIDTHS)), (stride, 1)).copy_(y)
    lora.lora_expand_(far_y, h, *tables, WIDTHS, K)
    expected_h = lora_shrink_reference(x, *tables, 24)
    torch.testing.assert_close(h.sum(dim=0), expected_h, atol=1e-4, rtol=1e-4)
    lora_expand_reference_(y, expected_h, *tables, WIDTHS, K)
    torch.testing.assert_close(far_y, y, atol=3e-2, rtol=1.6e-2)  # bf16, as in test_lora_triton
