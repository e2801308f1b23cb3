"""LoRA shrink and expand on the CPU equal the plain reference, and keep their contract."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from lorikeet.kernels import lora
from torch._subclasses import FakeTensorMode

from .lora_cases import LoraCase, assert_equals_reference, make_case
from .popularity import POPULARITIES, get_segments

# (atol, rtol). The CPU path computes in fp32 and rounds once, as the reference does: 16-bit results differ by one unit
# in the last place where the fp32 sums lie on either side of a tie.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-4, 1e-3), torch.bfloat16: (1e-4, 8e-3)}
DTYPES = list(TOLERANCES)
EQUAL_RANKS = [(8, 8, 8)] * 9


def check(case: LoraCase) -> None:
    assert_equals_reference(case, lora.lora_shrink, lora.lora_expand_, TOLERANCES[case.x.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_popularity(popularity, dtype):
    check(make_case(get_segments(popularity, 40, 5), dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [1, 17, 48, 64, 129, 2049])
@pytest.mark.parametrize("slice_widths", [(5,), (33, 192), (192, 5, 33), (576, 192, 192)], ids=str)
def test_shapes(in_features, slice_widths, dtype):
    ranks = [[rank] * len(slice_widths) for rank in (1, 7, 64)]
    check(
        make_case(
            [(-1, 2), (0, 1), (1, 9), (2, 3)],
            in_features=in_features,
            slice_widths=slice_widths,
            ranks=ranks,
            dtype=dtype,
        )
    )


@pytest.mark.parametrize("rank", range(1, 65, 7))
def test_ranks_differ_by_slice_and_slot(rank):
    ranks = [(rank, 0, 0), (0, rank, 0), (0, 0, rank), (rank, 2 * rank, 0), (0, 0, 0), (65 - rank, 1, rank)]
    check(make_case([(slot, 1 + slot % 3) for slot in range(-1, 6)], ranks=ranks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[4] * 8, [1] * 9, [3, 1, 3, 17], [64]], ids=str)
def test_segments_of_any_lengths(lengths, dtype):
    check(make_case(list(enumerate(lengths)), ranks=EQUAL_RANKS, dtype=dtype))


def test_segments_apart_with_base_rows_between():
    segments = [(0, 2), (-1, 1), (1, 2), (-1, 3), (2, 2), (0, 2), (-1, 1), (3, 2)]
    check(make_case(segments, ranks=EQUAL_RANKS))
    check(make_case(segments, ranks=EQUAL_RANKS, dtype=torch.bfloat16))


def test_a_slot_may_own_several_segments():
    check(make_case([(1, 2), (1, 2), (0, 2), (1, 1), (1, 0), (1, 20)]))


def test_strided_rows_and_tables():
    case = make_case([(-1, 1), (0, 2), (2, 2)])
    x, y = torch.zeros(8, 60), torch.zeros(8, 240)
    x[:, :48], y[:, :230] = case.x, case.y
    offsets, ranks, starts, slots = case.tables
    wide_ranks = torch.cat([ranks, torch.full_like(ranks, 9)], dim=1)[:, :3]
    check(replace(case, x=x[:, :48], y=y[:, :230], tables=(offsets, wide_ranks, starts, slots)))


def test_arena_may_be_a_part_of_a_larger_tensor():
    case = make_case([(0, 2), (1, 2), (2, 2), (4, 17)], ranks=EQUAL_RANKS)
    larger = torch.cat([torch.full((7,), torch.nan), case.arena])
    check(replace(case, arena=larger[7:]))


def test_no_rows():
    check(make_case([], padding_rows=0))
    check(make_case([(0, 0), (-1, 0)], padding_rows=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    case = make_case(get_segments("zipf", 12, 5), dtype=dtype, padding_rows=0)
    h = lora.lora_shrink(case.x, case.arena, *case.tables, case.max_rank)
    args = (case.x, case.arena.nan_to_num(), *case.tables, case.max_rank)
    torch.library.opcheck(torch.ops.lorikeet.lora_shrink, args)
    torch.library.opcheck(torch.ops.lorikeet.lora_shrink, (*args, case.weights))
    expand_args = (case.y, h, case.arena.nan_to_num(), *case.tables, case.slice_widths, case.x.shape[1])
    torch.library.opcheck(torch.ops.lorikeet.lora_expand_, expand_args)
    affines = torch.full_like(case.tables[0], -1).index_fill_(0, torch.tensor([1, 3]), 7)
    torch.library.opcheck(torch.ops.lorikeet.lora_expand_, (*expand_args, affines))


def test_expand_with_affines_is_affine_and_expand():
    case = make_case(get_segments("zipf", 12, 5))
    arena = torch.cat([case.arena, torch.randn(2 * 230)])
    affines = torch.full_like(case.tables[0], -1).index_fill_(0, torch.tensor([0, 2, 3]), case.arena.shape[0])
    h = lora.lora_shrink(case.x, arena, *case.tables, case.max_rank)
    rest = (arena, *case.tables, case.slice_widths, case.x.shape[1])
    apart, fused = case.y.clone(), case.y.clone()
    lora.lora_affine_(apart, arena, affines, *case.tables[2:])
    lora.lora_expand_(apart, h, *rest)
    lora.lora_expand_(fused, h, *rest, affines)
    torch.testing.assert_close(fused, apart, atol=0, rtol=0, equal_nan=True)


def test_fake_knows_shape_and_dtype():
    case = make_case([(0, 2), (-1, 3)], dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        x, arena, *tables = (mode.from_tensor(t) for t in (case.x, case.arena, *case.tables))
        h = torch.ops.lorikeet.lora_shrink(x, arena, *tables, 23)
    assert h.shape == (1, 8, 23) and h.dtype == torch.float32


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(3, 48, dtype=torch.float16), "x must be torch.float32 like arena, got torch.float16"),
        (0, torch.zeros(48), "x must have two dimensions"),
        (0, torch.zeros(48, 3).t(), "x must have contiguous rows"),
        (1, torch.zeros(4, 4), "arena must be flat"),
        (2, torch.zeros(2, dtype=torch.int32), "offsets must be int64"),
        (3, torch.zeros(2, 3, dtype=torch.int64), r"ranks must be int32 \[2, num_slices\]"),
        (4, torch.zeros(5, dtype=torch.int32), r"seg_starts must be int32 \[2\]"),
        (5, torch.zeros(1, dtype=torch.int64), "seg_slots must be int32"),
        (7, torch.ones(1, dtype=torch.float64), r"seg_weights must be float32 \[1\], got torch.float64"),
        (7, torch.ones(2), r"seg_weights must be float32 \[1\], got torch.float32 \[2\]"),
        (7, torch.ones(()), r"seg_weights must be float32 \[1\]"),
    ],
)
def test_shrink_states_what_is_wrong(position, wrong, message):
    case = make_case([(0, 3)], ranks=[(4, 0, 2)], padding_rows=0)
    args = [case.x, case.arena, *case.tables, 6, torch.ones(1)]
    args[position] = wrong
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lorikeet.lora_shrink(*args)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(3, 230, dtype=torch.bfloat16), "y must be torch.float32 like arena"),
        (1, torch.zeros(1, 3, 6, dtype=torch.float16), r"h must be float32 \[num_splits, 3, max_rank\]"),
        (1, torch.zeros(1, 4, 6), r"h must be float32 \[num_splits, 3, max_rank\]"),
        (1, torch.zeros(3, 6), r"h must be float32 \[num_splits, 3, max_rank\]"),
        (9, torch.zeros(2, dtype=torch.int32), r"affines must be int64 \[2\], got torch.int32"),
        (7, [230], "slice_widths must be 3 widths that add up to 230"),
        (7, [33, 5, 191], "slice_widths must be 3 widths that add up to 230"),
    ],
)
def test_expand_states_what_is_wrong(position, wrong, message):
    case = make_case([(0, 3)], ranks=[(4, 0, 2)], padding_rows=0)
    args = [case.y, torch.zeros(1, 3, 6), case.arena, *case.tables, case.slice_widths, 48, None]
    args[position] = wrong
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lorikeet.lora_expand_(*args)


def test_operators_work_where_triton_is_not_installed():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from lorikeet.kernels import lora\n"
        "tables = (torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int32),\n"
        "          torch.tensor([0, 2], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))\n"
        "h = lora.lora_shrink(torch.ones(2, 3), torch.ones(8), *tables, 1)\n"
        "assert h.tolist() == [[[3.0], [3.0]]], h\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
