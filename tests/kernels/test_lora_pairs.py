"""The CPU's LoRA by products of pairs of bfloat16 against fp64 over the same values.

On CPUs without AVX512-BF16 the same source runs with simple code in place of its instructions.
"""

import ctypes
import mmap
import random

import pytest
import torch
from lorikeet.kernels import lora_site
from lorikeet.kernels.lora_rows import AdaptedRows, Piece
from lorikeet.kernels.lora_site import LoraSite
from torch import Tensor

from .lora_cases import LoraCase, bits, make_case
from .native_libraries import LIBRARIES, multiply_in_pairs, use_library

BF16 = torch.bfloat16
# What is added up: of the absolute values of all products and of y, in fp32. y: half a unit in its last place.
SUM_TOLERANCE, ROUNDING = 2e-6, 2**-8
WEIGHTS = (1.0, 0.5, -0.7)
MIXED = [(4, 0, 2), (1, 1, 1), (16, 8, 64), (0, 0, 0), (8, 8, 8), (17, 3, 0), (0, 2, 0), (16, 16, 16)]


@pytest.fixture(params=LIBRARIES[:-1], autouse=True)
def library(request, monkeypatch):
    multiply_in_pairs(monkeypatch)
    use_library(monkeypatch, request.param, lora_site, {"_add": lora_site._ADD, "_add_briefly": lora_site._ADD})


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def fresh_case(num_rows: int, ranks, **options) -> LoraCase:
    """In bfloat16, with weights for all slots and rows that nobody adapts behind the others."""
    per_slot = -(-num_rows // len(ranks))
    segments = [(slot, per_slot) for slot in range(len(ranks))]
    return make_case(segments, ranks=ranks, dtype=BF16, seed=random.getrandbits(31), **options)


def random_pieces(rows, num_slots: int, most: int) -> list[Piece]:
    """One to `most` adapters of each row."""
    return [
        Piece(slot, row, row + 1, random.choice(WEIGHTS))
        for row in rows
        for slot in random.sample(range(num_slots), random.randint(1, min(most, num_slots)))
    ]


def add(case: LoraCase, pieces, *, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """y of the case after the pieces, or a given y in place."""
    y = case.y.clone() if y is None else y
    x = case.x if x is None else x
    LoraSite(case.arena, *case.tables[:2], case.slice_widths, x.shape[1]).add_(y, x, AdaptedRows(pieces))
    return y


def exact(case: LoraCase, pieces) -> tuple[Tensor, Tensor]:
    """y in fp64, and what its elements' sums have as absolute values."""
    offsets, ranks, *_ = case.tables
    x, y = case.x.double(), case.y.double()
    sizes, width = y.abs(), x.shape[1]
    for slot, start, end, weight in pieces:
        slot_ranks, position = ranks[slot].tolist(), int(offsets[slot])
        column, factor = 0, float(torch.tensor(weight))
        for s, (rank, columns) in enumerate(zip(slot_ranks, case.slice_widths, strict=True)):
            first = position + sum(slot_ranks[:s]) * width
            a = case.arena[first : first + rank * width].double().view(rank, width)
            first = position + sum(slot_ranks) * width
            first += sum(r * w for r, w in zip(slot_ranks[:s], case.slice_widths[:s], strict=True))
            b = case.arena[first : first + rank * columns].double().view(rank, columns)
            taken = slice(column, column + columns)
            y[start:end, taken] += factor * x[start:end] @ a.T @ b
            sizes[start:end, taken] += abs(factor) * x[start:end].abs() @ a.abs().T @ b.abs()
            column += columns
    return y, sizes


def check(case: LoraCase, pieces) -> None:
    """Of the rows of pieces each is the exact result, rounded once; no bit of the others changes."""
    _, ranks, *_ = case.tables
    changed = torch.zeros(case.y.shape, dtype=torch.bool)
    adapted = torch.zeros(len(case.y), dtype=torch.bool)
    widths = torch.tensor(case.slice_widths)
    for slot, start, end, _ in pieces:
        changed[start:end] |= (ranks[slot] > 0).repeat_interleave(widths)
        adapted[start:end] = True
    case.x[~adapted], case.y[~adapted] = torch.nan, torch.nan
    y = add(case, pieces)
    want, sizes = exact(case, pieces)
    within = (y.double() - want).abs() <= SUM_TOLERANCE * sizes + ROUNDING * want.abs()
    assert within[changed].all()
    assert torch.equal(bits(y)[~changed], bits(case.y)[~changed])


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 16, 17, 64])
@pytest.mark.parametrize(
    ("in_features", "slice_widths"),
    [(1, (5,)), (33, (1, 31, 16)), (48, (33, 5, 192)), (100, (320, 256)), (129, (64, 65)), (576, (576, 192, 192))],
)
def test_is_the_exact_result(in_features, slice_widths, rank):
    ranks = [[rank] * len(slice_widths)] * 3
    case = fresh_case(14, ranks, in_features=in_features, slice_widths=slice_widths)
    check(case, [Piece(2, 0, 1, 1.0), Piece(0, 2, 11, 0.5), Piece(1, 5, 14, -0.7)])


@pytest.mark.parametrize("num_rows", [*range(1, 14), 40, 47, 48, 49, 97])
def test_any_number_of_rows_of_an_adapter(num_rows):
    case = fresh_case(2 * num_rows + 2, [(16, 3)] * 2, in_features=70, slice_widths=(90, 200))
    check(case, [Piece(0, 0, num_rows, 1.0), Piece(1, num_rows, num_rows + 2, 0.5)])


@pytest.mark.parametrize(("num_rows", "most"), [(1, 1), (1, 3), (9, 2), (33, 2), (40, 5)])
def test_sums_of_any_slots(num_rows, most):
    for _ in range(3):
        case = fresh_case(num_rows + 2, MIXED)
        check(case, random_pieces(range(2, num_rows + 2), len(MIXED), most))


def test_sums_of_more_rows_than_are_kept_at_a_time():
    case = fresh_case(700, [(2, 1)] * 4, in_features=40, slice_widths=(70, 190))
    check(case, random_pieces(range(700), 4, 2))


def test_no_slot_adapts_the_site_and_no_rows():
    check(fresh_case(8, MIXED), [Piece(3, 0, 4, 1.0)])
    check(fresh_case(8, MIXED), [])


@pytest.mark.parametrize("most", [1, 3])
def test_nothing_is_rounded_but_the_sum(most):
    """y is the negative of what is added to it: what was rounded on the way would be all that is left."""
    case = fresh_case(24, [(16, 8)] * 6, in_features=96, slice_widths=(100, 64))
    pieces = random_pieces(range(24), 6, most)
    case.y[:24] = 0
    case.y[:24] = -exact(case, pieces)[0][:24].to(BF16)
    check(case, pieces)


@pytest.mark.parametrize("most", [1, 3])
def test_a_row_does_not_depend_on_the_others(most):
    """Bit for bit: alone, beside other rows of its adapter, beside rows of others."""
    case = fresh_case(120, MIXED)
    pieces = random_pieces(range(100), len(MIXED), most)
    together = add(case, pieces)
    for row in random.sample(range(100), 8):
        for reach in (0, 1, 2, 5, 17):
            near = [piece for piece in pieces if abs(piece.start - row) <= reach]
            assert torch.equal(add(case, near)[row], together[row]), reach


@pytest.mark.parametrize("num_rows", [1, 30, 300])
def test_threads_change_no_bit(num_rows, set_threads):
    case = fresh_case(3 * num_rows + 12, [(64, 33, 64)] * 3, in_features=577, slice_widths=(577, 63, 192))
    pieces = [Piece(0, 0, num_rows, 0.3), Piece(1, num_rows, num_rows + 5, 1.0), Piece(2, 0, num_rows + 6, 0.7)]
    results = []
    for threads in (1, 2, 2, 3):
        set_threads(threads)
        results.append(bits(add(case, random.sample(pieces, len(pieces)))))
    assert all(torch.equal(results[0], each) for each in results)


def test_rows_of_wider_tensors_are_changed_where_they_lie():
    case = fresh_case(12, [(8, 8, 8)] * 2)
    pieces = [Piece(0, 0, 3, 1.0), Piece(1, 3, 12, 1.0)]
    wide_x, wide_y = torch.full((15, 61), torch.nan, dtype=BF16), torch.full((15, 237), 7.0, dtype=BF16)
    wide_x[:, 5:53], wide_y[:, 3:233] = case.x, case.y
    add(case, pieces, x=wide_x[:, 5:53], y=wide_y[:, 3:233])
    assert torch.equal(bits(wide_y[:, 3:233]), bits(add(case, pieces)))
    assert (wide_y[:, :3] == 7).all() and (wide_y[:, 233:] == 7).all()


def test_not_a_number_and_infinity_stay_in_their_rows():
    case = fresh_case(9, [(8, 8, 8)] * 3)
    pieces = [Piece(0, 0, 3, 1.0), Piece(1, 3, 9, 1.0), Piece(2, 2, 5, 0.5)]
    want = add(case, pieces)
    case.x[1, 5], case.x[4, 0], case.y[7, 40] = torch.nan, torch.inf, torch.nan
    got = add(case, pieces)
    assert got[1].isnan().all() and not got[4].isfinite().any()
    assert got[7, 40].isnan() and got[7].isnan().sum() == 1
    others = [0, 2, 3, 5, 6, 8]
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("slot", [0, 1, 2])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 9])
def test_nothing_is_read_beyond_the_end_of_a_tensor(num_rows, slot):
    """Behind each of them lies a page that would end the process."""
    ranks = [(1, 17, 0), (16, 8, 3), (5, 0, 2)]
    case = fresh_case(3 * num_rows, ranks, in_features=45, slice_widths=(33, 70, 13), padding_rows=0)
    pieces = [Piece(slot, 0, num_rows, 1.0)]
    want = add(case, pieces)[:num_rows]
    size = sum(rank * (45 + width) for rank, width in zip(ranks[slot], case.slice_widths, strict=True))
    arena = before_a_forbidden_page(case.arena[: int(case.tables[0][slot]) + size])
    x, y = before_a_forbidden_page(case.x[:num_rows]), before_a_forbidden_page(case.y[:num_rows])
    LoraSite(arena, *case.tables[:2], case.slice_widths, 45).add_(y, x, AdaptedRows(pieces))
    assert torch.equal(y, want)


def before_a_forbidden_page(values: Tensor) -> Tensor:
    """A copy whose last element is the last of a page; the next page can neither be read nor written."""
    room = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, room + mmap.PAGESIZE)
    copy = torch.frombuffer(
        pages, dtype=values.dtype, count=values.numel(), offset=room - values.nbytes
    ).view(values.shape)  # fmt: skip
    copy.copy_(values)
    end = ctypes.c_void_p(copy.data_ptr() + copy.nbytes)
    assert ctypes.CDLL(None, use_errno=True).mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return copy


def test_only_bfloat16_is_multiplied_in_pairs_and_only_where_that_is_fast(monkeypatch):
    def in_pairs(dtype):
        case = make_case([(0, 3)], ranks=[(4, 1, 2)], dtype=dtype)
        return bool(LoraSite(case.arena, *case.tables[:2], case.slice_widths, 48)._tables.in_pairs)

    assert in_pairs(BF16) and not in_pairs(torch.float32) and not in_pairs(torch.float16)
    multiply_in_pairs(monkeypatch, False)
    assert not in_pairs(BF16)
