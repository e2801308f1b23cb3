"""The gated activation equals what transformers computes, on every implementation."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from lorikeet.kernels import activation
from lorikeet.kernels.activation import silu_and_mul_reference
from torch import Tensor

from .native_libraries import every_library, two_threads, use_library

__all__ = ["two_threads"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Relative: exp differs in its last bits, the more the larger its argument, so at 16 bit a value may be rounded to its
# neighbour before and after it is multiplied.
TOLERANCES = {FP32: 4e-6, FP16: 2e-3, BF16: 1.6e-2}


def dtypes(*chosen: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", chosen, ids=lambda dtype: str(dtype).removeprefix("torch."))


every_dtype, interpreted_dtype = dtypes(FP32, FP16, BF16), dtypes(FP32, FP16)
# (rows, width, elements between the rows)
SHAPES = [(1, 16, 0), (5, 1536, 0), (3, 77, 5), (2, 1, 0), (0, 64, 0)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    num_rows, width, gap = shape
    x = 6 * torch.randn(num_rows, 2 * width + gap)
    x[:, ::7] *= 30  # where exp overflows and underflows
    return x.to(dtype).to(device)[:, : 2 * width]


def assert_activates(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    before = x.clone()
    got, want = run(x), silu_and_mul_reference(x)
    assert got.is_contiguous() and got.dtype == x.dtype
    assert torch.equal(x, before)
    tolerance = TOLERANCES[x.dtype]
    torch.testing.assert_close(got.cpu(), want.cpu(), atol=tolerance * 1e-2, rtol=tolerance)


class TestCpu:
    @every_library
    @every_dtype
    def test_equals_reference(self, library: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        names = {"_activate": activation._ACTIVATE, "_activate_briefly": activation._ACTIVATE}
        use_library(monkeypatch, library, activation, names)
        for shape in (*SHAPES, (100, 1537, 0)):
            assert_activates(activation.silu_and_mul, make(shape, dtype))

    def test_what_is_not_finite_stays_so(self) -> None:
        x = torch.tensor([torch.nan, torch.inf, -torch.inf, 88.0, -88.0, -1e30, 0.0, -0.0, 1e30]).repeat(2, 3)
        want = torch.nn.functional.silu(x)
        got = activation.silu_and_mul(torch.cat((x, torch.ones_like(x)), dim=1))
        torch.testing.assert_close(got, want, atol=0, rtol=1e-6, equal_nan=True)

    def test_threads_change_nothing(self, two_threads: None) -> None:
        x = make((300, 1536, 0), FP32)
        got = activation.silu_and_mul(x)
        torch.set_num_threads(1)
        assert torch.equal(activation.silu_and_mul(x), got)

    def test_opcheck_and_the_dispatched_call(self) -> None:
        x = make((5, 48, 3), FP32)
        torch.library.opcheck(torch.ops.lorikeet.silu_and_mul.default, (x,))
        assert_activates(torch.ops.lorikeet.silu_and_mul.default, x)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.zeros(4, 7), "gate_up must be \\[num_rows, 2 \\* width\\]"),
            (torch.zeros(8, 4).t(), "with contiguous rows"),
            (torch.zeros(4, 8).long(), "expected float32, bfloat16 or float16"),
        ],
    )
    def test_what_breaks_the_contract_is_refused(self, x: Tensor, message: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.lorikeet.silu_and_mul.default(x)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs natively, in TestGpu")
class TestInterpreted:
    """The Triton kernel in Triton's interpreter, on the CPU. Its casts to bf16 truncate (Triton 3.6 and 3.7)."""

    @every_shape
    @interpreted_dtype
    # NumPy warns where exp overflows, which is how silu comes to 0 there.
    @pytest.mark.filterwarnings("ignore:overflow encountered in exp")
    def test_equals_reference(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        from lorikeet.kernels import activation_triton

        assert_activates(activation_triton.silu_and_mul, make(shape, dtype))


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("shape", [*SHAPES, (64, 14336, 0), (70000, 8, 0), (3, 5000, 0)], ids=str)
    @every_dtype
    def test_equals_reference(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        assert_activates(activation.silu_and_mul, make(shape, dtype, "cuda"))

    def test_opcheck(self) -> None:
        torch.library.opcheck(torch.ops.lorikeet.silu_and_mul.default, (make((5, 48, 3), FP32, "cuda"),))
