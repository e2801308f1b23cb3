"""Which saved weights need no memory of their own: copies of the base's, and of one another.

PEFT saves embedding and head beside an adapter whenever it targets one, trained or not; of a tied base, both.
"""

import torch

from .checkpoint import Checkpoint
from .layout import is_base_shaped
from .modules import BaseWeights, ModuleTable
from .weights_file import TensorInfo


def find_copies(checkpoint: Checkpoint, modules: ModuleTable, weights: BaseWeights) -> frozenset[str]:
    """Embedding and head if the weight that the file has of them is just the base's."""
    return frozenset(
        module
        for module, own in checkpoint.placement.full.whole.items()
        if own.may_be_base
        and own.weight is not None
        and is_base_shaped(checkpoint.placement, module, modules)
        and weights.equals(module, "weight", checkpoint.tensors[own.weight.name])
    )


def are_twins(checkpoint: Checkpoint, modules: ModuleTable, dropped: frozenset[str]) -> bool:
    """Whether embedding and head have own weights with the same content, so that one copy does for both."""
    placement = checkpoint.placement
    pair = (modules.embedding, modules.head)
    own = [placement.full.whole[module].weight for module in pair if module in placement.full.whole]
    if dropped.intersection(pair) or len(own) < 2 or own[0] is None or own[1] is None:
        return False
    if placement.embedding_lora is not None or modules.head in placement.lora:
        return False
    trained = [placement.full.tokens.get(module) for module in pair]
    if trained[0] is not None and trained[1] is not None:
        same_rows = trained[0].ids == trained[1].ids and _is_same(checkpoint, trained[0].rows, trained[1].rows)
    else:
        same_rows = trained[0] is trained[1]
    return same_rows and _is_same(checkpoint, own[0], own[1])


def _is_same(checkpoint: Checkpoint, one: TensorInfo, other: TensorInfo) -> bool:
    return one == other or torch.equal(checkpoint.tensors[one.name], checkpoint.tensors[other.name])
