"""A forward of our own for Llama-like models: the same modules as transformers', a fraction of the calls.

Each layer is two fused residual adds with norms, four sites, one rotation with cache write, attention and the gated
activation: nine launches and no copy between them, where a Llama layer of transformers' (5.23) makes 36. The sites are
the modules that transformers' forward would call, so LoRA works alike in both; the tests compare the two. On a CPU all
layers are one call, to the same bits (`lean_stack`).

Rounding is transformers' (see `kernels.norm`, `kernels.activation`), except that the rotation rounds less often
(`kernels.rope`). Step thread only. Graph-safe: no step reads a tensor back, and the same calls are made whatever the
tensors hold; what is allocated comes from torch's caching allocator.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.row_overrides import RowOverrides
from ...adapters.sites import Site
from ...kernels import activation, attention, norm, rope
from .attention import PagedStep
from .lean_modules import HeadNorms, LeanLayer, LeanModules
from .lean_stack import LayerLinears, LeanStack, build_stack


class LeanDecoder:
    """See the module.

    Args:
        modules: of the model.
        max_context: positions are below it.
        dtype: of the model's activations.

    Attributes:
        one_by_one: call operators one by one also where all layers can be one call; for comparisons, and to time them.
    """

    def __init__(self, modules: LeanModules, max_context: int, dtype: torch.dtype) -> None:
        self._modules = modules
        self._dtype = dtype
        self._rotations = rope.rotation_table(modules.inverse_frequencies, modules.rotary_scaling, max_context, dtype)
        self._linears: list[LayerLinears] = []
        self._stack: LeanStack | None = None
        self.one_by_one = False
        self._head: nn.Module = nn.Identity()

    def connect(self, site_module: Callable[[Site], nn.Module]) -> None:
        """Look up the modules that run for the sites; again whenever they have been replaced."""
        self._linears = [
            LayerLinears(*map(site_module, (layer.qkv, layer.o, layer.gate_up, layer.down)))
            for layer in self._modules.layers
        ]
        self._stack = build_stack(self._modules, self._linears, self._dtype)
        self._head = site_module(self._modules.head)

    def logits(
        self,
        ids: Tensor,
        positions: Tensor,
        paged: PagedStep,
        rows: Tensor | None = None,
        overrides: RowOverrides | None = None,
    ) -> Tensor:
        """One forward pass.

        Args:
            ids: int64 [T], the flat batch.
            positions: int64 [T], position of each token in its own sequence.
            paged: where the tokens are in the cache.
            rows: int64 [n], the tokens whose logits are wanted; None: all.
            overrides: of this step, where rows have an embedding or norms of their own.

        Returns:
            [n, vocab] in the compute dtype; wider where an adapter of these rows knows more ids.
        """
        return self.head(self.hidden(ids, positions, paged, rows, overrides))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of rows of `hidden`: [n, width] -> [n, vocab]; LoRA must know which rows they are."""
        logits: Tensor = self._head.forward(hidden)
        return logits

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        paged: PagedStep,
        rows: Tensor | None = None,
        overrides: RowOverrides | None = None,
    ) -> Tensor:
        """What the head gets, arguments as of `logits`: [n, width] in the compute dtype."""
        rotations = self._rotations.index_select(0, positions)
        hidden = self._embed(ids, overrides)
        pending = None
        if self._stack is not None and not self.one_by_one:
            pending = self._stack.run(hidden, rotations, paged)
        if pending is None:
            pending = self._run_layers(hidden, rotations, paged, overrides)
        final, eps = self._modules.final_norm, self._modules.eps
        if overrides is None:
            return norm.rms_norm(pending, final.weight, eps, hidden, rows)
        x = norm.add_rms_norm_(hidden, pending, final.weight, eps)
        overrides.normalize_(final.path, hidden, x)
        return x if rows is None else x.index_select(0, rows)

    def _run_layers(
        self, hidden: Tensor, rotations: Tensor, paged: PagedStep, overrides: RowOverrides | None
    ) -> Tensor:
        """Operator by operator: what the last MLP computed, to be added to `hidden`, which is changed."""
        modules = self._modules
        eps, num_heads, head_dim, num_tokens = modules.eps, modules.num_heads, modules.head_dim, len(hidden)
        step = (paged.query_starts, paged.context_lens, paged.block_tables, paged.max_query_len, paged.max_context_len)
        # What the last layer's MLP computed and nobody has added to `hidden` yet.
        pending: Tensor | None = None
        for layer, linears, keys, values in zip(
            modules.layers, self._linears, paged.cache.keys, paged.cache.values, strict=True
        ):
            # `forward` and not a call, which looks for hooks first: nobody hangs any on sites.
            qkv, o, gate_up, down = linears
            if pending is None:
                x = norm.rms_norm(hidden, layer.attention_norm.weight, eps)
            else:
                x = norm.add_rms_norm_(hidden, pending, layer.attention_norm.weight, eps)
            if overrides is not None:
                overrides.normalize_(layer.attention_norm.path, hidden, x)
            heads = qkv.forward(x)
            self._rotate_(layer, heads, rotations, keys, values, paged.kv_slots, overrides)
            # One view where `view` and a slice are two, at 2 us each on a CPU.
            queries = heads.as_strided((num_tokens, num_heads, head_dim), (heads.stride(0), head_dim, 1))
            attended = attention.paged_attention(queries, keys, values, *step, layer.scale, layer.window, 0.0)
            x = norm.add_rms_norm_(hidden, o.forward(attended.flatten(1)), layer.mlp_norm.weight, eps)
            if overrides is not None:
                overrides.normalize_(layer.mlp_norm.path, hidden, x)
            pending = down.forward(activation.silu_and_mul(gate_up.forward(x)))
        assert pending is not None  # there is a layer
        return pending

    def _embed(self, ids: Tensor, overrides: RowOverrides | None) -> Tensor:
        if overrides is None:
            return F.embedding(ids, self._modules.embedding).to(self._dtype)
        hidden = F.embedding(overrides.known_ids(ids), self._modules.embedding).to(self._dtype)
        overrides.embed_(ids, hidden)
        return hidden

    def _rotate_(
        self,
        layer: LeanLayer,
        qkv: Tensor,
        rotations: Tensor,
        keys: Tensor,
        values: Tensor,
        kv_slots: Tensor,
        overrides: RowOverrides | None,
    ) -> None:
        """Norms of heads, where there are any, rotation, and cache write; `qkv` has the queries afterwards."""
        eps, norms = self._modules.eps, layer.head_norms
        stacked = None if norms is None else norms.stacked
        own = [] if norms is None or overrides is None else overrides.rows_of(norms.queries.path, norms.keys.path)
        if not own:
            rope.rope_kv_write_(qkv, rotations, keys, values, kv_slots, stacked, eps)
            return
        assert norms is not None and overrides is not None
        # Rows with norms of their own are normalized here and then rotated without.
        self._normalize_heads_(norms, qkv, own, overrides)
        done = 0
        for rows in [*own, slice(len(qkv), len(qkv))]:
            for part, weights in ((slice(done, rows.start), stacked), (rows, None)):
                if part.start < part.stop:
                    rope.rope_kv_write_(qkv[part], rotations[part], keys, values, kv_slots[part], weights, eps)
            done = rows.stop

    def _normalize_heads_(self, norms: HeadNorms, qkv: Tensor, own: list[slice], overrides: RowOverrides) -> None:
        """Normalize the query and key heads of some rows in place, with their own weights or the base's."""
        num_heads, num_kv_heads = self._modules.num_heads, self._modules.num_kv_heads
        heads = qkv.view(len(qkv), -1, self._modules.head_dim)
        for each, part in ((norms.queries, heads[:, :num_heads]), (norms.keys, heads[:, num_heads:-num_kv_heads])):
            x = part.clone(memory_format=torch.contiguous_format)
            y = norm.rms_norm(x.flatten(0, 1), each.weight, self._modules.eps).view_as(x)
            overrides.normalize_(each.path, x, y)
            for rows in own:
                part[rows] = y[rows]
