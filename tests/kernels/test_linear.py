"""The native dense linear against fp64, over weights of every storage type."""

import pytest
import torch
from lorikeet.kernels import linear as module
from lorikeet.kernels.linear import linear

from .native_libraries import LIBRARIES, every_library, use_library

# Fewer rows than a tile's sixteen, two tiles and a rest; columns that end within a cache line, and more than a panel's.
SHAPES = [(1, 8), (11, 64), (25, 576), (40, 1544), (13, 4096), (33, 264), (5, 7)]
NATIVE = {"_native_linear": ("lorikeet_linear", *module._ARGUMENTS)}
# Of the sum of the products' absolute values.
TOLERANCE = 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_library
def test_linear_is_that_of_the_weight_in_fp32(monkeypatch, library, shape, dtype):
    use_library(monkeypatch, library, module, NATIVE)
    n, k = shape
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n)
    for num_rows in (0, 1, 2, 3, 4, 7, 17, 33, 130):
        x = torch.randn(num_rows, k)
        terms = x.double().abs() @ weight.double().abs().t() + bias.abs()
        for b in (None, bias):
            y = linear(x, weight, b)
            assert y.dtype == torch.float32 and y.shape == (num_rows, n)
            want = x.double() @ weight.double().t() + (0 if b is None else b)
            assert ((y - want).abs() <= TOLERANCE * terms).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("library", LIBRARIES[:-1])
def test_a_row_does_not_depend_on_its_batch_threads_or_strides(monkeypatch, library, dtype):
    use_library(monkeypatch, library, module, NATIVE)
    weight = torch.randn(37, 600).to(dtype)[:, 11:587]
    x = torch.randn(140, 600)[:, 5:581]
    before = torch.get_num_threads()
    whole = linear(x, weight)
    try:
        for count, threads in ((1, 1), (2, 2), (3, 1), (4, 2), (9, 1), (33, 2), (129, 1), (140, 2)):
            torch.set_num_threads(threads)
            assert torch.equal(linear(x[:count], weight.clone()), whole[:count]), (count, threads)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(linear(x.t().contiguous().t(), weight), whole)


def test_what_would_be_read_beyond_its_end_is_refused():
    x, weight = torch.randn(2, 64), torch.randn(16, 64)
    for bad in (torch.randn(2, 56), x.double()):
        with pytest.raises(ValueError, match=r"x must be float32 or bfloat16 \[T, 64\]"):
            linear(bad, weight)
    with pytest.raises(ValueError, match="bias must be"):
        linear(x, weight, torch.randn(15))
    for bad in (weight.double(), torch.randn(64, 16).t()):
        with pytest.raises(ValueError, match="weight must be"):
            linear(x, bad)
