"""Every key of the PEFT configs that are served, and what happens to it. Imports no torch.

A key is *served* (`config.py` reads it), *ignored* (it cannot change the output of a trained adapter; the reason is
beside it), or *default only* (it changes the computation in a way that is not served, so another value than the default
refuses the adapter by name, in the words of `formats.py`). A test compares these tables with the fields of the
installed PEFT, so that a field a newer PEFT adds cannot be ignored in silence. A key in none of them refuses the
adapter, too, unless it is empty.
"""

from typing import Final

SERVED: Final = frozenset(
    {
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "bias",
        "lora_bias",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "trainable_token_indices",
        "token_indices",
        "ensure_weight_tying",
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
    "fan_in_fan_out": "PEFT sets it to false, with a warning, wherever it adapts an nn.Linear",
    "init_weights": "initial values of trainable tokens",
    "megatron_core": "import path, used with megatron_config only",
    "qalora_group_size": "used with use_qalora only",
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

# Values that leave the served computation as it is, beside null.
DEFAULT_ONLY: Final[dict[str, tuple[object, ...]]] = {
    "task_type": ("CAUSAL_LM",),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "alora_invocation_tokens": ([],),
    "megatron_config": ({},),
    "use_qalora": (False,),
    "use_bdlora": (False, {}),
    "velora_config": ({},),
    "monteclora_config": ({},),
    "arrow_config": ({},),
    "kasa_config": ({},),
    "runtime_config": ({}, {"ephemeral_gpu_offload": False}),
}
