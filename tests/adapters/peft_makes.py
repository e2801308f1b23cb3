"""Adapters of every kind that the installed PEFT makes of a tiny model, with weights as if trained."""

import copy
import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file
from torch import nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What a type needs to fit into a model this small, or at all.
_SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "target_modules": None},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "FOURIERFT": {"n_frequency": 8},
    "LN_TUNING": {"target_modules": None},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 2},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 5]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 8},
}


def type_config(peft_type: PeftType, **settings: Any) -> PeftConfig:
    """A config of this type that fits the tiny model."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    usual = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    known = {field.name for field in dataclasses.fields(cls)}
    found = {name: value for name, value in usual.items() if name in known}
    return cls(**(found | _SETTINGS.get(peft_type.value, {}) | settings))


def adapt(base: nn.Module, config: PeftConfig) -> PeftModel:
    """An adapted copy of a model, its trainable weights moved by noise that depends on their names only."""
    model = copy.deepcopy(base)
    model.config.use_cache = False  # X-LoRA asks for it
    adapted = get_peft_model(model, copy.deepcopy(config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            # How A and B begin depends on the seed and the initialisation; the rest stays near what it replaces.
            parameter.copy_(0.1 * noise + (0.0 if ".lora_" in name and "magnitude" not in name else parameter))
    return adapted


def save_config_alone(peft_type: PeftType, directory: Path) -> None:
    """For a type that PEFT cannot make here: a config beside a tensor that belongs nowhere."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps({"peft_type": peft_type.value, "task_type": "CAUSAL_LM"}))
    save_file({"base_model.model.other": torch.ones(3)}, directory / WEIGHTS)
