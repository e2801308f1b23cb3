"""RMS norm, with and without the residual add, equals what transformers computes, on every implementation."""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from lorikeet.kernels import norm
from lorikeet.kernels.norm import rms_norm_reference
from torch import Tensor

from .native_libraries import every_library, two_threads, use_library

__all__ = ["two_threads"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Relative: the order of additions changes the mean's last bits, so at 16 bit a value may be rounded to its neighbour
# before and after it is multiplied with the weight.
TOLERANCES = {FP32: 2e-6, FP16: 2e-3, BF16: 1.6e-2}
EPS = 1e-5


def dtypes(*chosen: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", chosen, ids=lambda dtype: str(dtype).removeprefix("torch."))


every_dtype, interpreted_dtype = dtypes(FP32, FP16, BF16), dtypes(FP32, FP16)


class Shape(NamedTuple):
    """Of one call; `gap`: elements between the rows of the input."""

    num_rows: int
    width: int
    gap: int = 0


SHAPES = [Shape(1, 64), Shape(5, 576), Shape(3, 77), Shape(2, 1), Shape(7, 40, gap=24), Shape(0, 64)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.num_rows}x{s.width}+{s.gap}")


class Inputs(NamedTuple):
    """Arguments of the operators; rows of very different size, so that a wrong mean shows."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    rows: Tensor


def make(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    def rows(scale: Tensor | float) -> Tensor:
        wide = torch.randn(shape.num_rows, shape.width + shape.gap) * scale
        return wide.to(dtype).to(device)[:, : shape.width]

    scales = torch.logspace(-3, 2, shape.num_rows)[:, None]
    chosen = torch.arange(shape.num_rows - 1, -1, -2, device=device)
    return Inputs(rows(scales), rows(scales), (1 + 0.3 * torch.randn(shape.width)).to(dtype).to(device), chosen)


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.is_contiguous() and got.dtype == want.dtype
    tolerance = TOLERANCES[got.dtype]
    torch.testing.assert_close(got.cpu(), want.cpu(), atol=tolerance * 1e-2, rtol=tolerance)


RmsNorm = Callable[..., Tensor]


def assert_norms(run: RmsNorm, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> None:
    """All four forms of the operator that leaves its inputs as they are."""
    x, residual, weight, rows = make(shape, dtype, device)
    before = x.clone(), residual.clone()
    assert_close(run(x, weight, EPS, None, None), rms_norm_reference(x, weight, EPS))
    assert_close(run(x, weight, EPS, residual, None), rms_norm_reference(x + residual, weight, EPS))
    assert_close(run(x, weight, EPS, None, rows), rms_norm_reference(x, weight, EPS)[rows])
    assert_close(run(x, weight, EPS, residual, rows), rms_norm_reference(x + residual, weight, EPS)[rows])
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def assert_adds_and_norms(run: RmsNorm, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> None:
    """The sum is rounded to the dtype, in place, before it is normalized."""
    x, residual, weight, _ = make(shape, dtype, device)
    added, kept = residual + x, x.clone()
    assert_close(run(residual, x, weight, EPS), rms_norm_reference(added, weight, EPS))
    assert torch.equal(residual, added) and torch.equal(x, kept)


class TestCpu:
    @every_library
    @every_dtype
    def test_both_equal_reference(self, library: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        use_library(monkeypatch, library, norm, {"_norm": norm._NORM, "_norm_briefly": norm._NORM})
        for shape in (*SHAPES, Shape(100, 577)):
            assert_norms(norm.rms_norm, shape, dtype)
            assert_adds_and_norms(norm.add_rms_norm_, shape, dtype)

    def test_neither_threads_nor_other_rows_change_a_row(self, two_threads: None) -> None:
        x, residual, weight, rows = make(Shape(200, 580), FP32)
        got = norm.rms_norm(x, weight, EPS, residual)
        torch.set_num_threads(1)
        assert torch.equal(norm.rms_norm(x, weight, EPS, residual), got)
        assert torch.equal(norm.rms_norm(x, weight, EPS, residual, rows[:3]), got[rows[:3]])


class TestOperators:
    def test_opcheck(self) -> None:
        x, residual, weight, rows = make(Shape(5, 48), FP32)
        for optional in ((), (residual,), (residual, rows), (None, rows)):
            torch.library.opcheck(torch.ops.lorikeet.rms_norm.default, (x, weight, EPS, *optional))
        torch.library.opcheck(torch.ops.lorikeet.add_rms_norm_.default, (residual, x, weight, EPS))

    def test_dispatched_call_equals_the_direct_one(self) -> None:
        assert_norms(torch.ops.lorikeet.rms_norm.default, Shape(5, 48), BF16)
        assert_adds_and_norms(torch.ops.lorikeet.add_rms_norm_.default, Shape(5, 48), BF16)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(4, 8).double()}, "expected float32, bfloat16 or float16, got torch.float64"),
            ({"x": torch.zeros(8, 4).t()}, "x must be torch.float32 \\[4, 8\\] with contiguous rows"),
            ({"weight": torch.ones(7)}, "weight must be torch.float32 \\[8\\], contiguous"),
            ({"residual": torch.zeros(3, 8)}, "residual must be torch.float32 \\[4, 8\\]"),
            ({"rows": torch.zeros(2, dtype=torch.int32)}, "rows must be int64"),
        ],
    )
    def test_what_breaks_the_contract_is_refused(self, change: dict[str, Tensor], message: str) -> None:
        arguments = {"x": torch.zeros(4, 8), "weight": torch.ones(8), "eps": EPS} | change
        with pytest.raises(RuntimeError, match=message):
            torch.ops.lorikeet.rms_norm.default(**arguments)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run natively, in TestGpu")
class TestInterpreted:
    """The Triton kernel in Triton's interpreter, on the CPU. Its casts to bf16 truncate (Triton 3.6 and 3.7)."""

    @every_shape
    @interpreted_dtype
    def test_norm_equals_reference(self, shape: Shape, dtype: torch.dtype) -> None:
        from lorikeet.kernels import norm_triton

        assert_norms(norm_triton.rms_norm, shape, dtype)

    @every_shape
    @interpreted_dtype
    def test_add_and_norm_equals_reference(self, shape: Shape, dtype: torch.dtype) -> None:
        from lorikeet.kernels import norm_triton

        assert_adds_and_norms(norm_triton.add_rms_norm_, shape, dtype)


@pytest.mark.gpu
class TestGpu:
    SHAPES = (*SHAPES, Shape(64, 4096), Shape(3, 8192), Shape(2, 16384), Shape(2, 5000), Shape(70000, 64))

    @pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.num_rows}x{s.width}+{s.gap}")
    @every_dtype
    def test_both_equal_reference(self, shape: Shape, dtype: torch.dtype) -> None:
        assert_norms(norm.rms_norm, shape, dtype, "cuda")
        assert_adds_and_norms(norm.add_rms_norm_, shape, dtype, "cuda")

    def test_opcheck(self) -> None:
        x, residual, weight, rows = make(Shape(5, 48), FP32, "cuda")
        torch.library.opcheck(torch.ops.lorikeet.rms_norm.default, (x, weight, EPS, residual, rows))
        torch.library.opcheck(torch.ops.lorikeet.add_rms_norm_.default, (residual, x, weight, EPS))
