"""Writes a merged model's tensors: linears rounded to 16 bit or quantized to NF4, the rest in the 16-bit type."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ...kernels.bnb import functional as bnb
from ...kernels.nf4_quantize import nest_absmax, quantize_blocks
from ...kernels.nf4_weight import BLOCK, GROUP
from .merged import MergedModel, Parameter
from .targets import Target
from .writer import SHARD_BYTES, ShardWriter

# What bitsandbytes saves beside the codes of a weight (0.50.2, `QuantState.as_dict(packed=True)`).
_STATE: Final = ("absmax", "nested_absmax", "nested_quant_map", "quant_map", "quant_state.bitsandbytes__nf4")
# Bytes of an NF4 weight for each element, constants included, and room for what each weight has once.
_NF4_BYTES: Final = 0.5 + 1 / BLOCK + 4 / (BLOCK * GROUP)
_NF4_ONCE: Final = 2048


def estimate_bytes(parameters: Iterable[Parameter], to: Target) -> int:
    """About how large the weights' files will be."""
    dtype = dense_dtype(to)
    size = 0.0
    for parameter in parameters:
        count = math.prod(parameter.shape)
        is_nf4 = to is Target.NF4 and _is_quantized(parameter)
        size += count * _NF4_BYTES + _NF4_ONCE if is_nf4 else count * dtype.itemsize
    return int(size)


def dense_dtype(to: Target) -> torch.dtype:
    """The type of what is not quantized."""
    return torch.float32 if to is Target.FP32 else torch.bfloat16


def write_weights(
    model: MergedModel,
    parameters: list[Parameter],
    directory: Path,
    to: Target,
    progress: Callable[[int], None],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write every tensor once.

    Args:
        model: where the values come from.
        parameters: its own.
        directory: where the files go; exists.
        to: BF16, FP32 or NF4.
        progress: called with the number of elements since the last call.
        shard_bytes: of one file, at most.

    Returns:
        Bytes of all tensors.

    Raises:
        OSError: the disk is full, or failed.
    """
    dtype = dense_dtype(to)
    names = [name for parameter in parameters for name in _names(parameter, to)]

    def rounded(parameter: Parameter) -> Iterator[Tensor]:
        for values in model.read(parameter):
            yield values.to(dtype)
            progress(values.numel())

    with ShardWriter(directory, names, shard_bytes=shard_bytes) as writer:
        for parameter in parameters:
            if to is Target.NF4 and _is_quantized(parameter):
                _write_nf4(writer, model, parameter, progress)
            else:
                writer.write(parameter.name, parameter.shape, dtype, rounded(parameter))
        writer.finish()
        return writer.total_bytes


def _is_quantized(parameter: Parameter) -> bool:
    return parameter.is_linear and parameter.is_weight


def _names(parameter: Parameter, to: Target) -> list[str]:
    states = _STATE if to is Target.NF4 and _is_quantized(parameter) else ()
    return [parameter.name, *(f"{parameter.name}.{state}" for state in states)]


def _write_nf4(writer: ShardWriter, model: MergedModel, parameter: Parameter, progress: Callable[[int], None]) -> None:
    """One weight as bitsandbytes saves it: quantized from float32, with double quantization.

    The second level needs the constants of the whole weight, a 64th of it; the weight itself goes by in pieces.
    """
    largest: list[Tensor] = []

    def codes() -> Iterator[Tensor]:
        left = torch.empty(0)  # a block may begin in one piece and end in the next
        for values in model.read(parameter):
            flat = torch.cat([left, values.reshape(-1)]) if left.numel() else values.reshape(-1)
            whole = flat.numel() // BLOCK * BLOCK
            left = flat[whole:].clone()
            if whole:
                packed, absmax = quantize_blocks(flat[:whole])
                largest.append(absmax)
                yield packed
            progress(values.numel())

    size = math.prod(parameter.shape) // 2
    writer.write(parameter.name, (size, 1), torch.uint8, codes())
    absmax = nest_absmax(torch.cat(largest))
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": "bfloat16",
        "shape": list(parameter.shape),
        "nested_blocksize": GROUP,
        "nested_dtype": "float32",
        "nested_offset": absmax.offsets[0].item(),
    }
    tensors = {
        ".absmax": absmax.codes,
        ".quant_map": bnb.get_4bit_type("nf4", device="cpu"),
        ".nested_absmax": absmax.scales,
        ".nested_quant_map": absmax.code_map,
        ".quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8),
    }
    for suffix, tensor in tensors.items():
        writer.write(f"{parameter.name}{suffix}", tuple(tensor.shape), tensor.dtype, [tensor])
