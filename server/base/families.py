"""Which model families can be served, and why one cannot. Reads configs only; loads no weights."""

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import BaseModelError

# Families whose served forward is tested against transformers' own (tests/base/test_families.py). Any other
# architecture that passes the checks below is compared with its own eager attention when the server starts
# (server/base/selfcheck.py).
PROVEN = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
)

_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def check_servable(config: PretrainedConfig) -> str:
    """The architecture name of a model that can be served.

    Raises:
        BaseModelError: names the architecture and the reason.
    """
    architectures = getattr(config, "architectures", None) or []
    name = architectures[0] if architectures else type(config).__name__
    if config.is_encoder_decoder:
        raise _refused(name, "it is an encoder-decoder model; Lorikeet serves decoder-only models")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise _refused(name, "transformers has no causal language model for it; multimodal models are not served")
    if name != model_class.__name__ and architectures:
        raise _refused(name, f"it is not the text-only causal language model of its family ({model_class.__name__})")
    if not getattr(model_class, "_supports_attention_backend", False):
        raise _refused(name, "its attention in transformers cannot be routed to a paged implementation")
    experts = [f for f in _EXPERT_FIELDS if (getattr(config, f, None) or 0) > 1]
    if experts:
        raise _refused(name, f"it is a mixture of experts ({experts[0]}={getattr(config, experts[0])})")
    layer_types = set(getattr(config, "layer_types", None) or _LAYER_TYPES)
    if not layer_types <= _LAYER_TYPES:
        raise _refused(name, f"it has layers of type {', '.join(sorted(layer_types - _LAYER_TYPES))}")
    if getattr(config, "use_bidirectional_attention", False):
        raise _refused(name, "its attention is bidirectional")
    return str(name)


def context_limit(config: PretrainedConfig) -> int:
    """Tokens of context that the model can be served with.

    RoPE variants whose frequencies depend on the longest sequence in the batch (dynamic NTK, longrope) are limited to
    the length they were first trained for: beyond it one request's length would change another's output.
    """
    limit = int(getattr(config, "max_position_embeddings", 0) or 2048)
    for rope in _rope_parameter_sets(config):
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            limit = min(limit, int(rope.get("original_max_position_embeddings") or limit))
    return limit


def _rope_parameter_sets(config: PretrainedConfig) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in rope:
        return [rope]
    return [value for value in rope.values() if isinstance(value, dict)]


def _refused(name: str, why: str) -> BaseModelError:
    return BaseModelError(
        f"The base model's architecture {name} cannot be served: {why}. Tested families: {', '.join(PROVEN)}.",
        {"architecture": name},
    )
