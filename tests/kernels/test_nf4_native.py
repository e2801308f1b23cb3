"""The native NF4 kernel against the reference, and the layout that it reads."""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from lorikeet.kernels import nf4_cpu
from lorikeet.kernels.native import functions
from lorikeet.kernels.nf4 import nf4_linear, nf4_linear_reference, nf4_rows, prepare_for_device
from lorikeet.kernels.nf4_tiles import TILE, Layout, from_tiles, to_tiles
from lorikeet.kernels.nf4_weight import NF4Weight, plain_absmax

from .nf4_cases import make_weight, worst_row_error

SHAPES = [(1, 64), (16, 128), (70, 576), (33, 1536), (24, 4096)]
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 11, 17, 32, 33, 100, 257)
# fp32: of the sum of the products' absolute values, 4,096 of them in one order; else of a row, rounded to 16 bits.
TOLERANCES = {torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}

needs_library = pytest.mark.skipif(functions.library_name() is None, reason="built without the C++ kernels")


def tiled(n, k):
    weight = make_weight(n, k)
    prepared = prepare_for_device(weight, torch.float32)
    assert prepared.layout is Layout.TILES
    return weight, prepared


@pytest.fixture(params=[1, 2], ids=lambda n: f"threads{n}")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["chosen", "portable"])
def library(request, monkeypatch):
    """The library that this CPU gets, and the one that any CPU could run."""
    if request.param == "portable":
        paths = [Path(functions.__file__).with_name(f"_portable{suffix}") for suffix in EXTENSION_SUFFIXES]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            pytest.skip("built without the portable library")
        native = ctypes.CDLL(str(path)).lorikeet_nf4_linear
        native.argtypes, native.restype = nf4_cpu._ARGUMENTS, None
        monkeypatch.setattr(nf4_cpu, "_native_linear", native)


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_the_reference(shape, library, threads):
    n, k = shape
    weight, prepared = tiled(n, k)
    values = weight.dequantize(torch.float32).double()
    for num_rows in ROWS:
        x, bias = torch.randn(num_rows, k), torch.randn(n)
        terms = x.double().abs() @ values.abs().t() + bias.abs()
        for b in (None, bias):
            y = nf4_linear(x, prepared, b)
            assert y.shape == (num_rows, n) and y.dtype == torch.float32
            want = x.double() @ values.t() + (0 if b is None else b)
            assert ((y - want).abs() <= TOLERANCES[torch.float32] * terms).all()


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_in_16_bits_computes_in_fp32(dtype):
    weight, prepared = tiled(70, 576)
    for num_rows in (0, 1, 5, 40):
        x, bias = torch.randn(num_rows, 576, dtype=dtype), torch.randn(70, dtype=dtype)
        y = nf4_linear(x, prepared, bias)
        assert y.dtype == dtype and y.shape == (num_rows, 70)
        assert not num_rows or worst_row_error(y, nf4_linear_reference(x, weight, bias)) < TOLERANCES[dtype]


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_its_batch_nor_on_threads(shape, library):
    n, k = shape
    _, prepared = tiled(n, k)
    x = torch.randn(140, k)
    cases = ((1, 1), (2, 2), (3, 1), (4, 2), (5, 1), (6, 2), (11, 1), (32, 2), (129, 1), (140, 2))
    before = torch.get_num_threads()
    whole = nf4_linear(x, prepared)
    try:
        for count, num_threads in cases:
            torch.set_num_threads(num_threads)
            assert torch.equal(nf4_linear(x[:count], prepared), whole[:count]), (count, num_threads)
    finally:
        torch.set_num_threads(before)


@needs_library
def test_rows_may_be_strided_and_unaligned():
    weight, prepared = tiled(70, 128)
    wide = torch.randn(6, 300)
    for x in (wide[:, 3:131], wide[::2, 100:228], torch.randn(128, 5).t()):
        torch.testing.assert_close(nf4_linear(x, prepared), nf4_linear(x.contiguous(), prepared), rtol=0, atol=0)
        torch.testing.assert_close(nf4_linear(x, prepared), nf4_linear_reference(x, weight), rtol=1e-5, atol=1e-4)


@needs_library
def test_not_a_number_stays_in_its_row():
    _, prepared = tiled(32, 128)
    x = torch.randn(9, 128)
    want = nf4_linear(x, prepared)
    x[4, 7], x[6, 70] = torch.nan, torch.inf
    got = nf4_linear(x, prepared)
    assert not got[4].isfinite().any() and not got[6].isfinite().all()
    others = [i for i in range(9) if i not in (4, 6)]
    assert torch.equal(got[others], want[others])


@needs_library
def test_what_would_be_read_beyond_its_end_is_refused():
    _, prepared = tiled(32, 128)
    with pytest.raises(ValueError, match=r"x must be \[T, 128\]"):
        nf4_linear(torch.randn(2, 64), prepared)
    for bias in (torch.randn(31), torch.randn(32).double(), torch.randn(64)[::2]):
        with pytest.raises(ValueError, match="bias must be contiguous"):
            nf4_linear(torch.randn(2, 128), prepared, bias)


@needs_library
@pytest.mark.parametrize("layout", [Layout.TILES, Layout.PAIRS], ids=lambda layout: layout.value)
@pytest.mark.parametrize("shape", [(16, 64), (1, 64), (70, 576), (160, 192)], ids=str)
def test_tiles_and_back_is_the_same_weight(shape, layout):
    n, k = shape
    weight = make_weight(n, k)
    absmax = plain_absmax(weight.absmax)
    codes, constants = to_tiles(weight.codes, absmax, n, k, layout)
    assert codes.numel() == -(-n // TILE) * TILE * k // 2
    canonical, plain = from_tiles(codes, constants, layout)
    assert torch.equal(canonical[: n * k // 2], weight.codes) and torch.equal(plain[: n * k // 64], absmax)
    prepared = NF4Weight(codes, constants, n, k, layout)
    if n % TILE == 0:
        assert prepared.nbytes == NF4Weight(weight.codes, absmax, n, k).nbytes
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(prepared.dequantize(dtype), weight.dequantize(dtype))
        for start, stop in ((0, 1), (n // 3, n // 2 + 1), (n - 1, n), (n, n)):
            assert torch.equal(nf4_rows(prepared, start, stop, dtype), nf4_rows(weight, start, stop, dtype))
