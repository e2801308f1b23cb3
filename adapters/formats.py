"""Every adapter format that PEFT can save, and what becomes of it here. Imports no torch.

This is the one list: the checks of a config take their words from it (`config.py`), and the table in the docs is made
from it. A format is known by a key of adapter_config.json, and by the key's value where that decides.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Status(StrEnum):
    """What becomes of a format.

    SERVED: in the mixed batch, equal to PEFT. CONVERTED: once PEFT has saved it as plain LoRA; as it is, it is refused
    with the call to make. REFUSED: by the name of its field, with what to do instead.
    """

    SERVED = "served"
    CONVERTED = "converted"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Format:
    """One row.

    Attributes:
        name: for people.
        field: key of adapter_config.json; empty: known by its tensors or files.
        value: the value that means it; empty: every one but PEFT's default.
        status: what becomes of it.
        text: one sentence: how it is served, or why not and what to do.
    """

    name: str
    field: str
    value: str
    status: Status
    text: str


_S, _C, _R = Status.SERVED, Status.CONVERTED, Status.REFUSED

_TO_LORA = "convert it with PEFT's save_as_lora, which approximates it by LoRA of a rank you choose"
_MERGE = "merge it into the base (merge_and_unload) and serve that"
_LORA = "train LoRA instead"
_SHARED = "it rewrites the base weight, which all adapters share"
_PROMPT = "it puts trained positions before the prompt instead of changing weights"
_CONVERT_CALL = (
    "save it with model.save_pretrained(path, path_initial_model_for_weight_conversion=<the adapter as it was before "
    "training>), and PEFT writes an equivalent plain LoRA"
)

_SERVED_FORMATS: Final = (
    Format("LoRA", "peft_type", "LORA", _S, "low-rank deltas of any linear, the output head included"),
    Format("rsLoRA", "use_rslora", "", _S, "scaled by alpha / sqrt(rank)"),
    Format("AdaLoRA", "peft_type", "ADALORA", _S, "with the ranks that its allocator kept, singular values folded in"),
    Format("rank and alpha patterns", "rank_pattern", "", _S, "each module has the rank of its first pattern"),
    Format("alpha patterns", "alpha_pattern", "", _S, "each module has the alpha of its first pattern"),
    Format("target modules", "target_modules", "", _S, "names, suffixes, a regular expression or all-linear"),
    Format("excluded modules", "exclude_modules", "", _S, "names, suffixes or a regular expression"),
    Format("layer subsets", "layers_to_transform", "", _S, "with layers_pattern, as PEFT reads them"),
    Format("DoRA", "use_dora", "", _S, "on linears; the norms of W + s BA are computed when it is loaded"),
    Format("bias", "bias", "", _S, "'all' and 'lora_only'; biases of linears and of norms"),
    Format("lora_bias", "lora_bias", "", _S, "the bias of lora_B, scaled as PEFT scales it"),
    Format("whole modules", "modules_to_save", "", _S, "embeddings, output head, norms and any linear of the base"),
    Format("LoRA on embeddings", "", "", _S, "lora_embedding_A and lora_embedding_B of the input embedding"),
    Format("added tokens", "", "", _S, "saved embeddings and head of another number of rows (save_embedding_layers)"),
    Format("trained token rows", "trainable_token_indices", "", _S, "the rows of those tokens; of a tied head, too"),
    Format("trainable tokens", "peft_type", "TRAINABLE_TOKENS", _S, "the rows of those tokens; of a tied head, too"),
    Format("LayerNorm tuning", "peft_type", "LN_TUNING", _S, "norms run with the adapter's own weights"),
    Format("tied adapters", "ensure_weight_tying", "", _S, "what PEFT wrote for embedding and head is applied to each"),
    Format(
        "fan_in_fan_out", "fan_in_fan_out", "", _S, "has no effect on nn.Linear, where PEFT itself sets it to false"
    ),
    Format("EVA", "init_lora_weights", "eva", _S, "plain LoRA once trained"),
    Format("Gaussian initialisation", "init_lora_weights", "gaussian", _S, "plain LoRA once trained"),
    Format("orthogonal initialisation", "init_lora_weights", "orthogonal", _S, "plain LoRA once trained"),
    Format("MiCA", "init_lora_weights", "mica", _S, "plain LoRA once trained"),
    Format("sharded files", "", "", _S, "adapter_model-00001-of-0000n.safetensors with their index"),
    Format("mixed types", "", "", _S, "float16, bfloat16 and float32 tensors, also in one file"),
    Format("old key names", "", "", _S, "without `base_model.model.`, and with adapter names such as `default`"),
)

_CONVERTED_FORMATS: Final = (
    Format("PiSSA", "init_lora_weights", "pissa", _C, f"it changes the base weight before training: {_CONVERT_CALL}"),
    Format("OLoRA", "init_lora_weights", "olora", _C, f"it changes the base weight before training: {_CONVERT_CALL}"),
    Format("CorDA", "init_lora_weights", "corda", _C, f"it changes the base weight before training: {_CONVERT_CALL}"),
    Format(
        "LoRA-GA", "init_lora_weights", "lora_ga", _C, f"it changes the base weight before training: {_CONVERT_CALL}"
    ),
)

_REFUSED_FIELDS: Final = (
    Format(
        "LoftQ",
        "init_lora_weights",
        "loftq",
        _R,
        "it replaces the base weight by a quantized remainder, and PEFT cannot convert it: save the base that it "
        "left behind, serve that, and set init_lora_weights to true",
    ),
    Format(
        "DoRA on embeddings", "", "", _R, "its norms run over the whole vocabulary: leave the embedding out of DoRA"
    ),
    Format("other tasks", "task_type", "", _R, "only causal language models are served: train with CAUSAL_LM"),
    Format("replicated layers", "layer_replication", "", _R, f"the served base keeps its own layers: {_MERGE}"),
    Format("MoE experts", "target_parameters", "", _R, "only linears are adapted: use target_modules"),
    Format("aLoRA", "alora_invocation_tokens", "", _R, "it starts in the middle of a prompt: train plain LoRA"),
    Format("Megatron", "megatron_config", "", _R, "its parallel linears are not served: train on transformers' model"),
    Format("QA-LoRA", "use_qalora", "", _R, f"it pools its input by groups: {_LORA}"),
    Format("BD-LoRA", "use_bdlora", "", _R, f"its factors are block-diagonal: {_MERGE}"),
    Format("VeLoRA", "velora_config", "", _R, "it is not known to serve as plain LoRA: train without velora_config"),
    Format("MonteCLoRA", "monteclora_config", "", _R, f"it samples its weights: {_LORA}"),
    Format("Arrow", "arrow_config", "", _R, "it routes between adapters: serve them as adapters of their own"),
    Format("KaSA", "kasa_config", "", _R, f"it truncates the base weight: {_MERGE}"),
    Format("runtime settings", "runtime_config", "", _R, "they are PEFT's own: remove them from the config"),
)

# peft_type -> name, why not, what to do.
_REFUSED_TYPES: Final = {
    "ADAMSS": ("AdaMSS", "it splits the base weight into subspaces", _MERGE),
    "ADAPTION_PROMPT": ("LLaMA-Adapter", _PROMPT, _LORA),
    "BEFT": ("BEFT", "it trains biases in a layout of its own", "train LoRA with bias='lora_only'"),
    "BOFT": ("BOFT", _SHARED, _MERGE),
    "C3A": ("C3A", "its update is a circular convolution of full rank", _TO_LORA),
    "CARTRIDGE": ("Cartridge", "it is a trained key-value cache", _LORA),
    "CPT": ("CPT", _PROMPT, _LORA),
    "DEFT": ("DEFT", _SHARED, _MERGE),
    "DELORA": ("DeLoRA", "it normalises its update by the base weight", _TO_LORA),
    "FOURIERFT": ("FourierFT", "its update has full rank", _TO_LORA),
    "FROD": ("FRoD", _SHARED, _MERGE),
    "GLORA": ("GLoRA", "it scales and shifts weights, inputs and biases at once", _MERGE),
    "GRALORA": ("GraLoRA", "it has low rank in each block of the weight only", _TO_LORA),
    "HIRA": ("HiRA", "its update is multiplied with the base weight", _MERGE),
    "HRA": ("HRA", _SHARED, _MERGE),
    "IA3": ("IA3", "it scales inputs of linears", _MERGE),
    "LILY": ("Lily", "its layers share experts that a router mixes", _LORA),
    "LOHA": ("LoHa", "its update is a product of two low-rank ones", _TO_LORA),
    "LOKR": ("LoKr", "its update is a Kronecker product", _TO_LORA),
    "MISS": ("MiSS", "it sums its input by shards", _TO_LORA),
    "MULTITASK_PROMPT_TUNING": ("multitask prompt tuning", _PROMPT, _LORA),
    "OFT": ("OFT", _SHARED, _MERGE),
    "OSF": ("OSF", _SHARED, _MERGE),
    "PEANUT": ("PEANuT", "it computes its update from the base weight by a network", _MERGE),
    "POLY": ("Poly", "it routes between modules", _LORA),
    "PREFIX_TUNING": ("prefix tuning", _PROMPT, _LORA),
    "PROMPT_TUNING": ("prompt tuning", _PROMPT, _LORA),
    "PSOFT": ("PSOFT", "it turns singular vectors of the base weight", _TO_LORA),
    "PVERA": ("PVeRA", "it shares random factors that the file may leave out", _MERGE),
    "P_TUNING": ("P-tuning", _PROMPT, _LORA),
    "RANDLORA": ("RandLoRA", "its update has full rank", _TO_LORA),
    "ROAD": ("RoAd", "it rotates outputs", _MERGE),
    "SHADOW": ("ShadowPEFT", "it runs a second network beside the base", _LORA),
    "SHIRA": ("SHiRA", "its update is sparse, of full rank", _MERGE),
    "SUPERTUNING": ("Super-Tuning", "its update is sparse, of full rank", _MERGE),
    "TINYLORA": ("TinyLoRA", "it is made of singular vectors of the base weight", _TO_LORA),
    "UNILORA": ("Uni-LoRA", "it shares one vector between all modules", _TO_LORA),
    "VBLORA": ("VB-LoRA", "its vectors come from a bank that modules share", _TO_LORA),
    "VERA": ("VeRA", "it shares random factors that the file may leave out", _TO_LORA),
    "WAVEFT": ("WaveFT", "its update has full rank", _TO_LORA),
    "XLORA": ("X-LoRA", "it mixes adapters by a network", "serve them as adapters of their own"),
}

FORMATS: Final = (
    *_SERVED_FORMATS,
    *_CONVERTED_FORMATS,
    *_REFUSED_FIELDS,
    *(
        Format(name, "peft_type", value, _R, f"{why}: {remedy}")
        for value, (name, why, remedy) in _REFUSED_TYPES.items()
    ),
)

_BY_FIELD: Final = {(entry.field, entry.value): entry for entry in FORMATS if entry.field}


def find_format(field: str, value: str = "") -> Format | None:
    """The row of a key of adapter_config.json and, where that decides, of its value; None: not in the list."""
    return _BY_FIELD.get((field, value))
