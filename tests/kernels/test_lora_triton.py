"""The Triton kernels of LoRA equal the plain reference: natively on CUDA, else small cases in Triton's interpreter."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from lorikeet.kernels import lora, lora_tiles
from lorikeet.kernels.lora_reference import (
    lora_affine_reference_,
    lora_expand_reference_,
    lora_shrink_reference,
)

from .lora_affine_cases import AFFINE_TOLERANCES, NUM_SLOTS, assert_affine_equals_reference, make_affine_case
from .lora_cases import assert_equals_reference, bits, make_case
from .popularity import POPULARITIES, get_segments

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_CUDA = torch.cuda.is_available()

# (atol, rtol). The kernel rounds h to the 16-bit dtype before it multiplies it with B, which the reference does not:
# half a unit in the last place of sums of up to 64 products below 4.
TOLERANCES = {torch.float32: (2e-5, 2e-5), torch.float16: (4e-3, 2e-3), torch.bfloat16: (3e-2, 1.6e-2)}


def assert_site_equals_reference(case, kernels, affine=None, slack: float = 1.0, **tiles) -> None:
    """Runs shrink and expand one after the other, in a wider y, and compares with the reference.

    Args:
        case: a `LoraCase`.
        kernels: what has `lora_shrink` and `lora_expand_`.
        affine: an `AffineCase` of the same segments and width, which expand applies first.
        slack: factor on the tolerances.
        tiles: `shrink` and `expand`, where others than the chosen ones.
    """
    widths, in_features = case.slice_widths, case.x.shape[1]
    arena, affine_offsets, shift = case.arena, None, 0
    expected = case.y.clone()
    if affine is not None:
        shift = arena.shape[0]
        arena = torch.cat([arena, affine.arena])
        # As many slots as the ranks have; those that affine doesn't know have none.
        affine_offsets = torch.full_like(case.tables[0], -1)
        known = affine.tables[0]
        affine_offsets[: known.shape[0]] = torch.where(known < 0, known, known + shift)[: affine_offsets.shape[0]]
        lora_affine_reference_(expected, arena, affine_offsets, *case.tables[2:])
    expected_h = lora_shrink_reference(case.x, arena, *case.tables, case.max_rank, case.weights)
    lora_expand_reference_(expected, expected_h, arena, *case.tables, widths, in_features)

    wide = torch.full((case.y.shape[0], case.y.shape[1] + 24), 7.0, dtype=case.y.dtype, device=case.y.device)
    y = wide[:, 8:-16]
    y.copy_(case.y)
    shrink_tiles, expand_tiles = tiles.get("shrink"), tiles.get("expand")
    keywords = {} if shrink_tiles is None else {"tiles": shrink_tiles}
    h = kernels.lora_shrink(case.x, arena, *case.tables, case.max_rank, case.weights, **keywords)
    # What is outside of the slot's columns must not matter.
    for row, ranks in enumerate(case.row_ranks()):
        h[..., row, sum(ranks) :] = torch.nan
    h[..., case.num_rows :, :] = torch.nan
    keywords = {} if expand_tiles is None else {"tiles": expand_tiles}
    kernels.lora_expand_(y, h, arena, *case.tables, widths, in_features, affine_offsets, **keywords)
    atol, rtol = TOLERANCES[y.dtype]
    torch.testing.assert_close(y, expected, atol=slack * atol, rtol=slack * rtol, equal_nan=True)
    touched = torch.tensor([any(ranks) for ranks in case.row_ranks()] + [False] * (y.shape[0] - case.num_rows))
    if affine is not None:
        for g, slot in enumerate(case.tables[3].tolist()):
            if slot >= 0 and int(affine_offsets[slot]) >= 0:
                touched[int(case.tables[2][g]) : int(case.tables[2][g + 1])] = True
    touched = touched.to(y.device)
    assert torch.equal(bits(y)[~touched], bits(case.y)[~touched])
    assert (wide[:, :8] == 7).all() and (wide[:, -16:] == 7).all()


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
        {"in_features": 700, "slice_widths": (16,), "ranks": [(33,)]},
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


@pytest.mark.parametrize(("split_k", "num_splits"), [(64, 5), (128, 3), (320, 1)])
@pytest.mark.parametrize("rows", [1, 2])
def test_split_input_width_interpreted(interpreted, rows, split_k, num_splits):
    case = make_case([(0, rows), (-1, 1)], in_features=300, slice_widths=(5,), ranks=[(20,)])
    tiles = lora_tiles.ShrinkTiles(16, 16, 64, 16, split_k, num_splits, num_warps=4, num_stages=3)
    assert_site_equals_reference(case, interpreted, shrink=tiles)


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


@pytest.mark.parametrize("num_tokens", [1, 128, 129, 4096])
@pytest.mark.parametrize("in_features", [1, 576, 4096, 14336, 100_000])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_splits_cover_the_input_width(num_tokens, in_features, itemsize):
    for max_rank in (1, 16, 48, 700):
        tiles = lora_tiles.shrink_tiles(num_tokens, in_features, max_rank, itemsize)
        assert (tiles.num_splits - 1) * tiles.split_k < in_features <= tiles.num_splits * tiles.split_k
        assert tiles.num_splits <= 16 and tiles.split_k % tiles.dot_k == 0
        assert tiles.row_k == 0 or tiles.split_k % tiles.row_k == 0
        assert tiles.num_splits == lora_tiles.num_splits(num_tokens, in_features, max_rank, itemsize)


@pytest.mark.parametrize(("dtype", "aligned"), [(torch.float32, False), (torch.float16, True)], ids=str)
def test_site_with_affines_interpreted(interpreted, dtype, aligned):
    """Slots with ranks and gains, with one of the two, with neither; segments of one row and more, and empty ones."""
    segments = [(-1, 2), (0, 1), (1, 17), (2, 0), (2, 1), (3, 3), (4, 1), (5, 2), (6, 1)]
    ranks = [(16, 17), (1, 0), (0, 0), (0, 0), (18, 2), (0, 5), (0, 0)]
    case = make_case(segments, in_features=96, slice_widths=(40, 136), ranks=ranks, dtype=dtype, aligned=aligned)
    affine = make_affine_case(segments, width=176, without=(1, 6), dtype=dtype, aligned=aligned)
    assert_site_equals_reference(case, interpreted, affine, slack=2)  # y is rounded twice by the reference


def test_bf16_rows_interpreted(interpreted):
    """Segments of one row take no tl.dot, so they run in bf16 in the interpreter too."""
    segments = [(-1, 1), (0, 1), (1, 1), (-1, 1), (2, 1)]
    case = make_case(segments, in_features=600, dtype=torch.bfloat16, ranks=[(1, 0, 17), (8, 8, 8), (20, 1, 3)])
    affine = make_affine_case(segments, width=230, without=(1,), dtype=torch.bfloat16)
    assert_site_equals_reference(case, interpreted, affine, slack=2)


def test_padded_segments_interpreted(interpreted):
    """As in a graph's tables: more segments than there are, more rows than they own, a rank bound of the bucket."""
    case = make_case(
        [(0, 1), (1, 1), (-1, 0), (-1, 0), (-1, 0)], padding_rows=3, slice_widths=(33,), ranks=[(3,), (9,)]
    )
    assert_equals_reference(
        case, interpreted.lora_shrink, interpreted.lora_expand_, TOLERANCES[torch.float32], max_rank=64
    )
    assert_site_equals_reference(case, interpreted)
    nobody = make_case([(-1, 0)] * 4, padding_rows=4, slice_widths=(33,), ranks=[(3,)])
    assert_site_equals_reference(nobody, interpreted)


def test_strided_x_interpreted(interpreted):
    """Rows of x further apart than they are long, as slices of a stacked tensor are."""
    case = make_case([(0, 1), (1, 3)], slice_widths=(5,), ranks=[(4,), (2,)])
    wide = torch.full((case.x.shape[0], case.x.shape[1] + 9), torch.nan)
    wide[:, 4:-5] = case.x
    assert_site_equals_reference(replace(case, x=wide[:, 4:-5]), interpreted)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_features", [1, 129, 4096, 14336])
@pytest.mark.parametrize("slice_widths", [(5,), (192, 5, 33), (4096, 1024, 1024)], ids=str)
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
    assert_site_equals_reference(case, lora)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("num_rows", [1, 9, 40, 300])
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_site_with_affines_on_cuda(popularity, num_rows, dtype):
    segments = get_segments(popularity, num_rows, NUM_SLOTS)
    ranks = [(1 + 9 * i % 64, 0 if i % 3 else 33) if i % 4 else (0, 0) for i in range(NUM_SLOTS)]
    for aligned in (True, False):
        case = make_case(
            segments,
            in_features=1040,
            slice_widths=(576, 136),
            ranks=ranks,
            dtype=dtype,
            aligned=aligned,
            device="cuda",
        )
        affine = make_affine_case(segments, width=712, dtype=dtype, aligned=aligned, device="cuda")
        assert_site_equals_reference(case, lora, affine, slack=2)  # y is rounded twice by the reference


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
    affines = torch.full_like(case.tables[0], -1).index_fill_(0, torch.tensor([1, 3], device="cuda"), 7)
    torch.library.opcheck(torch.ops.lorikeet.lora_expand_, (case.y, h, arena, *rest, affines))
    affine = make_affine_case(get_segments("zipf", 12, NUM_SLOTS), padding_rows=0, device="cuda")
    torch.library.opcheck(torch.ops.lorikeet.lora_affine_, (affine.y, affine.arena.nan_to_num(), *affine.tables))
