"""The gated activation of an MLP: the operator `lorikeet::silu_and_mul`.

    out = round(silu(gate)) * up,  silu(x) = x / (1 + exp(-x))

silu is computed in fp32 and rounded to the dtype before it is multiplied, as transformers does (5.23, `LlamaMLP`).

This file owns schema, contract, the CPU implementation (C++, or plain torch where there is no library) and the
reference; CUDA's is in `activation_triton`. Called on the step thread, once a layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import refuse
from .native.functions import ADDRESS, COUNT, NUMBER, TYPE_NUMBERS, function

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_ACTIVATE = ("lorikeet_silu_and_mul", NUMBER, ADDRESS, COUNT, ADDRESS, COUNT, COUNT, NUMBER)
_activate = function(*_ACTIVATE)
_activate_briefly = function(*_ACTIVATE, brief=True)
# Elements up to which a call takes some 100 us at most.
_BRIEF = 1 << 17

torch.library.define("lorikeet::silu_and_mul", "(Tensor gate_up) -> Tensor")


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Computes silu(gate) * up from the output of the stacked gate and up projections.

    Args:
        gate_up: [num_rows, 2 * width], float32, bfloat16 or float16, rows contiguous; gate is the first half.

    Returns:
        [num_rows, width], dtype of `gate_up`, contiguous.

    Raises:
        RuntimeError: a shape, dtype or layout is not as above.
    """
    # On a CPU the dispatcher is left out, as in `norm.rms_norm`.
    if gate_up.is_cpu and not torch.compiler.is_compiling():
        return _silu_and_mul_cpu(gate_up)
    return torch.ops.lorikeet.silu_and_mul.default(gate_up)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """The same as transformers writes it; the oracle of the tests."""
    gate, up = gate_up.split(gate_up.shape[1] // 2, dim=1)
    wide = gate.float()
    return (wide / (1 + torch.exp(-wide))).to(gate.dtype) * up


def _check(gate_up: Tensor) -> None:
    if gate_up.dtype not in _FLOATS:
        refuse(f"expected float32, bfloat16 or float16, got {gate_up.dtype}")
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 != 0 or gate_up.stride(1) != 1:
        refuse(
            f"gate_up must be [num_rows, 2 * width] with contiguous rows,"
            f" got {list(gate_up.shape)}, strides {list(gate_up.stride())}"
        )


def _silu_and_mul_cpu(gate_up: Tensor) -> Tensor:
    _check(gate_up)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    activate = _activate_briefly if num_rows * width <= _BRIEF else _activate
    if activate is None:
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate).mul_(up)
    out = gate_up.new_empty((num_rows, width))
    activate(
        TYPE_NUMBERS[gate_up.dtype],
        gate_up.data_ptr(),
        gate_up.stride(0),
        out.data_ptr(),
        num_rows,
        width,
        torch.get_num_threads(),
    )
    return out


def _silu_and_mul_cuda(gate_up: Tensor) -> Tensor:
    from . import activation_triton  # CPU-only installs have no Triton

    _check(gate_up)
    with torch.cuda.device_of(gate_up):  # Triton launches on the current device, whatever its arguments are on
        return activation_triton.silu_and_mul(gate_up)


def _silu_and_mul_fake(gate_up: Tensor) -> Tensor:
    _check(gate_up)
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


torch.library.impl("lorikeet::silu_and_mul", "CPU", _silu_and_mul_cpu)
torch.library.impl("lorikeet::silu_and_mul", "CUDA", _silu_and_mul_cuda)
torch.library.register_fake("lorikeet::silu_and_mul", _silu_and_mul_fake)
