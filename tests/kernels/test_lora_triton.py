"""The Triton kernels of LoRA equal the plain reference: natively on CUDA, else small cases in Triton's interpreter."""

import importlib.util

import pytest
import torch
from lorikeet.kernels import lora

from .lora_affine_cases import AFFINE_TOLERANCES, NUM_SLOTS, assert_affine_equals_reference, make_affine_case
from .lora_cases import assert_equals_reference, make_case
from .popularity import POPULARITIES, get_segments

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_CUDA = torch.cuda.is_available()

# (atol, rtol). The kernel rounds h to the 16-bit dtype before it multiplies it with B, which the reference does not:
# half a unit in the last place of sums of up to 64 products below 4.
TOLERANCES = {torch.float32: (2e-5, 2e-5), torch.float16: (4e-3, 2e-3), torch.bfloat16: (3e-2, 1.6e-2)}


@pytest.fixture
def interpreted():
    """The module of the kernels, to be called with CPU tensors."""
    if not HAS_TRITON:
        pytest.skip("needs Triton")
    if HAS_CUDA:
        pytest.skip("the same cases run natively")
    import triton.language as tl
    from lorikeet.kernels import lora_triton

    # The functions of Triton's library are interpreted or not for good once Triton is imported, by whatever test.
    assert type(tl.sum).__name__ == "InterpretedFunction", "set TRITON_INTERPRET=1 before anything imports Triton"
    return lora_triton


# The interpreter's tl.dot multiplies the bits of bf16 as integers, so it can't run there.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_popularity_interpreted(interpreted, popularity, dtype):
    ranks = [(4, 0), (1, 1), (16, 9), (0, 0)]
    case = make_case(get_segments(popularity, 12, 4), slice_widths=(33, 5), ranks=ranks, dtype=dtype)
    assert_equals_reference(case, interpreted.lora_shrink, interpreted.lora_expand_, TOLERANCES[dtype])


@pytest.mark.parametrize(
    "shape",
    [
        {"in_features": 1, "slice_widths": (1,), "ranks": [(1,)]},
        {"in_features": 17, "slice_widths": (5,), "ranks": [(3,)]},
        {"in_features": 129, "slice_widths": (65, 130), "ranks": [(2, 33)]},
        {"in_features": 576, "slice_widths": (64, 32, 32), "ranks": [(8, 8, 8)], "aligned": True},
        {"in_features": 2049, "slice_widths": (16,), "ranks": [(64,)]},
        {"in_features": 48, "slice_widths": (5, 5, 5, 5), "ranks": [(0, 0, 0, 3)]},
    ],
    ids=lambda shape: f"{shape['in_features']}-{shape['slice_widths']}",
)
def test_shapes_interpreted(interpreted, shape):
    case = make_case([(-1, 1), (0, 3)], padding_rows=1, **shape)
    assert_equals_reference(case, interpreted.lora_shrink, interpreted.lora_expand_, TOLERANCES[torch.float32])


def test_segments_longer_than_a_tile_interpreted(interpreted):
    case = make_case([(1, 15), (0, 16), (-1, 17), (1, 0), (0, 33), (1, 1)], slice_widths=(5,), ranks=[(4,), (2,)])
    assert_equals_reference(case, interpreted.lora_shrink, interpreted.lora_expand_, TOLERANCES[torch.float32])


def test_prefill_tiles_interpreted(interpreted):
    case = make_case([(-1, 3), (1, 70), (0, 1), (1, 64)], slice_widths=(33,), ranks=[(40,), (2,)])
    assert_equals_reference(case, interpreted.lora_shrink, interpreted.lora_expand_, TOLERANCES[torch.float32])


@pytest.mark.parametrize("num_splits", [1, 2, 3, 16])
def test_split_input_width_interpreted(interpreted, num_splits):
    case = make_case([(0, 2), (-1, 1)], in_features=300, slice_widths=(5,), ranks=[(4,)])

    def shrink(*args):
        return interpreted.lora_shrink(*args, num_splits=num_splits)

    assert_equals_reference(case, shrink, interpreted.lora_expand_, TOLERANCES[torch.float32])


def test_rank_bound_far_above_the_batch_interpreted(interpreted):
    case = make_case([(0, 2), (-1, 2)], slice_widths=(5,), ranks=[(4,)])
    functions = interpreted.lora_shrink, interpreted.lora_expand_
    assert_equals_reference(case, *functions, TOLERANCES[torch.float32], max_rank=50)


def test_no_rows_interpreted(interpreted):
    case = make_case([], padding_rows=0, slice_widths=(5,), ranks=[(4,)])
    assert_equals_reference(case, interpreted.lora_shrink, interpreted.lora_expand_, TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", list(AFFINE_TOLERANCES), ids=str)
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_affine_interpreted(interpreted, popularity, dtype):
    segments = get_segments(popularity, 14, NUM_SLOTS)
    assert_affine_equals_reference(make_affine_case(segments, width=33, dtype=dtype), interpreted.lora_affine_)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("width", [1, 512, 577, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_affine_widths_interpreted(interpreted, width, dtype, aligned):
    case = make_affine_case([(-1, 2), (0, 6), (1, 1), (2, 0), (3, 3)], width=width, dtype=dtype, aligned=aligned)
    assert_affine_equals_reference(case, interpreted.lora_affine_)


def test_affine_prefill_tiles_interpreted(interpreted):
    case = make_affine_case([(-1, 9), (3, 70), (1, 30), (0, 1), (2, 33), (3, 0)], width=33)
    assert_affine_equals_reference(case, interpreted.lora_affine_)


def test_affine_of_no_rows_interpreted(interpreted):
    assert_affine_equals_reference(make_affine_case([], padding_rows=0), interpreted.lora_affine_)


def test_splits_fill_the_gpu_but_no_more(interpreted):
    assert interpreted._choose_splits(num_programs=1, most=0) == 1
    assert interpreted._choose_splits(num_programs=1, most=7) == 4
    assert interpreted._choose_splits(num_programs=1, most=100) == 16
    assert interpreted._choose_splits(num_programs=100, most=100) == 4
    assert interpreted._choose_splits(num_programs=300, most=100) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("num_rows", [1, 17, 128, 129, 700])
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_popularity_on_cuda(popularity, num_rows, dtype):
    ranks = [(1 + 7 * i % 64, i % 3 * 8, 16) for i in range(64)]
    case = make_case(
        get_segments(popularity, num_rows, 64), slice_widths=(576, 192, 192), ranks=ranks, dtype=dtype, device="cuda"
    )
    assert_equals_reference(case, lora.lora_shrink, lora.lora_expand_, TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("in_features", [1, 17, 48, 64, 129, 2049, 4096, 14336])
@pytest.mark.parametrize("slice_widths", [(5,), (33, 192), (192, 5, 33), (4096, 1024, 1024)], ids=str)
def test_shapes_on_cuda(in_features, slice_widths, dtype, aligned):
    ranks = [[rank] * len(slice_widths) for rank in (1, 16, 64)]
    case = make_case(
        [(-1, 2), (0, 1), (1, 19), (2, 3)],
        in_features=in_features,
        slice_widths=slice_widths,
        ranks=ranks,
        dtype=dtype,
        aligned=aligned,
        device="cuda",
    )
    assert_equals_reference(case, lora.lora_shrink, lora.lora_expand_, TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(AFFINE_TOLERANCES), ids=str)
@pytest.mark.parametrize("num_rows", [1, 128, 700])
@pytest.mark.parametrize("width", [33, 577, 6144])
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_affine_on_cuda(popularity, width, num_rows, dtype):
    segments = get_segments(popularity, num_rows, NUM_SLOTS)
    for aligned in (True, False):
        case = make_affine_case(segments, width=width, dtype=dtype, aligned=aligned, device="cuda")
        assert_affine_equals_reference(case, lora.lora_affine_)


@pytest.mark.gpu
def test_same_input_same_bits_on_cuda():
    case = make_case(get_segments("zipf", 64, 5), in_features=4096, dtype=torch.bfloat16, device="cuda")
    args = (case.x, case.arena, *case.tables, case.max_rank)
    first = lora.lora_shrink(*args)
    assert all(torch.equal(first, lora.lora_shrink(*args)) for _ in range(20))


@pytest.mark.gpu
def test_opcheck_on_cuda():
    case = make_case(get_segments("zipf", 12, 5), padding_rows=0, device="cuda")
    arena = case.arena.nan_to_num()
    h = lora.lora_shrink(case.x, arena, *case.tables, case.max_rank)
    args = (case.x, arena, *case.tables, case.max_rank)
    torch.library.opcheck(torch.ops.lorikeet.lora_shrink, args)
    torch.library.opcheck(torch.ops.lorikeet.lora_shrink, (*args, case.weights))
    rest = (*case.tables, case.slice_widths, case.x.shape[1])
    torch.library.opcheck(torch.ops.lorikeet.lora_expand_, (case.y, h, arena, *rest))
    affine = make_affine_case(get_segments("zipf", 12, NUM_SLOTS), padding_rows=0, device="cuda")
    torch.library.opcheck(torch.ops.lorikeet.lora_affine_, (affine.y, affine.arena.nan_to_num(), *affine.tables))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [8, 64, 200])
def test_graph_captured_with_one_adapter_replays_with_many(num_rows):
    """Only what the tables hold changes between capture and replay; rows and segments that are left over are empty."""
    ranks = [(1 + 5 * i % 40, 16, 4) for i in range(32)]
    shape = {"slice_widths": (576, 192, 192), "ranks": ranks, "dtype": torch.bfloat16, "device": "cuda"}
    arena = make_case([(slot, 1) for slot in range(32)], **shape)  # every slot's block is filled
    x = torch.randn(num_rows, 48, device="cuda", dtype=torch.bfloat16)
    y = torch.zeros(num_rows, 960, device="cuda", dtype=torch.bfloat16)
    offsets, slot_ranks, _, _ = arena.tables
    starts = torch.zeros(num_rows + 1, dtype=torch.int32, device="cuda")
    slots = torch.full((num_rows,), -1, dtype=torch.int32, device="cuda")
    max_rank = int(slot_ranks.sum(dim=1).max())
    affines = torch.rand(2 * 960 * 8, device="cuda").to(torch.bfloat16)
    affine_offsets = torch.tensor([-1 if slot % 9 == 8 else slot % 9 * 2 * 960 for slot in range(32)], device="cuda")
    weights = torch.rand(num_rows, device="cuda")

    def fill(segments):
        ends = torch.tensor([rows for _, rows in segments]).cumsum(0)
        starts.fill_(int(ends[-1])).index_fill_(0, torch.zeros(1, dtype=torch.long, device="cuda"), 0)
        starts[1 : len(segments) + 1] = ends
        slots.fill_(-1)[: len(segments)] = torch.tensor([slot for slot, _ in segments], dtype=torch.int32)

    def step(out):
        lora.lora_affine_(out, affines, affine_offsets, starts, slots)
        h = lora.lora_shrink(x, arena.arena, offsets, slot_ranks, starts, slots, max_rank, weights)
        lora.lora_expand_(out, h, arena.arena, offsets, slot_ranks, starts, slots, arena.slice_widths, 48)

    fill([(3, num_rows)])
    step(y)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(y)
    for popularity in ("distinct", "zipf", "base", "uniform", "identical"):
        fill(get_segments(popularity, num_rows - 3, 32))
        x.normal_()
        y.normal_()
        weights.normal_()
        expected = y.clone()
        step(expected)
        graph.replay()
        torch.testing.assert_close(y, expected, atol=0, rtol=0)
