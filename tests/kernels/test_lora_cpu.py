"""The CPU's LoRA over the rows of all passes equals the plain reference pass by pass, however rows are divided."""

import random

import pytest
import torch
from lorikeet.kernels.lora_cpu import lora_add_
from lorikeet.kernels.lora_groups import AdaptedRows, Piece
from lorikeet.kernels.lora_reference import lora_expand_reference_, lora_shrink_reference

from .lora_cases import bits, make_case

# (atol, rtol). fp32: sums of 48 to 64 products in another order. 16-bit: y is rounded once for slots of equal ranks,
# in at most four steps here, each half a unit in the last place of values of up to 8.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-2, 2e-3), torch.bfloat16: (8e-2, 1.6e-2)}
EQUAL = [(8, 8, 8)] * 9
MIXED = [(4, 0, 2), (1, 1, 1), (16, 8, 64), (0, 0, 0), (8, 8, 8), (8, 8, 8), (0, 3, 0), (8, 8, 8), (4, 0, 2)]


def check(passes, *, rows=None, ranks=EQUAL, used=range(9), **options):
    """Apply passes of (start, end, slot, weight) to 40 rows or more; only the used slots have weights, others are NaN.

    Rows that no pass adapts are NaN, and neither they nor slices of rank 0 change a bit.
    """
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
    rows = AdaptedRows(pieces, case.x.dtype) if rows is None else rows
    y = case.y.clone()
    lora_add_(y, case.x, case.arena, offsets, slot_ranks, rows, case.slice_widths)
    atol, rtol = TOLERANCES[y.dtype]
    torch.testing.assert_close(y[changed].float(), want[changed], atol=atol, rtol=rtol)
    assert torch.equal(bits(y)[~changed], bits(case.y)[~changed])
    return rows


def compositions(members, first_row=2):
    """Row by row the (slot, weight) of a composition -> passes."""
    deepest = max(map(len, members))
    return [
        [(first_row + i, first_row + i + 1, *each[number]) for i, each in enumerate(members) if number < len(each)]
        for number in range(deepest)
    ]


def random_members(num_rows, slots, most, seed):
    generator = random.Random(seed)
    members = []
    for _ in range(num_rows):
        chosen = generator.sample(list(slots), generator.randint(1, most))
        members.append([(slot, generator.choice([1.0, 0.5, -0.7])) for slot in chosen])
    return members


@pytest.fixture
def matmuls(monkeypatch):
    """How many adapters each batched matmul computes."""
    sizes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append(len(a)) or bmm(a, b))
    return sizes


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("aligned", [True, False], ids=["evenly_spaced", "scattered_blocks"])
@pytest.mark.parametrize("ranks", [EQUAL, MIXED], ids=["equal_ranks", "mixed_ranks"])
def test_compositions_of_any_slots(ranks, aligned, dtype):
    for seed, (num_rows, most) in enumerate([(1, 1), (1, 3), (9, 2), (33, 2), (33, 5)]):
        members = random_members(num_rows, range(9), most, seed)
        check(compositions(members), ranks=ranks, aligned=aligned, dtype=dtype, seed=seed)


@pytest.mark.parametrize("used", [(0, 1, 2, 4, 5, 7), (0, 3, 8), (2,), (0, 2, 4, 6, 8)], ids=str)
def test_slots_between_are_read_but_do_not_matter(used):
    """The blocks of slots that are not used are NaN."""
    for seed in range(3):
        members = random_members(20, used, min(3, len(used)), seed)
        check(compositions(members), used=used, aligned=True, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("aligned", [True, False], ids=["evenly_spaced", "scattered_blocks"])
def test_chunks_beside_decodes_and_base_rows(aligned, dtype):
    first = [(0, 2, 1, 1.0), (2, 25, 0, 0.5), (25, 26, 3, 1.0), (28, 30, 4, 1.0), (30, 31, 5, -1.0), (31, 32, 2, 2.0)]
    second = [(2, 25, 2, 0.25), (28, 30, 5, 1.0), (30, 31, 4, 1.0)]
    check([first, second], aligned=aligned, dtype=dtype)
    check([first, second], ranks=MIXED, aligned=aligned, dtype=dtype)
    check([first], aligned=aligned, dtype=dtype)


def test_two_adapters_a_row_are_one_matmul_for_each_slice(matmuls):
    """Neighbours of four evenly spaced adapters, each in eight rows of sixteen: each adapter is read once."""
    members = [[(i // 4, 0.7), ((i // 4 + 1) % 4, 0.3)] for i in range(16)]
    check(compositions(members), aligned=True)
    assert matmuls == [4] * 4  # A, and B of three slices


@pytest.mark.parametrize(
    ("slots", "lengths", "sizes"),
    [
        ((0, 1, 2, 3), (2, 2, 2, 2), [4]),
        ((1, 3, 5, 7), (1, 1, 1, 1), [4]),
        ((0, 1, 2, 5, 6, 7), (1,) * 6, [3, 3]),
        ((0, 2, 3, 4), (1, 1, 1, 1), [3]),  # 0 and 2 are as far apart as nothing else
        ((3, 2, 1), (1, 1, 1), []),  # against the order of the rows
        ((0, 1, 2, 3), (1, 2, 1, 2), []),
        ((0, 1), (4, 4), []),
    ],
    ids=str,
)
def test_plain_adapters_share_matmuls_where_they_lie_like_their_rows(slots, lengths, sizes, matmuls):
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    check(
        [[(end - length, end, slot, 1.0) for slot, length, end in zip(slots, lengths, ends, strict=True)]],
        aligned=True,
    )
    assert matmuls == [size for size in sizes for _ in range(4)]


def test_padding_for_missing_and_shorter_adapters_is_limited(matmuls):
    check(compositions([[(0, 1.0), (1, 1.0)], [(3, 1.0), (1, 1.0)], [(0, 1.0), (3, 1.0)]]), aligned=True)
    assert matmuls == [4] * 4  # 2 is missing: 8 rows for 6
    matmuls.clear()
    check(compositions([[(0, 1.0), (1, 1.0)], [(0, 1.0), (2, 1.0)], [(0, 1.0)]]), aligned=True)
    assert matmuls == []  # 9 rows for 5


def test_what_was_found_for_rows_stays_right_where_blocks_move():
    passes = compositions(random_members(20, range(9), 3, 0))
    rows = check(passes, aligned=True)
    for seed in range(3):
        check(passes, rows=rows, seed=seed)
        check(passes, rows=rows, ranks=MIXED, seed=seed)
        check(passes, rows=rows, aligned=True, seed=seed)


def test_sites_alike_share_what_was_found():
    rows = AdaptedRows([Piece(0, 0, 2, 1.0), Piece(2, 2, 4, 1.0)], torch.float32)
    ranks = torch.tensor([[8], [4], [8]], dtype=torch.int32).numpy()
    one = rows.at_site(torch.tensor([100, -1, 700]).numpy(), ranks)
    other = rows.at_site(torch.tensor([300, 5, 900]).numpy(), ranks)
    assert one is not None and other is not None
    assert (one.first, other.first) == (100, 300) and one.batches is other.batches
    further = rows.at_site(torch.tensor([300, 5, 901]).numpy(), ranks)
    assert further is not None and further.batches is not other.batches


def test_no_slot_adapts_the_site():
    check([[(0, 4, 3, 1.0)]], ranks=MIXED)
    check([])


def test_results_are_the_same_every_time():
    case = make_case([(slot, 4) for slot in range(9)], ranks=EQUAL, aligned=True)
    pieces = [Piece(slot, row, row + 1, 0.5) for row in range(36) for slot in {row % 9, row * 7 % 9}]
    results = []
    for _ in range(5):
        y = case.y.clone()
        rows = AdaptedRows(random.sample(pieces, len(pieces)), torch.float32)
        lora_add_(y, case.x, case.arena, *case.tables[:2], rows, case.slice_widths)
        results.append(y)
    assert all(torch.equal(bits(results[0]), bits(each)) for each in results)
