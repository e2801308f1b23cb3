"""Fills the regions of a packed adapter's overrides: whole weights, token rows, the LoRA of an embedding.

What a file has on top of a module with weights of its own is merged into those weights, row by row: LoRA or DoRA of
a head, LoRA of an embedding, trained token rows. So there is one override a module, and a head with more rows than
the base's needs no block of another width. Nobody else shares these weights.
"""

from typing import Final

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .dora import dora_gain, scaled_b
from .layout import OverridePlan, RegionPlan
from .modules import ModuleTable
from .tensor_names import Part

# Elements that are merged at once: 16 MiB in float32.
_PIECE: Final = 2**22


def fill_region(
    checkpoint: Checkpoint, override: OverridePlan, region: RegionPlan, modules: ModuleTable, target: Tensor
) -> str:
    """Write one tensor of an override.

    Args:
        checkpoint: the adapter.
        override, region: what to write.
        modules: the base's.
        target: where it goes, of the region's shape, arena dtype.

    Returns:
        The name of the tensor that it comes from, for messages.

    Raises:
        AdapterInvalidError: DoRA divides by a norm of zero.
    """
    tensors, full = checkpoint.tensors, checkpoint.placement.full
    if override.kind == "weight":
        own = full.whole[override.module]
        info = own.weight if region.name == Part.WEIGHT else own.bias
        assert info is not None
        if region.name == Part.WEIGHT:
            _merge(checkpoint, override.module, tensors[info.name], modules, target)
        else:
            target.copy_(tensors[info.name])
        return info.name
    if override.kind == "tokens":
        trained = full.tokens[override.module]
        order = torch.tensor(trained.ids).argsort()
        target.copy_(tensors[trained.rows.name][order])
        return trained.rows.name
    lora = checkpoint.placement.embedding_lora
    assert lora is not None
    if region.name == "a":
        target.copy_(tensors[lora.lora_a.name].t())
        return lora.lora_a.name
    target.copy_(scaled_b(checkpoint, lora).t() * modules.embedding_scale)
    return lora.lora_b.name


def _merge(checkpoint: Checkpoint, module: str, weight: Tensor, modules: ModuleTable, target: Tensor) -> None:
    """Write weight [rows, dim] with everything that the adapter has for it into target."""
    placement = checkpoint.placement
    is_embedding = module == modules.embedding
    lora = placement.embedding_lora if is_embedding else placement.lora.get(module)
    if lora is None:
        target.copy_(weight)
    else:
        scaled, lora_a = scaled_b(checkpoint, lora), checkpoint.tensors[lora.lora_a.name].float()
        left, right = (lora_a.t(), scaled.t()) if is_embedding else (scaled, lora_a)
        step = max(1, _PIECE // weight.shape[1])
        norms = torch.empty(weight.shape[0])
        for start in range(0, weight.shape[0], step):
            piece = slice(start, start + step)
            merged = torch.addmm(weight[piece].float(), left[piece], right)
            norms[piece] = torch.linalg.vector_norm(merged, dim=1)
            target[piece].copy_(merged)
        if lora.magnitude is not None:
            gain = dora_gain(checkpoint, lora, norms)
            for start in range(0, weight.shape[0], step):
                piece = slice(start, start + step)
                merged = torch.addmm(weight[piece].float(), left[piece], right)
                target[piece].copy_(merged * gain[piece, None])
    trained = placement.full.tokens.get(module)
    if trained is not None:
        target[torch.tensor(trained.ids)] = checkpoint.tensors[trained.rows.name].to(target.dtype)
