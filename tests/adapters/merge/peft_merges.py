"""PEFT makes an adapter of any format on a plain float32 base, and merges it: the oracle of merging."""

import copy
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ...golden.format_oracle import train
from ...golden.formats import Format


def plain_base(directory: Path, *, nf4: bool) -> nn.Module:
    """The base in float32; its decoder linears are the stored ones, or the values of NF4 ones."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    for name, module in model.named_modules():
        if nf4 and isinstance(module, nn.Linear) and ".layers." in name:
            packed, state = bnb.quantize_4bit(module.weight.data.bfloat16(), quant_type="nf4", compress_statistics=True)
            state.dtype = torch.float32
            module.weight.data = bnb.dequantize_4bit(packed, state)
    return model


def save_adapter(base: nn.Module, made: Format, directory: Path, seed: int) -> None:
    """Save an adapter as if trained on the base."""
    torch.manual_seed(seed)
    config = copy.deepcopy(made.config)
    if isinstance(config.init_lora_weights, str):  # however it began, it is plain LoRA in the end
        config.init_lora_weights = False
    model = get_peft_model(resized(base, made), config)  # type: ignore[arg-type]
    train(model, 1.0, rows_from=base.config.vocab_size)  # type: ignore[union-attr, arg-type]
    model.save_pretrained(directory, **made.save)


def resized(base: nn.Module, made: Format) -> nn.Module:
    """A copy with rows for the tokens that a format adds."""
    model = copy.deepcopy(base)
    if made.added_tokens:
        size = base.config.vocab_size + made.added_tokens  # type: ignore[union-attr, operator]
        model.resize_token_embeddings(size, mean_resizing=False)  # type: ignore[operator]
    return model


def unmerged(base: nn.Module, made: Format, directory: Path) -> PeftModel:
    """The saved adapter on a copy of the base."""
    return PeftModel.from_pretrained(resized(base, made), str(directory)).eval()  # type: ignore[arg-type]


def untied(model: PeftModel) -> PeftModel:
    """The model with a head of its own: PEFT merges into the tensor that embedding and head share, and so into both."""
    for path, module in model.named_modules():
        if path.endswith(("lm_head", "lm_head.base_layer")) and "weight" in module._parameters:
            module.weight = nn.Parameter(module.weight.data.clone())
    return model


@torch.inference_mode()
def answer(model: nn.Module, ids: list[int]) -> Tensor:
    """Float32 logits of every position."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of every parameter, tied ones under both names."""
    return {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)}
