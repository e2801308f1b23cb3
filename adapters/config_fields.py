"""Every key of PEFT's LoraConfig and AdaLoraConfig, and what happens to it. Imports no torch.

A key is *served* (`config.py` reads it), *ignored* (it cannot change the output of a trained adapter; the reason is
beside it), or *default only* (it changes the computation in a way that is not served, so another value than the default
refuses the adapter by name). A test compares these tables with the fields of the installed PEFT, so that a field a
newer PEFT adds cannot be ignored in silence. A key in none of them refuses the adapter, too, unless it is empty.
"""

from dataclasses import dataclass
from typing import Final

SERVED: Final = frozenset(
    {
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "init_r",
    }
)

IGNORED: Final = {
    "auto_mapping": "names the Python class of the base; shapes are checked instead",
    "peft_version": "informational",
    "revision": "where training fetched the base from; shapes are checked instead",
    "inference_mode": "says whether parameters are trainable",
    "lora_dropout": "active in training only",
    "megatron_core": "import path, used with megatron_config only",
    "qalora_group_size": "used with use_qalora only",
    "ensure_weight_tying": "concerns adapted embeddings and modules_to_save, which are refused by their tensors",
    "loftq_config": "read by init_lora_weights='loftq' only, which is refused",
    "corda_config": "read by init_lora_weights='corda' only, which is refused",
    "lora_ga_config": "read by init_lora_weights='lora_ga' only, which is refused",
    "eva_config": "initialisation only; the ranks it chose are in rank_pattern and alpha_pattern",
    "target_r": "AdaLoRA's training schedule; the ranks it chose are in rank_pattern",
    "tinit": "AdaLoRA's training schedule",
    "tfinal": "AdaLoRA's training schedule",
    "deltaT": "AdaLoRA's training schedule",
    "beta1": "AdaLoRA's training schedule",
    "beta2": "AdaLoRA's training schedule",
    "orth_reg_weight": "a term of AdaLoRA's training loss",
    "total_step": "AdaLoRA's training schedule",
}


@dataclass(frozen=True, slots=True)
class DefaultOnly:
    """Values of a key that leave plain LoRA, beside null, and what to do about another one."""

    allowed: tuple[object, ...]
    remedy: str


_MERGE = "merge it into the base, or train without it"

DEFAULT_ONLY: Final = {
    "task_type": DefaultOnly(("CAUSAL_LM",), "only causal language models are served; train with task_type CAUSAL_LM"),
    "fan_in_fan_out": DefaultOnly((False,), "the served linears store [out, in]; train on a base that uses nn.Linear"),
    "bias": DefaultOnly(("none",), "biases are part of the shared base; train with bias='none'"),
    "lora_bias": DefaultOnly((False,), "train with lora_bias=False"),
    "modules_to_save": DefaultOnly(([],), "whole modules cannot differ per request; train without modules_to_save"),
    "trainable_token_indices": DefaultOnly(([], {}), "embeddings are shared; train without trainable_token_indices"),
    "layer_replication": DefaultOnly(([],), "the served base keeps its own layers; train without layer_replication"),
    "target_parameters": DefaultOnly(([],), "only linears are adapted; use target_modules"),
    "alora_invocation_tokens": DefaultOnly(([],), "activated LoRA is not served; train plain LoRA"),
    "megatron_config": DefaultOnly(({},), "Megatron's parallel linears are not served"),
    "use_dora": DefaultOnly((False,), f"DoRA rescales the base weight; {_MERGE}"),
    "use_qalora": DefaultOnly((False,), f"QA-LoRA pools its input; {_MERGE}"),
    "use_bdlora": DefaultOnly((False, {}), f"block-diagonal factors are not served; {_MERGE}"),
    "velora_config": DefaultOnly(({},), "VeLoRA is not served; train plain LoRA"),
    "monteclora_config": DefaultOnly(({},), "MonteCLoRA samples its weights; train plain LoRA"),
    "arrow_config": DefaultOnly(({},), "Arrow routes between adapters; serve them as adapters of their own"),
    "kasa_config": DefaultOnly(({},), f"KaSA changes the base weight; {_MERGE}"),
    "runtime_config": DefaultOnly(({}, {"ephemeral_gpu_offload": False}), "remove it from the config"),
}

# Initialisations that leave the base as it is: what was trained is an ordinary pair of A and B. Compared in lower case.
PLAIN_INITS: Final = frozenset({"gaussian", "eva", "orthogonal", "mica"})

# Initialisations that take part of the base weight into A and B, so that the adapter fits only a base changed likewise.
BASE_CHANGING_INITS: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
