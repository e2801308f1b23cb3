"""Routes transformers' attention to the paged KV cache.

transformers hands keyword arguments of the model's forward through to the attention function, so the step's paging
arrives as `paged=PagedStep(...)` and no module global carries it. The mask argument is unused: a name without a
registered mask function gets none from transformers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ...kernels import attention as ops
from ...kernels.blank import blank

# The name under which the paged attention is registered with transformers.
ATTENTION = "lorikeet_paged"


class KVCache:
    """One pair of cache tensors a layer: [num_kv_heads, num_blocks, block_size, head_dim]."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_kv_heads, num_blocks, block_size, head_dim)
        self.keys = [blank(shape, dtype, device) for _ in range(num_layers)]
        self.values = [blank(shape, dtype, device) for _ in range(num_layers)]
        self.num_blocks = num_blocks
        self.block_size = block_size


@dataclass(slots=True)
class PagedStep:
    """Where the tokens of one step are, for every layer alike.

    Attributes:
        cache: the KV cache.
        kv_slots: int64 [T], block * block_size + offset of each token; -1 is padding.
        query_starts: int32 [N + 1], rows of each sequence.
        context_lens: int32 [N], tokens of each sequence once this step is written.
        block_tables: int32 [N, max_blocks].
        max_query_len: largest number of rows of one sequence.
        max_context_len: largest context.
    """

    cache: KVCache
    kv_slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_query_len: int
    max_context_len: int


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> ([1, T, Hq, D], None)."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = paged.cache.keys[layer], paged.cache.values[layer]
    ops.kv_write_(key[0].transpose(0, 1), value[0].transpose(0, 1), keys, values, paged.kv_slots)
    out = ops.paged_attention(
        query[0].transpose(0, 1),
        keys,
        values,
        paged.query_starts,
        paged.context_lens,
        paged.block_tables,
        paged.max_query_len,
        paged.max_context_len,
        scaling if scaling is not None else float(query.shape[-1]) ** -0.5,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, paged_attention_forward)
