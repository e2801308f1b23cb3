"""What the lean decoder knows of a transformers model: which models it computes exactly, and where their tensors are.

Nothing is guessed. A model is taken when each of its modules is of a class whose forward is known and its configuration
holds no value that such a forward would read otherwise; everything else runs transformers' own forward. Read against
transformers 5.17 and 5.23: `modeling_llama.py`, `modeling_mistral.py`, `modeling_qwen2.py`, `modeling_qwen3.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ...adapters.sites import Site, SiteTable

# Architecture -> the name that its modules' classes begin with.
_FAMILIES: Final[Mapping[str, str]] = {
    "LlamaForCausalLM": "Llama",
    "MistralForCausalLM": "Mistral",
    "Qwen2ForCausalLM": "Qwen2",
    "Qwen3ForCausalLM": "Qwen3",
}
# Frequencies that do not depend on the step; all that sets the types apart is in the module's buffers.
_STATIC_ROPE: Final = frozenset(("default", "linear", "llama3", "yarn"))
# Both are x * sigmoid(x).
_SILU: Final = frozenset(("SiLU", "SiLUActivation"))


class LeanNorm(NamedTuple):
    """An RMS norm: the path of its module, and its weight."""

    path: str
    weight: Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """The norms of query and key heads.

    Attributes:
        queries, keys: weights [head_dim].
        stacked: [num_heads + num_kv_heads, head_dim], the weight of each head.
    """

    queries: LeanNorm
    keys: LeanNorm
    stacked: Tensor


@dataclass(frozen=True, slots=True)
class LeanLayer:
    """One decoder layer.

    Attributes:
        attention_norm, mlp_norm: before attention and MLP; weights [hidden].
        qkv, o, gate_up, down: its sites.
        head_norms: None: the family has none.
        scale: factor on q . k.
        window: tokens that a query sees; 0: all.
    """

    attention_norm: LeanNorm
    mlp_norm: LeanNorm
    qkv: Site
    o: Site
    gate_up: Site
    down: Site
    head_norms: HeadNorms | None
    scale: float
    window: int


@dataclass(frozen=True, slots=True)
class LeanModules:
    """A model that the lean decoder can compute.

    Attributes:
        layers: in order.
        head: site of the output head.
        embedding: [vocab, hidden].
        final_norm: before the head; weight [hidden].
        eps: of every norm.
        num_heads, num_kv_heads, head_dim: of every layer.
        inverse_frequencies: float32 [head_dim / 2], of the rotary embedding.
        rotary_scaling: factor on its cos and sin.
    """

    layers: tuple[LeanLayer, ...]
    head: Site
    embedding: Tensor
    final_norm: LeanNorm
    eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inverse_frequencies: Tensor
    rotary_scaling: float


def read_lean_modules(model: nn.Module, sites: SiteTable) -> LeanModules | None:
    """The parts of a model, or None if its forward is not known exactly.

    Args:
        model: transformers' causal LM with its linears replaced by sites.
        sites: the model's.
    """
    tree: Any = model
    config: PretrainedConfig = tree.config
    family = _FAMILIES.get(type(model).__name__)
    if family is None or not type(model).__module__.startswith("transformers.models."):
        return None
    if not (_knows_config(config) and _knows_frame(tree.model, family, config)):
        return None
    by_name = {site.name: site for site in sites.sites}
    layers = []
    for index, block in enumerate(tree.model.layers):
        layer = _read_layer(block, family, f"model.layers.{index}", by_name, config)
        if layer is None:
            return None
        layers.append(layer)
    rotary = tree.model.rotary_emb
    return LeanModules(
        layers=tuple(layers),
        head=sites.sites[-1],
        embedding=tree.model.embed_tokens.weight.detach(),
        final_norm=_norm("model.norm", tree.model.norm),
        eps=float(config.rms_norm_eps),
        num_heads=int(config.num_attention_heads),
        num_kv_heads=int(config.num_key_value_heads),
        head_dim=int(tree.model.layers[0].self_attn.head_dim),
        inverse_frequencies=rotary.inv_freq,
        rotary_scaling=float(rotary.attention_scaling),
    )


def _knows_config(config: PretrainedConfig) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    return config.hidden_act == "silu" and rope.get("rope_type") in _STATIC_ROPE


def _knows_frame(inner: Any, family: str, config: PretrainedConfig) -> bool:
    """What is around the layers: embedding, rotary frequencies of a whole head, last norm."""
    embedding, rotary = inner.embed_tokens, inner.rotary_emb
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        type(embedding) is nn.Embedding
        and embedding.max_norm is None
        and type(rotary).__name__ == f"{family}RotaryEmbedding"
        and rotary.rope_type in _STATIC_ROPE
        and rotary.inv_freq.dtype == torch.float32
        and tuple(rotary.inv_freq.shape) == (head_dim // 2,)
        and _is_norm(inner.norm, family, config.hidden_size, config)
        and len(inner.layers) == config.num_hidden_layers > 0
    )


def _read_layer(
    block: Any, family: str, path: str, by_name: Mapping[str, Site], config: PretrainedConfig
) -> LeanLayer | None:
    if type(block).__name__ != f"{family}DecoderLayer":
        return None
    attention, mlp = block.self_attn, block.mlp
    if not (
        type(attention).__name__ == f"{family}Attention"
        and type(mlp).__name__ == f"{family}MLP"
        and type(mlp.act_fn).__name__ in _SILU
        and _is_norm(block.input_layernorm, family, config.hidden_size, config)
        and _is_norm(block.post_attention_layernorm, family, config.hidden_size, config)
    ):
        return None
    sites = []
    for name, shape in _site_shapes(attention.head_dim, config).items():
        site = by_name.get(f"{path}.{name}")
        if site is None or (site.in_features, [piece.out_features for piece in site.slices]) != shape:
            return None
        sites.append(site)
    qkv, o, gate_up, down = sites
    head_norms = None
    if family == "Qwen3":
        if not all(_is_norm(norm, family, attention.head_dim, config) for norm in (attention.q_norm, attention.k_norm)):
            return None
        queries = _norm(f"{path}.self_attn.q_norm", attention.q_norm)
        keys = _norm(f"{path}.self_attn.k_norm", attention.k_norm)
        counts = (config.num_attention_heads, config.num_key_value_heads)
        stacked = [norm.weight.expand(count, -1) for norm, count in zip((queries, keys), counts, strict=True)]
        head_norms = HeadNorms(queries, keys, torch.cat(stacked))
    return LeanLayer(
        attention_norm=_norm(f"{path}.input_layernorm", block.input_layernorm),
        mlp_norm=_norm(f"{path}.post_attention_layernorm", block.post_attention_layernorm),
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        head_norms=head_norms,
        scale=float(attention.scaling),
        window=_window(attention, family, config),
    )


def _site_shapes(head_dim: int, config: PretrainedConfig) -> dict[str, tuple[int, list[int]]]:
    """Name of each site of a layer -> input width and the widths of its slices."""
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return {
        "self_attn.qkv_proj": (config.hidden_size, [queries, keys, keys]),
        "self_attn.o_proj": (queries, [config.hidden_size]),
        "mlp.gate_up_proj": (config.hidden_size, [config.intermediate_size, config.intermediate_size]),
        "mlp.down_proj": (config.intermediate_size, [config.hidden_size]),
    }


def _window(attention: Any, family: str, config: PretrainedConfig) -> int:
    """What the family's attention hands on as `sliding_window`: Llama nothing, Mistral the config's, Qwen its own."""
    match family:
        case "Llama":
            return 0
        case "Mistral":
            return int(config.sliding_window or 0)
        case _:
            return int(attention.sliding_window or 0)


def _norm(path: str, module: nn.Module) -> LeanNorm:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return LeanNorm(path, weight.detach())


def _is_norm(module: Any, family: str, width: int, config: PretrainedConfig) -> bool:
    return (
        type(module).__name__ == f"{family}RMSNorm"
        and module.variance_epsilon == config.rms_norm_eps
        and tuple(module.weight.shape) == (width,)
    )
