"""RMS norm of rows, alone or with the residual add in front of it: `lorikeet::rms_norm` and `lorikeet::add_rms_norm_`.

    norm(x) = round(x / sqrt(mean(x^2) + eps)) * weight

computed in fp32; `round` is to the dtype of x, and so is the product with the weight, and a sum with the residual is
rounded before it is normalized. These are the rounding points of transformers' Llama, Mistral, Qwen2 and Qwen3 (5.23,
`LlamaRMSNorm`), so that only the order of the additions in the mean differs.

This file owns schemas, contract, the CPU implementation (C++, or plain torch where there is no library) and the
reference; CUDA's is in `norm_triton`. Called on the step thread, twice a layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .contract import refuse
from .native.functions import ADDRESS, COUNT, NUMBER, REAL, TYPE_NUMBERS, function

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_NORM = (
    "lorikeet_rms_norm",
    NUMBER,
    *(ADDRESS, COUNT),
    *(ADDRESS, COUNT, NUMBER),
    *(ADDRESS, ADDRESS, ADDRESS),
    *(COUNT, COUNT, REAL, NUMBER),
)
_norm = function(*_NORM)
_norm_briefly = function(*_NORM, brief=True)
# Elements up to which a call takes some 100 us at most.
_BRIEF = 1 << 16

torch.library.define(
    "lorikeet::rms_norm", "(Tensor x, Tensor weight, float eps, Tensor? residual=None, Tensor? rows=None) -> Tensor"
)
torch.library.define("lorikeet::add_rms_norm_", "(Tensor(a!) residual, Tensor x, Tensor weight, float eps) -> Tensor")


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """Computes norm(x) or norm(x + residual), of all rows or of some.

    Args:
        x: [num_rows, width], float32, bfloat16 or float16, rows contiguous.
        weight: [width], dtype of `x`, contiguous.
        eps: added to the mean of the squares.
        residual: as `x`; left as it is.
        rows: int64 [n], the rows whose norm is wanted, each below num_rows; None: all.

    Returns:
        [n or num_rows, width], dtype of `x`, contiguous.

    Raises:
        RuntimeError: a shape, dtype or layout is not as above.
    """
    # On a CPU the dispatcher would take longer than the norm of a few rows.
    if x.is_cpu and not torch.compiler.is_compiling():
        return _rms_norm_cpu(x, weight, eps, residual, rows)
    return torch.ops.lorikeet.rms_norm.default(x, weight, eps, residual, rows)


def add_rms_norm_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to the residual in place and computes the norm of the sum.

    Args:
        residual: [num_rows, width], float32, bfloat16 or float16, rows contiguous. Mutated.
        x: as `residual`.
        weight: [width], dtype of `residual`, contiguous.
        eps: added to the mean of the squares.

    Returns:
        [num_rows, width], dtype of `residual`, contiguous.

    Raises:
        RuntimeError: a shape, dtype or layout is not as above.
    """
    if x.is_cpu and not torch.compiler.is_compiling():
        return _add_rms_norm_cpu_(residual, x, weight, eps)
    return torch.ops.lorikeet.add_rms_norm_.default(residual, x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """norm(x) over the last dimension as transformers writes it; the oracle of the tests."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None, rows: Tensor | None) -> None:
    # On a CPU this runs at every call of a few microseconds, as in `attention`.
    dtype, shape = x.dtype, x.shape
    if dtype not in _FLOATS:
        refuse(f"expected float32, bfloat16 or float16, got {dtype}")
    if len(shape) != 2 or x.stride(1) != 1:
        refuse(f"x must be {dtype} {list(shape)} with contiguous rows, got strides {list(x.stride())}")
    if residual is not None and (residual.shape != shape or residual.dtype != dtype or residual.stride(1) != 1):
        refuse(
            f"residual must be {dtype} {list(shape)} with contiguous rows,"
            f" got {residual.dtype} {list(residual.shape)}, strides {list(residual.stride())}"
        )
    if weight.dtype != dtype or weight.shape != (shape[1],) or not weight.is_contiguous():
        refuse(f"weight must be {dtype} {[shape[1]]}, contiguous, got {weight.dtype} {list(weight.shape)}")
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1 or not rows.is_contiguous()):
        refuse(f"rows must be int64 [n], contiguous, got {rows.dtype} {list(rows.shape)}")


def _norm_rows(
    norm: Callable[..., None],
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    rows: Tensor | None,
    in_place: bool,
) -> Tensor:
    num_rows, width = x.shape
    if rows is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)  # takes a third of what new_empty does
    else:
        num_rows = rows.shape[0]
        out = x.new_empty((num_rows, width))
    norm(
        TYPE_NUMBERS[x.dtype],
        x.data_ptr(),
        x.stride(0),
        None if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        in_place,
        None if rows is None else rows.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        num_rows,
        width,
        eps,
        torch.get_num_threads(),
    )
    return out


def _rms_norm_cpu(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    _check(x, weight, residual, rows)
    norm = _norm_briefly if x.numel() <= _BRIEF else _norm
    if norm is not None:
        return _norm_rows(norm, x, weight, eps, residual, rows, in_place=False)
    if rows is not None:
        x = x.index_select(0, rows)
        residual = None if residual is None else residual.index_select(0, rows)
    return rms_norm_reference(x if residual is None else x + residual, weight, eps)


def _rms_norm_cuda(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    from . import norm_triton  # CPU-only installs have no Triton

    _check(x, weight, residual, rows)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments are on
        return norm_triton.rms_norm(x, weight, eps, residual, rows)


def _rms_norm_fake(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    _check(x, weight, residual, rows)
    return x.new_empty(x.shape if rows is None else (rows.shape[0], x.shape[1]))


def _add_rms_norm_cpu_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, weight, residual, None)
    norm = _norm_briefly if x.numel() <= _BRIEF else _norm
    if norm is not None:
        return _norm_rows(norm, x, weight, eps, residual, None, in_place=True)
    return rms_norm_reference(residual.add_(x), weight, eps)


def _add_rms_norm_cuda_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from . import norm_triton

    _check(x, weight, residual, None)
    with torch.cuda.device_of(x):
        return norm_triton.add_rms_norm_(residual, x, weight, eps)


def _add_rms_norm_fake_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, weight, residual, None)
    return x.new_empty(x.shape)


torch.library.impl("lorikeet::rms_norm", "CPU", _rms_norm_cpu)
torch.library.impl("lorikeet::rms_norm", "CUDA", _rms_norm_cuda)
torch.library.register_fake("lorikeet::rms_norm", _rms_norm_fake)
torch.library.impl("lorikeet::add_rms_norm_", "CPU", _add_rms_norm_cpu_)
torch.library.impl("lorikeet::add_rms_norm_", "CUDA", _add_rms_norm_cuda_)
torch.library.register_fake("lorikeet::add_rms_norm_", _add_rms_norm_fake_)
