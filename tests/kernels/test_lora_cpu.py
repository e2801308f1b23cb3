"""The CPU's LoRA over the rows of all passes equals the plain reference pass by pass, natively and in plain torch.

In bfloat16 as CPUs without AVX512-BF16 compute it; pairs are in test_lora_pairs.py.
"""

import random

import pytest
import torch
from lorikeet.kernels import lora_site
from lorikeet.kernels.lora_reference import lora_expand_reference_, lora_shrink_reference
from lorikeet.kernels.lora_rows import AdaptedRows, Piece
from lorikeet.kernels.lora_site import LoraSite

from .lora_cases import bits, make_case
from .native_libraries import LIBRARIES, multiply_in_pairs, use_library

# (atol, rtol). fp32: sums of 48 to 64 products in another order. 16-bit: y is rounded once, half a unit in the last
# place, and the same where the fp32 values lie on either side of a tie.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-4, 1e-3), torch.bfloat16: (1e-4, 8e-3)}
EQUAL = [(8, 8, 8)] * 9
MIXED = [(4, 0, 2), (1, 1, 1), (16, 8, 64), (0, 0, 0), (8, 8, 8), (8, 8, 8), (0, 3, 0), (8, 8, 8), (4, 0, 2)]
RANKS = [(1, 3, 8), (16, 17, 0), (64, 0, 1), (0, 256, 0), (3, 3, 3)]


@pytest.fixture(params=LIBRARIES, autouse=True)
def library(request, monkeypatch):
    multiply_in_pairs(monkeypatch, False)
    use_library(monkeypatch, request.param, lora_site, {"_add": lora_site._ADD, "_add_briefly": lora_site._ADD})
    return request.param


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def site_of(case):
    return LoraSite(case.arena, *case.tables[:2], case.slice_widths, case.x.shape[1])


def add(case, pieces):
    """y of the case after the pieces."""
    y = case.y.clone()
    site_of(case).add_(y, case.x, AdaptedRows(pieces))
    return y


def check(passes, *, rows=None, ranks=EQUAL, used=None, **options):
    """Apply passes of (start, end, slot, weight) to 40 rows or more; only the used slots have weights, others are NaN.

    Rows that no pass adapts are NaN, and neither they nor slices of rank 0 change a bit.
    """
    used = range(len(ranks)) if used is None else used
    case = make_case([(slot, -(-40 // len(used))) for slot in used], ranks=ranks, **options)
    offsets, slot_ranks, _, _ = case.tables
    pieces = [Piece(slot, start, end, weight) for each in passes for start, end, slot, weight in each]
    changed = torch.zeros(case.y.shape, dtype=torch.bool)
    adapted = torch.zeros(len(case.y), dtype=torch.bool)
    for piece in pieces:
        adapted[piece.start : piece.end] = True
        is_changed = (slot_ranks[piece.slot] > 0).repeat_interleave(torch.tensor(case.slice_widths))
        changed[piece.start : piece.end] |= is_changed
    case.x[~adapted], case.y[~adapted] = torch.nan, torch.nan
    x, want, arena = case.x.float(), case.y.float().clone(), case.arena.float()
    for slot, start, end, weight in pieces:
        starts, slots = torch.tensor([0, start, end]), torch.tensor([-1, slot])
        tables = (offsets, slot_ranks, starts, slots)
        h = lora_shrink_reference(x, arena, *tables, case.max_rank, torch.tensor([1.0, weight]))
        lora_expand_reference_(want, h, arena, *tables, case.slice_widths, x.shape[1])
    y = case.y.clone()
    site_of(case).add_(y, case.x, AdaptedRows(pieces) if rows is None else rows)
    atol, rtol = TOLERANCES[y.dtype]
    torch.testing.assert_close(y[changed].float(), want[changed], atol=atol, rtol=rtol)
    assert torch.equal(bits(y)[~changed], bits(case.y)[~changed])


def compositions(members, first_row=2):
    """Row by row the (slot, weight) of a composition -> passes."""
    deepest = max(map(len, members))
    return [
        [(first_row + i, first_row + i + 1, *each[number]) for i, each in enumerate(members) if number < len(each)]
        for number in range(deepest)
    ]


def random_members(num_rows, num_slots, most, seed):
    generator = random.Random(seed)
    members = []
    for _ in range(num_rows):
        chosen = generator.sample(range(num_slots), generator.randint(1, most))
        members.append([(slot, generator.choice([1.0, 0.5, -0.7])) for slot in chosen])
    return members


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("ranks", [EQUAL, MIXED, RANKS], ids=["equal_ranks", "mixed_ranks", "many_ranks"])
def test_compositions_of_any_slots(ranks, dtype):
    for seed, (num_rows, most) in enumerate([(1, 1), (1, 3), (9, 2), (33, 2), (33, 5)]):
        check(compositions(random_members(num_rows, len(ranks), most, seed)), ranks=ranks, dtype=dtype, seed=seed)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("in_features", [1, 7, 17, 129])
@pytest.mark.parametrize("slice_widths", [(5,), (33, 192), (576, 192, 192), (1, 31, 16)], ids=str)
def test_shapes(slice_widths, in_features, dtype):
    ranks = [[rank] * len(slice_widths) for rank in (1, 7, 64)]
    passes = [[(0, 1, 0, 1.0), (2, 11, 1, 0.5), (11, 14, 2, 1.0)], [(4, 5, 2, -1.0)]]
    check(passes, ranks=ranks, in_features=in_features, slice_widths=slice_widths, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_beside_decodes_and_base_rows(dtype):
    first = [(0, 2, 1, 1.0), (2, 25, 0, 0.5), (25, 26, 3, 1.0), (28, 30, 4, 1.0), (30, 31, 5, -1.0), (31, 32, 2, 2.0)]
    second = [(2, 25, 2, 0.25), (28, 30, 5, 1.0), (30, 31, 4, 1.0)]
    check([first, second], dtype=dtype)
    check([first, second], ranks=MIXED, dtype=dtype)
    check([first], dtype=dtype)


@pytest.mark.parametrize("num_rows", [*range(1, 14), 47, 48, 49, 97])
def test_any_number_of_rows_of_an_adapter(num_rows):
    case = make_case([(0, num_rows), (1, 97)], ranks=EQUAL[:2])
    want = case.y.clone()
    h = lora_shrink_reference(case.x, case.arena, *case.tables, case.max_rank)
    lora_expand_reference_(want, h, case.arena, *case.tables, case.slice_widths, case.x.shape[1])
    y = add(case, [Piece(0, 0, num_rows, 1.0), Piece(1, num_rows, num_rows + 97, 1.0)])
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_rows_of_wider_tensors_are_changed_where_they_lie():
    case = make_case([(0, 3), (1, 9)], ranks=EQUAL[:2])
    pieces = [Piece(0, 0, 3, 1.0), Piece(1, 3, 12, 1.0)]
    wide_x, wide_y = torch.full((15, 61), torch.nan), torch.full((15, 237), 7.0)
    wide_x[:, 5:53], wide_y[:, 3:233] = case.x, case.y
    site_of(case).add_(wide_y[:, 3:233], wide_x[:, 5:53], AdaptedRows(pieces))
    torch.testing.assert_close(wide_y[:, 3:233], add(case, pieces), atol=0, rtol=0, equal_nan=True)
    assert (wide_y[:, :3] == 7).all() and (wide_y[:, 233:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_others(library, dtype):
    """Bit for bit: alone, beside other rows of its adapter, beside rows of others."""
    if library == "none":
        pytest.skip("a matmul of another size adds up in another order")
    case = make_case([(slot, 20) for slot in range(9)], ranks=EQUAL, dtype=dtype)
    pieces = [Piece(slot, row, row + 1, 0.5) for row in range(180) for slot in {row // 20, row * 7 % 9}]
    together = add(case, pieces)
    for row in (0, 19, 77, 179):
        alone = add(case, [piece for piece in pieces if piece.start == row])
        assert torch.equal(alone[row], together[row])
        some = add(case, [piece for piece in pieces if abs(piece.start - row) < 3])
        assert torch.equal(some[row], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 30, 300])
def test_threads_change_no_bit(num_rows, dtype, set_threads, library):
    if library == "none":
        pytest.skip("a matmul of several threads adds up in another order")
    case = make_case(
        [(0, num_rows), (1, 5), (2, 1)],
        ranks=[(64, 33, 64)] * 3,
        in_features=577,
        slice_widths=(577, 63, 192),
        dtype=dtype,
    )
    pieces = [Piece(0, 0, num_rows, 0.3), Piece(1, num_rows, num_rows + 5, 1.0), Piece(2, 0, num_rows + 6, 0.7)]
    results = []
    for threads in (1, 2, 2, 3):
        set_threads(threads)
        results.append(bits(add(case, random.sample(pieces, len(pieces)))))
    assert all(torch.equal(results[0], each) for each in results)


def test_blocks_may_move_between_calls():
    case = make_case([(0, 4), (1, 4)], ranks=EQUAL[:2])
    pieces = [Piece(0, 0, 4, 1.0), Piece(1, 4, 8, 1.0)]
    want = add(case, pieces)
    site, y = site_of(case), case.y.clone()
    case.tables[0].copy_(case.tables[0].flip(0).roll(-1))  # offsets of slots 0 and 1 in each other's place
    site.add_(y, case.x, AdaptedRows([Piece(1, 0, 4, 1.0), Piece(0, 4, 8, 1.0)]))
    torch.testing.assert_close(y, want, atol=0, rtol=0, equal_nan=True)


def test_no_slot_adapts_the_site_and_no_rows():
    check([[(0, 4, 3, 1.0)]], ranks=MIXED)
    check([])


def test_nan_and_infinity_stay_in_their_rows():
    case = make_case([(0, 3), (1, 3)], ranks=EQUAL[:2])
    case.x[1, 5], case.x[4, 0] = torch.nan, torch.inf
    y = add(case, [Piece(0, 0, 3, 1.0), Piece(1, 3, 6, 1.0)])[:6]
    assert y[1].isnan().all() and not y[4].isfinite().any()
    assert y[[0, 2, 3, 5]].isfinite().all()


def test_states_what_is_wrong():
    case = make_case([(0, 3)], ranks=[(4, 0, 2)], padding_rows=0)
    site, rows, (offsets, ranks, *_) = site_of(case), AdaptedRows([Piece(0, 0, 3, 1.0)]), case.tables
    for y, x in ((case.y[:2], case.x), (case.y, case.x.half()), (case.y, case.x[:, 1:]), (case.y.T, case.x)):
        with pytest.raises(RuntimeError, match=r"must be torch.float32 \[3 or more, "):
            site.add_(y, x, rows)
    with pytest.raises(RuntimeError, match=r"slots below 2, got .* 6 slots"):
        site.add_(case.y, case.x, AdaptedRows([Piece(5, 0, 3, 1.0)]))
    with pytest.raises(RuntimeError, match="offsets must be int64"):
        LoraSite(case.arena, offsets.int(), ranks, case.slice_widths, 48)
    with pytest.raises(RuntimeError, match=r"ranks must be int32 \[2, 2\]"):
        LoraSite(case.arena, offsets, ranks, [33, 197], 48)
    with pytest.raises(RuntimeError, match="arena must be flat"):
        LoraSite(case.arena.double(), offsets, ranks, case.slice_widths, 48)


def test_rows_are_sorted_by_adapter():
    rows = AdaptedRows([Piece(4, 5, 7, 1.0), Piece(4, 3, 4, 0.7), Piece(1, 3, 4, 0.3)])
    assert rows.slots.tolist() == [1, 4] and rows.starts.tolist() == [0, 1, 4]
    assert rows.rows.tolist() == [3, 3, 5, 6] and rows.weights.tolist() == pytest.approx([0.3, 0.7, 1, 1])
    assert rows.distinct.tolist() == [3, 5, 6] and rows.places.tolist() == [0, 0, 1, 2]
    assert (rows.num_slots, rows.num_rows) == (5, 7)
