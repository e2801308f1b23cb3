"""The one place where the rank and the scaling of an adapted module are computed. Imports no torch.

Source: peft 0.21.0, `tuners/lora/layer.py::update_layer`, `tuners/lora/model.py::_create_and_replace` and
`tuners/adalora/layer.py`. A test forbids a second formula elsewhere in the package.
"""

import math
from typing import NamedTuple

from .config import AdapterConfig, Method

# AdaLoRA divides by the rank number plus this, against a rank of zero.
_ADALORA_EPSILON = 1e-5


class Scaling(NamedTuple):
    """What a module's tensors must look like, and what its delta is multiplied by.

    Attributes:
        rank: rows of lora_A; AdaLoRA's allocator may have kept none.
        factor: delta = factor * B @ A (AdaLoRA: factor * B @ diag(E) @ A).
    """

    rank: int
    factor: float


def resolve_scaling(config: AdapterConfig, module: str) -> Scaling:
    """Rank and scaling of one module.

    LoRA: alpha / r, rsLoRA: alpha / sqrt(r), with r and alpha from the patterns where one matches.
    AdaLoRA: alpha / (ranknum + 1e-5). `ranknum` stays the *initial* rank when the allocator drops ranks (PEFT copies it
    back after shrinking a module), and an alpha of zero or less means the module's own rank.

    Args:
        config: the adapter's.
        module: full path in the base, such as `model.layers.0.self_attn.q_proj`.
    """
    if config.method is Method.ADALORA:
        kept = config.kept_ranks.get(module, config.rank)
        alpha = config.alpha if config.alpha > 0 else float(kept)
        return Scaling(kept, alpha / (config.rank + _ADALORA_EPSILON))
    rank = int(config.ranks.get(module, config.rank))
    alpha = config.alphas.get(module, config.alpha)
    return Scaling(rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))
