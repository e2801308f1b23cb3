"""The kernels that multiply pairs of bfloat16, NF4 and dense, against fp64 over the same rounded values.

On CPUs without AVX512-BF16 the same source runs with simple code in place of its instructions.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from lorikeet.kernels import linear as dense
from lorikeet.kernels import nf4_cpu
from lorikeet.kernels.nf4 import nf4_linear, nf4_linear_reference, prepare_for_device
from lorikeet.kernels.nf4_tiles import Layout
from torch import Tensor

from .native_libraries import LIBRARIES, multiply_in_pairs, use_library
from .nf4_cases import make_weight, worst_row_error

BF16 = torch.bfloat16
# Rows that are no multiple of a tile, columns that are no multiple of what is read at once.
NF4_SHAPES = ((1, 64), (16, 128), (70, 576), (133, 320))
DENSE_SHAPES = ((1, 8), (11, 64), (25, 576), (40, 200), (35, 1544))
ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 33)
# Sums: of the products' absolute values, in fp32. The result: half a unit in the last place of bfloat16.
SUM_TOLERANCE, ROUNDING = 1e-6, 2**-8


class Case(NamedTuple):
    """A weight and what multiplies by it."""

    run: Callable[[Tensor, Tensor | None], Tensor]
    values: Tensor


def nf4_case(n: int, k: int) -> Case:
    weight = make_weight(n, k)
    prepared = prepare_for_device(weight, BF16)
    assert prepared.layout is Layout.PAIRS
    # Each value is one of 16, rounded, times the constant of its block, which is the largest of them.
    blocks = weight.dequantize(torch.float32).view(n, -1, 64)
    constants = blocks.abs().amax(dim=-1, keepdim=True)
    codes = (blocks / constants).nan_to_num().to(BF16).double()
    return Case(lambda x, bias: nf4_linear(x, prepared, bias), (codes * constants.double()).view(n, k))


def dense_case(n: int, k: int) -> Case:
    weight = torch.randn(n, k + 3).to(BF16)[:, 1 : k + 1]
    return Case(lambda x, bias: dense.linear(x, weight, bias), weight.double())


CASES = [pytest.param(nf4_case, *shape, id=f"nf4-{shape[0]}-{shape[1]}") for shape in NF4_SHAPES]
CASES += [pytest.param(dense_case, *shape, id=f"dense-{shape[0]}-{shape[1]}") for shape in DENSE_SHAPES]


@pytest.fixture(autouse=True, params=LIBRARIES[:-1])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_in_pairs(monkeypatch)
    nf4_pairs = ("lorikeet_nf4_pair_linear", *nf4_cpu._ARGUMENTS)
    use_library(monkeypatch, request.param, nf4_cpu, {"_native_pair_linear": nf4_pairs})
    use_library(
        monkeypatch, request.param, dense, {"_native_pair_linear": ("lorikeet_pair_linear", *dense._ARGUMENTS[1:])}
    )


@pytest.mark.parametrize(("make", "n", "k"), CASES)
def test_is_the_product_of_the_rounded_values(make: Callable[[int, int], Case], n: int, k: int) -> None:
    case = make(n, k)
    for num_rows in ROWS:
        x, bias = torch.randn(num_rows, k).to(BF16), torch.randn(n).to(BF16)
        terms = x.double().abs() @ case.values.abs().t() + bias.double().abs()
        for b in (None, bias):
            y = case.run(x, b)
            assert y.dtype == BF16 and y.shape == (num_rows, n)
            want = x.double() @ case.values.t() + (0 if b is None else b.double())
            assert ((y.double() - want).abs() <= SUM_TOLERANCE * terms + ROUNDING * want.abs()).all()


@pytest.mark.parametrize(("make", "n", "k"), CASES)
def test_a_row_does_not_depend_on_its_batch_threads_or_strides(
    make: Callable[[int, int], Case], n: int, k: int
) -> None:
    case = make(n, k)
    x = torch.randn(33, k + 9).to(BF16)[:, 3 : k + 3]
    before = torch.get_num_threads()
    whole = case.run(x, None)
    try:
        for count, threads in ((1, 1), (2, 2), (3, 1), (4, 2), (6, 1), (9, 2), (17, 1), (33, 2)):
            torch.set_num_threads(threads)
            assert torch.equal(case.run(x[:count].contiguous(), None), whole[:count]), (count, threads)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(case.run(x.t().contiguous().t(), None), whole)


@pytest.mark.parametrize(("make", "n", "k"), CASES)
def test_not_a_number_stays_in_its_row(make: Callable[[int, int], Case], n: int, k: int) -> None:
    case = make(n, k)
    x = torch.randn(9, k).to(BF16)
    want = case.run(x, None)
    x[4, 7], x[6, k - 1] = torch.nan, torch.inf
    got = case.run(x, None)
    assert not got[4].isfinite().any() and not got[6].isfinite().any()
    others = [i for i in range(9) if i not in (4, 6)]
    assert torch.equal(got[others], want[others])


def test_nf4_is_near_to_the_reference_of_its_own_values() -> None:
    weight = make_weight(133, 576)
    prepared = prepare_for_device(weight, BF16)
    for dtype in (BF16, torch.float32):  # another type is converted
        x, bias = torch.randn(17, 576).to(dtype), torch.randn(133).to(dtype)
        y = nf4_linear(x, prepared, bias)
        assert y.dtype == dtype
        # bf16: rounded are x, codes, results; of a row's norm.
        assert worst_row_error(y, nf4_linear_reference(x, weight, bias)) < 6e-3


def test_what_would_be_read_beyond_its_end_is_refused() -> None:
    prepared = prepare_for_device(make_weight(32, 128), BF16)
    x, weight = torch.randn(2, 128).to(BF16), torch.randn(32, 128).to(BF16)
    with pytest.raises(ValueError, match=r"x must be \[T, 128\]"):
        nf4_linear(x[:, :64], prepared)
    with pytest.raises(ValueError, match="x must be float32 or bfloat16"):
        dense.linear(x[:, :64], weight)
    for bias in (torch.randn(31).to(BF16), torch.randn(64).to(BF16)[::2]):
        for run in (lambda b: nf4_linear(x, prepared, b), lambda b: dense.linear(x, weight, b)):
            with pytest.raises(ValueError, match="bias must be contiguous"):
                run(bias)
    with pytest.raises(ValueError, match="weight must be bfloat16"):
        dense.linear(x, weight.half())
