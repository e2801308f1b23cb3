"""The lean decoder's layers in one native call, where a CPU has one and a step is of the kinds that it knows.

It knows NF4 linears in the layout of our kernel, low-rank deltas and affines (DoRA, biases). Where rows of a step have
whole tensors of their own in a layer, or another module than ours runs for a site, operators are called one by one.
"""

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...adapters.layers import LoraLinear
from ...adapters.lora_batch import LoraBatch
from ...kernels.attention_cpu import LANES
from ...kernels.decoder import DecoderStack, is_available
from ...kernels.decoder_parts import CacheTables, StackAdapters, StackAffines, StackLayer, StackLinear, StackPaging
from ...kernels.nf4_tiles import Layout
from .attention import KVCache, PagedStep
from .lean_modules import LeanLayer, LeanModules
from .linears import NF4Linear


class LayerLinears(NamedTuple):
    """The modules that run for the sites of one layer."""

    qkv: nn.Module
    o: nn.Module
    gate_up: nn.Module
    down: nn.Module


class LeanStack:
    """All layers of a model.

    Args:
        modules: of the model.
        stack: of the same.
        batch: what adapters do in a step; None: there are none.
    """

    def __init__(self, modules: LeanModules, stack: DecoderStack, batch: LoraBatch | None) -> None:
        self._stack = stack
        self._batch = batch
        self._paths = frozenset(path for layer in modules.layers for path in _paths(layer))
        self._caches: WeakKeyDictionary[KVCache, CacheTables] = WeakKeyDictionary()

    def run(self, hidden: Tensor, rotations: Tensor, paged: PagedStep) -> Tensor | None:
        """Runs the layers for the rows that the batch was prepared for.

        Args:
            hidden: [T, hidden] in the compute dtype. Becomes what the result is to be added to.
            rotations: [T, 3, head_dim / 2], of the rows' positions.
            paged: where the rows are in the cache.

        Returns:
            What the MLP of the last layer came to, as `hidden`; None: rows have tensors of their own in a layer or are
            laid out otherwise, and nothing was done.
        """
        batch, adapters = self._batch, None
        if batch is not None and batch.passes:
            # No rows for a CPU: the step is laid out as one that is captured (on a CPU only where tests repeat it).
            if batch.flat_rows is None or not self._paths.isdisjoint(batch.own.by_module):
                return None
            adapters = _adapters(batch)
        caches = self._caches.get(paged.cache)
        if caches is None:
            caches = self._caches[paged.cache] = CacheTables(paged.cache.keys, paged.cache.values)
        paging = StackPaging(caches, paged.kv_slots, paged.query_starts, paged.context_lens, paged.block_tables)
        return self._stack.run(hidden, rotations, paging, adapters)


def build_stack(modules: LeanModules, linears: Sequence[LayerLinears], dtype: torch.dtype) -> LeanStack | None:
    """The layers of a model, or None where the native call does not know one of the modules, or there is none.

    Args:
        modules: of the model.
        linears: of each layer.
        dtype: of activations.
    """
    if not is_available() or modules.head_dim % LANES:
        return None
    batches: set[LoraBatch | None] = set()
    layers = []
    for layer, each in zip(modules.layers, linears, strict=True):
        sites = (layer.qkv, layer.o, layer.gate_up, layer.down)
        known = [_read_linear(module, site.index, batches) for module, site in zip(each, sites, strict=True)]
        qkv, o, gate_up, down = known
        if qkv is None or o is None or gate_up is None or down is None:
            return None
        head_norm = None if layer.head_norms is None else layer.head_norms.stacked
        norms = (layer.attention_norm.weight, layer.mlp_norm.weight, head_norm)
        layers.append(StackLayer(*norms, qkv, o, gate_up, down, layer.scale, layer.window))
    if len(batches) > 1:
        return None
    heads = {"num_heads": modules.num_heads, "num_kv_heads": modules.num_kv_heads, "head_dim": modules.head_dim}
    return LeanStack(modules, DecoderStack(layers, **heads, eps=modules.eps, dtype=dtype), batches.pop())


def _read_linear(module: nn.Module, site: int, batches: set[LoraBatch | None]) -> StackLinear | None:
    """What runs for a site, whose batch is added; None: not known."""
    base: nn.Module = module
    lora = affines = batch = None
    if type(module) is LoraLinear:
        base, lora, affines, batch = module.base, module.on_cpu, module.affines, module.batch
    if type(base) is not NF4Linear or base.nf4.layout is Layout.CANONICAL:
        return None
    batches.add(batch)
    return StackLinear(base.nf4, base.bias, site, lora, affines)


def _paths(layer: LeanLayer) -> list[str]:
    """Modules of a layer that an adapter may have tensors of its own for."""
    sites = (layer.qkv, layer.o, layer.gate_up, layer.down)
    norms = [layer.attention_norm, layer.mlp_norm]
    if layer.head_norms is not None:
        norms += [layer.head_norms.queries, layer.head_norms.keys]
    return [piece.module for site in sites for piece in site.slices] + [norm.path for norm in norms]


def _adapters(batch: LoraBatch) -> StackAdapters:
    assert batch.flat_rows is not None  # asked before
    affines = []
    for each in batch.passes:
        if each.affines is not None:
            starts, slots, _ = each.flat
            affines.append(StackAffines(starts, slots, bytes(each.affines)))
    return StackAdapters(batch.flat_rows, bytes(batch.is_adapted), affines)
