"""A loaded base model: its forward pass, and how LoRA and paged attention get into it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ...adapters.fingerprint import BaseFingerprint
from ...adapters.modules import BaseWeights, ModuleTable
from ...adapters.row_overrides import RowOverrides
from ...adapters.sites import Site, SiteTable
from .attention import KVCache, PagedStep
from .lean_decoder import LeanDecoder
from .lean_modules import read_lean_modules
from .linears import NF4Linear, StackedLinear


@dataclass(slots=True)
class BaseModel:
    """The resident base.

    Attributes:
        model: transformers' causal LM with its decoder linears in NF4.
        tokenizer: a fast tokenizer.
        config: the model's config.
        architecture: e.g. LlamaForCausalLM.
        site_table: every adaptable linear; the last one is the output head.
        module_table: what it has beside them: embedding and norms.
        weights: its own weights, for adapters that must be compared or computed with them.
        device: where it lives.
        compute_dtype: dtype of activations, embeddings, norms and lm_head; of a CPU's vocabulary see `vocabulary`.
        max_context: tokens.
        eos_token_ids: ids that end a request unless it ignores them.
        fingerprint: how adapters may know it: name and hash.
        lean: a faster forward than transformers', of the same modules; None: this model has none.
    """

    model: nn.Module
    tokenizer: Any
    config: PretrainedConfig
    architecture: str
    site_table: SiteTable
    module_table: ModuleTable
    weights: BaseWeights
    device: torch.device
    compute_dtype: torch.dtype
    max_context: int
    eos_token_ids: frozenset[int]
    fingerprint: BaseFingerprint
    lean: LeanDecoder | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        modules = read_lean_modules(self.model, self.site_table)
        if modules is not None:
            self.lean = LeanDecoder(modules, self.max_context, self.compute_dtype)
            self.lean.connect(self.site_module)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: token ids are below it."""
        return int(self.config.vocab_size)

    @property
    def num_layers(self) -> int:
        """Decoder layers, each with its own KV cache."""
        return int(self.config.num_hidden_layers)

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads a layer."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        explicit = getattr(self.config, "head_dim", None)
        return int(explicit or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def nf4_bytes(self) -> int:
        """Resident bytes of the NF4 linears, constants included."""
        return sum(m.nf4.nbytes for m in self.model.modules() if isinstance(m, NF4Linear))

    @property
    def dense_bytes(self) -> int:
        """Resident bytes of what stays 16-bit (tied weights once)."""
        return sum({p.data_ptr(): p.nbytes for p in self.model.parameters()}.values())

    @property
    def dense_elements(self) -> int:
        """Numbers that are not in NF4 (tied weights once)."""
        return sum({p.data_ptr(): p.numel() for p in self.model.parameters()}.values())

    def site_module(self, site: Site) -> nn.Module:
        """The linear that runs for a site."""
        parent, _, leaf = site.name.rpartition(".")
        module = getattr(self.model.get_submodule(parent), leaf)
        inner: nn.Module = module.linear if isinstance(module, StackedLinear) else module
        return inner

    def wrap_sites(self, wrap: Callable[[nn.Module, Site], nn.Module]) -> None:
        """Replace the linear of every site by `wrap(linear, site)`; this is how LoRA layers get in."""
        for site in self.site_table.sites:
            parent, _, leaf = site.name.rpartition(".")
            module = self.model.get_submodule(parent)
            current = getattr(module, leaf)
            if isinstance(current, StackedLinear):
                current.linear = wrap(current.linear, site)
            else:
                setattr(module, leaf, wrap(current, site))
        if self.lean is not None:
            self.lean.connect(self.site_module)

    def kv_block_bytes(self, block_size: int) -> int:
        """Bytes of one block of `block_size` tokens over all layers, keys and values."""
        size = torch.empty((), dtype=self.compute_dtype).element_size()
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * block_size * size

    def new_kv_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """A zeroed paged KV cache of this model's shape on its device."""
        return KVCache(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=self.compute_dtype,
            device=self.device,
        )

    @property
    def config_of_model(self) -> PretrainedConfig:
        """The config object that the model's own modules read."""
        config: PretrainedConfig = self.model.config  # type: ignore[assignment]
        return config

    def logits(
        self,
        ids: Tensor,
        positions: Tensor,
        *,
        rows: Tensor | None = None,
        paged: PagedStep | None = None,
        overrides: RowOverrides | None = None,
    ) -> Tensor:
        """One forward pass: the lean one where the model has one, otherwise transformers'.

        Args:
            ids: int64 [1, T], the flat batch.
            positions: int64 [1, T], position of each token in its own sequence.
            rows: int64 [n], the tokens whose logits are wanted; None: all.
            paged: where the tokens are in the paged cache; None: one sequence, and attention as the config says.
            overrides: of this step, where rows have an embedding or norms of their own.

        Returns:
            float32 [n, vocab]; wider where an adapter of these rows knows more ids.
        """
        if self.lean is not None and paged is not None:
            return self.lean.logits(ids[0], positions[0], paged, rows, overrides).float()
        keep: Any = 0 if rows is None else rows
        attention = {} if paged is None else {"paged": paged}
        with nullcontext() if overrides is None else overrides.applied(ids[0]):
            out = self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep, **attention)
        logits: Tensor = out.logits
        return logits[0].float()

    def logits_in_pieces(
        self,
        ids: Tensor,
        positions: Tensor,
        pieces: Sequence[Tensor],
        *,
        paged: PagedStep,
        overrides: RowOverrides | None = None,
    ) -> Iterator[Tensor]:
        """One forward pass whose logits come piece by piece, so that those of many rows never exist at a time.

        Each piece is computed when it is asked for: LoRA must know the rows of the first one before this is called,
        and those of another before that is asked for.

        Args:
            ids, positions, paged, overrides: as of `logits`.
            pieces: int64 [n] each, at least one: tokens whose logits are wanted.

        Yields:
            float32 [n, vocab] of each piece, as `logits` gives it.
        """
        if self.lean is not None:
            hidden = self.lean.hidden(ids[0], positions[0], paged, torch.cat(list(pieces)), overrides)
            for rows in hidden.split([len(piece) for piece in pieces]):
                yield self.lean.head(rows).float()
            return
        decoder: Any = self.model.base_model
        computed: list[Any] = []
        handle = decoder.register_forward_hook(lambda module, args, output: computed.append(output))
        try:
            first = self.logits(ids, positions, rows=pieces[0], paged=paged, overrides=overrides)
        finally:
            handle.remove()
        yield first
        # What comes after the decoder is the family's own (a head, and with some more), so its code runs again, on what
        # the decoder has computed.
        for piece in pieces[1:]:
            decoder.forward = lambda *args, **kwargs: computed[0]
            try:
                logits = self.logits(ids, positions, rows=piece, paged=paged)
            finally:
                del decoder.forward
            yield logits
