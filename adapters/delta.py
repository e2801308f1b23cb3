"""How much an adapter changes a linear: the Frobenius norm of its delta, without ever making the delta.

delta = factor * B @ diag(E) @ A is as large as the weight that it adapts; its norm needs only the Gram matrices of A
and B, which are rank by rank: ||B A||^2 = tr((B^T B)(A A^T)). This is for people (inspection.py). A load does not pay
for it: at rank 64 it takes longer than hashing the file, and packing.py notices a zero delta on its way.
"""

from .checkpoint import AdaptedModule


def delta_norm(module: AdaptedModule) -> float:
    """The Frobenius norm of factor * B @ A (AdaLoRA: factor * B @ diag(E) @ A), in float64."""
    lora_a, lora_b = module.lora_a.double(), module.lora_b.double()
    gram_a, gram_b = lora_a @ lora_a.t(), lora_b.t() @ lora_b
    if module.lora_e is not None:
        values = module.lora_e.double().flatten()
        gram_b = gram_b * values.unsqueeze(0) * values.unsqueeze(1)
    # Where terms cancel, rounding may leave a tiny negative number.
    square = (gram_a * gram_b).sum().clamp(min=0.0)
    return abs(module.scaling.factor) * float(square.item() ** 0.5)
