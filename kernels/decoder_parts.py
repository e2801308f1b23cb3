"""What `decoder.DecoderStack` is made of, and what it is given at each step."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .contract import check
from .lora_rows import AdaptedRows
from .lora_site import LoraSite
from .nf4_weight import NF4Weight


class StackLinear(NamedTuple):
    """A linear of a layer, and the adapters of its site.

    Attributes:
        weight: in tiles; of all linears of a stack in the same layout.
        bias: [out_features] in the model's dtype, or None.
        site: its entry in `StackAdapters.is_adapted` and `StackAffines.has`.
        lora: low-rank deltas; None: it has no adapters.
        affines: int64 [max_slots], contiguous, `offsets` of `lora.lora_affine_`; goes with `lora`.
    """

    weight: NF4Weight
    bias: Tensor | None
    site: int
    lora: LoraSite | None
    affines: Tensor | None


class StackLayer(NamedTuple):
    """One layer; tensors in the model's dtype, contiguous.

    Attributes:
        attention_norm, mlp_norm: weights [hidden].
        head_norm: [num_heads + num_kv_heads, head_dim], as `rope.rope_kv_write_` takes it.
        qkv, o, gate_up, down: its linears.
        scale: factor on q . k.
        window: tokens that a query sees; 0: all.
    """

    attention_norm: Tensor
    mlp_norm: Tensor
    head_norm: Tensor | None
    qkv: StackLinear
    o: StackLinear
    gate_up: StackLinear
    down: StackLinear
    scale: float
    window: int

    @property
    def linears(self) -> tuple[StackLinear, ...]:
        """All four."""
        return self.qkv, self.o, self.gate_up, self.down


class StackAffines(NamedTuple):
    """Rows that a pass of adapters scales and shifts.

    Attributes:
        starts: int32 [num_segments + 1], contiguous.
        slots: int32 [num_segments], contiguous.
        has: a byte for each site: whether one of the slots has an affine there.
    """

    starts: Tensor
    slots: Tensor
    has: bytes


class StackAdapters(NamedTuple):
    """What adapters do in a step.

    Attributes:
        rows: that low-rank deltas are added to.
        is_adapted: a byte for each site: whether they are there.
        affines: applied before that, one after the other.
    """

    rows: AdaptedRows
    is_adapted: bytes
    affines: Sequence[StackAffines]


class CacheTables:
    """Where the keys and values of each layer are.

    Args:
        keys, values: a tensor for each layer, all as `rope.rope_kv_write_` takes them, of one shape and dtype; kept.

    Raises:
        RuntimeError: they are not alike.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.keys, self.values = tuple(keys), tuple(values)
        first = self.keys[0]
        alike = all(
            cache.shape == first.shape and cache.dtype == first.dtype and cache.is_contiguous() and cache.is_cpu
            for cache in self.keys + self.values
        )
        check(alike and len(keys) == len(values), lambda: "caches of all layers must be alike, and contiguous")
        self.key_table, self.value_table = (
            (ctypes.c_void_p * len(self.keys))(*(cache.data_ptr() for cache in caches))
            for caches in (self.keys, self.values)
        )


class StackPaging(NamedTuple):
    """Where the rows of a step are in the cache; see `attention.paged_attention` and `rope.rope_kv_write_`."""

    caches: CacheTables
    kv_slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
