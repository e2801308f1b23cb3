"""How much an adapter changes a linear: the Frobenius norm of its delta, without ever making the delta.

delta = factor * B @ diag(E) @ A is as large as the weight that it adapts; its norm needs only the Gram matrices of A
and B, which are rank by rank: ||B A||^2 = tr((B^T B)(A A^T)). This is for people (inspection.py). A load does not pay
for it: at rank 64 it takes longer than hashing the file, and packing.py notices a zero delta on its way.
"""

from collections.abc import Mapping

from torch import Tensor

from .tensor_map import LoraTensors


def delta_norm(lora: LoraTensors, tensors: Mapping[str, Tensor]) -> float:
    """The Frobenius norm of factor * B @ A (AdaLoRA: factor * B @ diag(E) @ A), in float64; DoRA's gains left out.

    Args:
        lora: a module's.
        tensors: by name in the file.
    """
    lora_a, lora_b = tensors[lora.lora_a.name].double(), tensors[lora.lora_b.name].double()
    gram_a, gram_b = lora_a @ lora_a.t(), lora_b.t() @ lora_b
    if lora.lora_e is not None:
        values = tensors[lora.lora_e.name].double().flatten()
        gram_b = gram_b * values.unsqueeze(0) * values.unsqueeze(1)
    # Where terms cancel, rounding may leave a tiny negative number.
    square = (gram_a * gram_b).sum().clamp(min=0.0)
    return abs(lora.scaling.factor) * float(square.item() ** 0.5)
