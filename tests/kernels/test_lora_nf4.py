"""NF4 matmuls that do LoRA, too, equal the plain references; base rows are the matmul's own to the bit.

In Triton's interpreter here, as compiled on a GPU, where they are captured and launched dependently as well.
"""

from contextlib import contextmanager

import pytest
import torch
from lorikeet.kernels import lora_nf4, overlap
from lorikeet.kernels.lora_reference import lora_expand_reference_, lora_shrink_reference
from lorikeet.kernels.nf4 import has_one_offset, nf4_linear, nf4_linear_reference
from lorikeet.kernels.nf4_dispatch import GemmTile

from .lora_cases import bits, make_case
from .nf4_cases import CPU, make_weight, tensors_of

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda") if HAS_CUDA else CPU
# (atol, rtol) beside values of up to 100. 16 bit: the matmul's own (test_nf4_triton.py), h rounded, y rounded twice.
TOLERANCES = {torch.float32: (3e-4, 1e-5), torch.float16: (0.15, 4e-3), torch.bfloat16: (0.6, 2e-2)}
RANKS = [(4, 0, 2), (16, 16, 16), (0, 0, 0), (20, 3, 41)]


@pytest.fixture
def fused():
    """The module of the launcher."""
    return pytest.importorskip("lorikeet.kernels.lora_nf4_triton", reason="needs Triton")


def plain(case, weight, bias=None):
    y = nf4_linear_reference(case.x, weight, bias).to(case.x.dtype)
    h = lora_shrink_reference(case.x, case.arena, *case.tables, case.max_rank, case.weights)
    lora_expand_reference_(y, h, case.arena, *case.tables, case.slice_widths, case.x.shape[1])
    return y


def check(case, weight, tile, bias=None, one_slot=False):
    """The fused launch against the references and the matmul alone; twice, since counters must be left at zero."""
    from lorikeet.kernels import lora_nf4_triton, nf4_triton

    assert lora_nf4_triton.can_fuse(len(case.x), tile, case.slice_widths)
    args = (case.x, *tensors_of(weight), bias, tile, case.arena, *case.tables, case.max_rank, case.slice_widths)
    y, again = (lora_nf4_triton.nf4_lora_gemm(*args, case.weights, one_slot) for _ in range(2))
    assert torch.equal(bits(y), bits(again))
    assert not nf4_triton.arrivals(case.x.device).any()
    atol, rtol = TOLERANCES[y.dtype]
    torch.testing.assert_close(y, plain(case, weight, bias), atol=atol, rtol=rtol, equal_nan=True)
    alone = nf4_triton.nf4_gemm(case.x, *tensors_of(weight), weight.out_features, bias, tile)
    column = 0
    for number, width in enumerate(case.slice_widths):
        untouched = [row for row, ranks in enumerate(case.row_ranks()) if not ranks[number]]
        piece = slice(column, column + width)
        assert torch.equal(bits(y[untouched, piece]), bits(alone[untouched, piece]))
        column += width
    assert torch.equal(bits(y[case.num_rows :]), bits(alone[case.num_rows :]))


@pytest.mark.parametrize(
    ("form", "segments", "padding", "k", "tile"),
    [
        ("plain", [(1, 1)], 0, 448, GemmTile(8, 32, 1, 1, 2, "gather")),
        ("nested", [(3, 1), (2, 0), (0, 1), (-1, 1)], 1, 576, GemmTile(8, 32, 2, 1, 2, "gather")),
        ("stacked", [(-1, 1), (0, 0), (3, 2)], 0, 768, GemmTile(8, 32, 3, 1, 2, "gather")),
        ("nested", [(-1, 2), (2, 1)], 0, 192, GemmTile(8, 32, 1, 1, 2, "gather")),
    ],
    ids=str,
)
def test_equals_the_references(fused, form, segments, padding, k, tile):
    torch.manual_seed(k)
    aligned = form == "nested"
    case = make_case(
        segments, in_features=k, slice_widths=(64, 32, 32), ranks=RANKS, padding_rows=padding, aligned=aligned,
        device=str(DEVICE),
    )  # fmt: skip
    check(case, make_weight(128, k, form, DEVICE), tile)


@pytest.mark.parametrize(
    ("form", "segments", "padding", "k", "tile", "dtype"),
    [
        ("plain", [(1, 5)], 0, 192, GemmTile(8, 32, 1, 1, 2, "gather"), torch.float32),
        ("nested", [(3, 1), (-1, 3), (3, 9), (-1, 1)], 2, 576, GemmTile(16, 32, 2, 1, 2, "gather"), torch.float16),
        ("stacked", [(-1, 2), (0, 9)], 1, 320, GemmTile(32, 32, 2, 1, 2, "gather"), torch.float32),
        ("nested", [(1, 33), (-1, 8)], 0, 192, GemmTile(64, 32, 1, 1, 2, "gather"), torch.float16),
        ("plain", [(-1, 7), (2, 3)], 2, 192, GemmTile(16, 32, 1, 1, 2, "gather"), torch.float32),
        ("plain", [(-1, 12)], 1, 192, GemmTile(16, 32, 1, 1, 2, "gather"), torch.float32),
    ],
    ids=str,
)
def test_one_slot_beside_base_rows(fused, form, segments, padding, k, tile, dtype):
    """As many rows as a tile has; ranks that are none, one tile, and several; weights, one for each segment."""
    torch.manual_seed(k)
    case = make_case(
        segments, in_features=k, slice_widths=(64, 32, 32), ranks=RANKS, padding_rows=padding, aligned=form == "nested",
        dtype=dtype, device=str(DEVICE),
    )  # fmt: skip
    check(case, make_weight(128, k, form, DEVICE), tile, one_slot=True)


def test_half_precision_bias_and_one_slice(fused):
    torch.manual_seed(3)
    case = make_case(
        [(0, 1), (1, 2)], in_features=576, slice_widths=(64,), ranks=[(5,), (16,)], dtype=torch.float16,
        padding_rows=0, device=str(DEVICE),
    )  # fmt: skip
    bias = torch.randn(64, device=DEVICE, dtype=torch.float16)
    check(case, make_weight(64, 576, "stacked", DEVICE), GemmTile(8, 32, 2, 1, 2, "gather"), bias)


def test_what_cannot_be_fused(fused):
    tile = GemmTile(8, 64, 4, 4, 4)
    assert fused.can_fuse(1, tile, (6144, 1024, 1024))
    assert not fused.can_fuse(9, tile, (64,))  # two tiles of rows
    assert not fused.can_fuse(0, tile, (64,))
    assert not fused.can_fuse(1, tile, (96, 64))  # a tile with columns of both
    assert not fused.can_fuse(1, tile, (64 * 4097,))  # more tiles than counters


def test_operator_equals_its_parts_and_passes_opcheck():
    torch.manual_seed(4)
    case = make_case([(1, 1), (-1, 1), (3, 1)], in_features=192, slice_widths=(40, 8, 16), ranks=RANKS, padding_rows=0)
    case.arena.nan_to_num_()
    weight = make_weight(64, 192)
    args = (case.arena, *case.tables, case.max_rank, case.slice_widths, case.weights.nan_to_num())
    y = lora_nf4.nf4_lora_linear(case.x, weight, None, *args)
    torch.testing.assert_close(y, plain(case, weight), atol=1e-4, rtol=1e-5)
    assert torch.equal(y[1], nf4_linear(case.x, weight)[1])
    operator = torch.ops.lorikeet.nf4_lora_linear
    torch.library.opcheck(operator, (case.x, *tensors_of(weight), has_one_offset(weight), None, *args, False))
    with pytest.raises(RuntimeError, match="slice_widths must be 3 widths"):
        operator(case.x, *tensors_of(weight), True, None, *args[:-2], [64])


@contextmanager
def switched(**values):
    before = dict(vars(overlap.switches))
    vars(overlap.switches).update(values)
    try:
        yield
    finally:
        vars(overlap.switches).update(before)


class Chain:
    """Sites that each read what the one before it gives, with the tables of a step of `num_rows` rows."""

    SITES = ((512, (512, 128, 128)), (768, (512,)), (512, (2048, 2048)), (4096, (512,)))

    def __init__(self, num_rows):
        every = [(slot, 1) for slot in range(8)]  # so that every block is filled
        ranks = [(1 + 5 * slot, 16, 4) for slot in range(8)]
        self.num_rows = num_rows
        self.x = torch.randn(num_rows, 512, device="cuda", dtype=torch.bfloat16)
        self.starts = torch.zeros(num_rows + 1, dtype=torch.int32, device="cuda")
        self.slots = torch.full((num_rows,), -1, dtype=torch.int32, device="cuda")
        self.out = torch.zeros_like(self.x)
        self.cases = [
            make_case(
                every, in_features=k, slice_widths=widths, ranks=[each[: len(widths)] for each in ranks],
                dtype=torch.bfloat16, aligned=k == 512, padding_rows=0, device="cuda",
            )
            for k, widths in self.SITES
        ]  # fmt: skip
        self.weights = [make_weight(sum(widths), k, "stacked", DEVICE) for k, widths in self.SITES]

    def fill(self, slots):
        self.starts.copy_(torch.arange(self.num_rows + 1))
        self.slots.copy_(torch.tensor(slots, dtype=torch.int32))
        self.x.normal_()
        torch.cuda.synchronize()

    def run(self, linear, *more):
        x = self.x
        for case, weight in zip(self.cases, self.weights, strict=True):
            tables = (case.arena, *case.tables[:2], self.starts, self.slots, case.max_rank, case.slice_widths)
            y = linear(x, weight, None, *tables, *more)
            x = y / y.norm(dim=1, keepdim=True)
        self.out.copy_(x)


def apart(x, weight, bias, *tables):
    return lora_nf4._one_by_one(x, *tensors_of(weight), has_one_offset(weight), bias, *tables)


def captured(chain, *more):
    """The chain as a graph, captured without any adapter."""
    chain.fill([-1] * chain.num_rows)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), overlap.rehearsal():
        chain.run(lora_nf4.nf4_lora_linear, *more)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain.run(lora_nf4.nf4_lora_linear, *more)
    return graph


@pytest.mark.gpu
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("num_rows", [5, 16, 24, 64])
def test_graph_captured_without_adapters_replays_with_any_one(num_rows, dependent):
    chain = Chain(num_rows)
    with switched(dependent_launch=dependent):
        graph = captured(chain, None, True)
    for slot, first, last in ((0, 0, num_rows), (5, 2, num_rows), (7, 0, num_rows - 3), (3, 1, 2), (-1, 0, 0)):
        chain.fill([slot if first <= row < last else -1 for row in range(num_rows)])
        chain.run(apart)
        want = chain.out.clone()
        for _ in range(20):
            chain.out.fill_(torch.nan)
            graph.replay()
            torch.testing.assert_close(chain.out, want, atol=4e-3, rtol=4e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
def test_graph_captured_without_adapters_replays_with_any(num_rows, dependent):
    chain = Chain(num_rows)
    with switched(dependent_launch=dependent):
        graph = captured(chain)
    for slots in ([0] * 4, [1, 2, 3, 4], [-1, 5, 5, 7], [6, -1, -1, -1], [7, 6, -1, 0]):
        chain.fill(slots[:num_rows])
        chain.run(apart)
        want = chain.out.clone()
        for _ in range(20):
            chain.out.fill_(torch.nan)
            graph.replay()
            torch.testing.assert_close(chain.out, want, atol=4e-3, rtol=4e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "widths"), [(4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,))])
@pytest.mark.parametrize("num_rows", [1, 4, 16, 64])
def test_llama_shapes(num_rows, k, widths):
    torch.manual_seed(num_rows)
    ranks = [[16] * len(widths)] * 4
    one_slot = num_rows > 4
    segments = [(2, num_rows)] if one_slot else [(slot, 1) for slot in range(num_rows)]
    case = make_case(
        segments, in_features=k, slice_widths=widths, ranks=ranks, dtype=torch.bfloat16,
        aligned=True, padding_rows=0, device="cuda",
    )  # fmt: skip
    case.arena.mul_(8)  # so that deltas are as large as what the base gives
    weight = make_weight(sum(widths), k, "nested", DEVICE)
    args = (case.arena, *case.tables, case.max_rank, case.slice_widths)
    y = lora_nf4.nf4_lora_linear(case.x, weight, None, *args, None, one_slot)
    want = apart_in_fp32(case, weight)
    assert torch.linalg.vector_norm(y.float() - want) < 8e-3 * torch.linalg.vector_norm(want)
    assert torch.linalg.vector_norm(nf4_linear(case.x, weight).float() - want) > 0.3 * torch.linalg.vector_norm(want)


def apart_in_fp32(case, weight):
    y = nf4_linear_reference(case.x, weight)
    h = lora_shrink_reference(case.x.float(), case.arena.float(), *case.tables, case.max_rank, None)
    lora_expand_reference_(y, h, case.arena.float(), *case.tables, case.slice_widths, case.x.shape[1])
    return y
