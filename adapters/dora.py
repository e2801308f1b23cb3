"""What an adapter does to the output of a linear beside adding a low-rank delta: y := y * gain + offset.

Sources: peft 0.21.0, `tuners/lora/dora.py` and `tuners/lora/layer.py::Linear.forward`. The base gives y = W x + b.

- DoRA: g (W x + s B A x) + b with g = m / ||W + s B A||, row by row. So the gain is g, the offset b (1 - g), and the
  delta that is added has g in its B, too.
- A trained bias b': offset b' - g b. lora_bias: s times the bias of lora_B is added.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import AdapterIncompatibleError, AdapterInvalidError
from .modules import BaseWeights
from .tensor_map import LoraTensors
from .tensor_names import refuse

# A gain that is nearer to 1 everywhere is what saving magnitudes in 16 bit makes of an untrained one.
_UNTRAINED: Final = 2.0**-7


class Affine(NamedTuple):
    """One slice's; float32 [out_features] each."""

    gain: Tensor
    offset: Tensor

    @property
    def is_idle(self) -> bool:
        """Whether it changes nothing, as that of an adapter that was saved before training."""
        return bool(((self.gain - 1).abs() < _UNTRAINED).all()) and not bool(self.offset.any())


def slice_affine(checkpoint: Checkpoint, module: str, weights: BaseWeights, *, is_adapted: bool) -> Affine | None:
    """The affine of a slice of a site; None if it has none.

    Args:
        checkpoint: the adapter.
        module: path of the slice.
        weights: the base's.
        is_adapted: its low-rank tensors are applied beside the base's weight.

    Raises:
        AdapterIncompatibleError: a bias for a linear that has none.
        AdapterInvalidError: DoRA divides by a norm of zero.
    """
    lora = checkpoint.placement.lora.get(module) if is_adapted else None
    new_bias = checkpoint.placement.full.biases.get(module)
    has_magnitude, has_lora_bias = lora is not None and lora.magnitude is not None, lora is not None and lora.b_bias
    if not (has_magnitude or has_lora_bias or new_bias is not None):
        return None
    bias = weights.bias(module)
    if new_bias is not None and bias is None:
        raise refuse(new_bias.name, f"the base's {module} has no bias")
    gain = None
    if lora is not None and lora.magnitude is not None:
        lora_a, lora_b = checkpoint.tensors[lora.lora_a.name].float(), scaled_b(checkpoint, lora)
        gain = dora_gain(checkpoint, lora, weights.column_norms(module, lora_a, lora_b))
    some = next(tensor for tensor in (gain, bias, _b_bias(checkpoint, lora)) if tensor is not None)
    gain = torch.ones_like(some) if gain is None else gain
    offset = torch.zeros_like(gain)
    if bias is not None:
        offset += (bias if new_bias is None else checkpoint.tensors[new_bias.name].float()) - gain * bias
    added = _b_bias(checkpoint, lora)
    if added is not None:
        offset += added
    return Affine(gain, offset)


def dora_gain(checkpoint: Checkpoint, lora: LoraTensors, norms: Tensor) -> Tensor:
    """The magnitude divided by the norms: float32 [out_features].

    Raises:
        AdapterInvalidError: a norm is zero; names the tensor.
        AdapterIncompatibleError: a gain is too large.
    """
    assert lora.magnitude is not None
    name = lora.magnitude.name
    if not bool((norms > 0).all()):
        row = int((norms > 0).logical_not().nonzero()[0])
        raise AdapterInvalidError(
            f"Tensor {name!r}: the adapted weight of {lora.module} has a norm of zero in row {row}, which DoRA divides "
            "by.",
            {"tensor": name[:256]},
        )
    gain = checkpoint.tensors[name].float() / norms
    if not bool(torch.isfinite(gain).all()):
        raise AdapterIncompatibleError(
            f"Tensor {name!r} divided by the norms of the adapted weight has values that are too large.",
            {"tensor": name[:256]},
        )
    return gain


def scaled_b(checkpoint: Checkpoint, lora: LoraTensors) -> Tensor:
    """B with its scaling (AdaLoRA: and singular values): float32 [out_features, rank]."""
    scaled = checkpoint.tensors[lora.lora_b.name].to(torch.float32) * lora.scaling.factor
    return scaled if lora.lora_e is None else scaled * checkpoint.tensors[lora.lora_e.name].to(torch.float32).t()


def _b_bias(checkpoint: Checkpoint, lora: LoraTensors | None) -> Tensor | None:
    """lora_bias with its scaling: float32 [out_features], or None."""
    if lora is None or lora.b_bias is None:
        return None
    return checkpoint.tensors[lora.b_bias.name].float() * lora.scaling.factor
