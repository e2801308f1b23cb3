"""LoRA's affine on the CPU equals the plain reference, and keeps its contract."""

from dataclasses import replace

import pytest
import torch
from lorikeet.kernels import lora, lora_cpu
from torch._subclasses import FakeTensorMode

from .lora_affine_cases import AFFINE_TOLERANCES, NUM_SLOTS, assert_affine_equals_reference, make_affine_case
from .native_libraries import LIBRARIES, use_library
from .popularity import POPULARITIES, get_segments

DTYPES = list(AFFINE_TOLERANCES)


@pytest.fixture(params=LIBRARIES, autouse=True)
def library(request, monkeypatch):
    signatures = {"_affine": lora_cpu._AFFINE, "_affine_briefly": lora_cpu._AFFINE}
    use_library(monkeypatch, request.param, lora_cpu, signatures)


def check(case):
    assert_affine_equals_reference(case, lora.lora_affine_)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_popularity(popularity, dtype):
    for seed, num_rows in enumerate((1, 9, 40)):
        segments = get_segments(popularity, num_rows, NUM_SLOTS, seed=seed)
        check(make_affine_case(segments, dtype=dtype, seed=seed))
        check(make_affine_case(segments, dtype=dtype, without=(), seed=seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 33, 64, 577, 2049])
def test_widths(width, dtype):
    check(make_affine_case([(-1, 2), (0, 1), (1, 9), (2, 3), (3, 17)], width=width, dtype=dtype))


@pytest.mark.parametrize("lengths", [[1] * 9, [3, 1, 3, 1], [2, 0, 1, 2], [64], [20, 3, 3, 20]], ids=str)
def test_segments_of_any_lengths(lengths):
    segments = list(enumerate(lengths))
    check(make_affine_case(segments, without=()))
    check(make_affine_case(segments, without=(1, 3, 5)))


def test_a_slot_may_own_several_segments():
    check(make_affine_case([(4, 2), (4, 2), (0, 2), (4, 1), (4, 0), (4, 20)]))
    check(make_affine_case([(4, 2)] * 6))


def test_no_slot_has_one():
    check(make_affine_case(get_segments("uniform", 30, NUM_SLOTS), without=range(1, NUM_SLOTS)))
    case = make_affine_case([(slot, 1) for slot in range(NUM_SLOTS)], without=range(1, NUM_SLOTS))
    check(replace(case, tables=(torch.full_like(case.tables[0], -1), *case.tables[1:])))


def test_no_rows():
    check(make_affine_case([], padding_rows=0))
    check(make_affine_case([(0, 0), (-1, 0)], padding_rows=0))


def test_arena_may_be_a_part_of_a_larger_tensor():
    case = make_affine_case([(0, 2), (2, 2), (3, 2), (4, 17)])
    check(replace(case, arena=torch.cat([torch.full((7,), torch.nan), case.arena])[7:]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(dtype):
    """Where y * gain is rounded before the offset is added, (1 + ulp) (1 - ulp) - 1 is 0 instead of -ulp^2."""
    ulp = torch.finfo(dtype).eps
    y = torch.full((20, 8), 1 + ulp).to(dtype)
    arena = torch.tensor([1 - ulp] * 8 + [-1.0] * 8).to(dtype)
    tables = (torch.tensor([0]), torch.tensor([0, 1, 3, 20], dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
    lora.lora_affine_(y, arena, *tables)
    assert (y == -(ulp**2)).all()


def test_threads_change_no_bit():
    case = make_affine_case(list(enumerate([300, 1, 30])), width=1537, without=())
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(case.y.clone())
        lora.lora_affine_(results[-1], case.arena, *case.tables)
    torch.set_num_threads(before)
    torch.testing.assert_close(*results, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gain_one_and_offset_zero_change_no_value(dtype):
    y = torch.randn(40, 33).to(dtype)
    arena = torch.cat([torch.ones(33), torch.zeros(33)]).to(dtype)
    tables = (torch.tensor([0]), torch.tensor([0, 1, 3, 40], dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
    result = y.clone()
    lora.lora_affine_(result, arena, *tables)
    assert torch.equal(result, y)


def test_direct_call_and_operator_agree():
    case = make_affine_case(get_segments("zipf", 30, NUM_SLOTS))
    by_operator, direct = case.y.clone(), case.y.clone()
    torch.ops.lorikeet.lora_affine_(by_operator, case.arena, *case.tables)
    lora.lora_affine_(direct, case.arena, *case.tables)
    torch.testing.assert_close(by_operator, direct, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    case = make_affine_case(get_segments("zipf", 12, NUM_SLOTS), dtype=dtype, padding_rows=0)
    torch.library.opcheck(torch.ops.lorikeet.lora_affine_, (case.y, case.arena.nan_to_num(), *case.tables))


def test_fake_changes_nothing_and_checks():
    case = make_affine_case([(0, 2), (-1, 3)], dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        y, arena, *tables = (mode.from_tensor(t) for t in (case.y, case.arena, *case.tables))
        assert torch.ops.lorikeet.lora_affine_(y, arena, *tables) is None
        with pytest.raises(RuntimeError, match=r"y must be torch\.bfloat16 like arena"):
            torch.ops.lorikeet.lora_affine_(y.float(), arena, *tables)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(3, 230, dtype=torch.float16), "y must be torch.float32 like arena, got torch.float16"),
        (0, torch.zeros(230), "y must have two dimensions"),
        (0, torch.zeros(230, 3).t(), "y must have contiguous rows"),
        (1, torch.zeros(4, 4), "arena must be flat"),
        (2, torch.zeros(2, dtype=torch.int32), "offsets must be int64"),
        (3, torch.zeros(5, dtype=torch.int32), r"seg_starts must be int32 \[2\]"),
        (4, torch.zeros(1, dtype=torch.int64), "seg_slots must be int32"),
    ],
)
def test_states_what_is_wrong(position, wrong, message):
    case = make_affine_case([(0, 3)], padding_rows=0)
    args = [case.y, case.arena, *case.tables]
    args[position] = wrong
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lorikeet.lora_affine_(*args)
