"""PEFT on transformers' bitsandbytes NF4 model: makes the adapters and says what they answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ..devices import CPU


def nf4_model(directory: Path, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model as a QLoRA user loads it, quantized and computing on that device in that type."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=settings, dtype=dtype, attn_implementation="eager", device_map={"": str(device)}
    )
    # PEFT would spread a model over all devices that says it was placed on the CPU, as some versions let it say.
    vars(model).pop("hf_device_map", None)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # Where the CPU has AVX512-BF16, bitsandbytes would compute in bf16 although fp32 was asked for.
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@dataclass(frozen=True)
class Recipe:
    """One adapter to make: its id and PEFT config."""

    name: str
    config: LoraConfig


def recipes(split: bool) -> list[Recipe]:
    """Eight adapters of different rank, targets and method.

    Args:
        split: the family has separate q/k/v and gate/up (Phi-3 has not).
    """
    q, v = ("q_proj", "v_proj") if split else ("qkv_proj", "o_proj")
    up = "up_proj" if split else "gate_up_proj"
    k = "k_proj" if split else "qkv_proj"
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    return [
        Recipe("plain-all", LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **common)),
        Recipe("rslora", LoraConfig(r=5, lora_alpha=7, use_rslora=True, target_modules=[q, v], **common)),
        Recipe(
            "patterns",
            LoraConfig(
                r=4,
                lora_alpha=8,
                target_modules=[q, up, "down_proj"],
                rank_pattern={q: 17, r"layers\.1\..*down_proj": 3},
                alpha_pattern={"down_proj": 2, q: 9},
                **common,
            ),
        ),
        Recipe(
            "some-layers",
            LoraConfig(r=16, lora_alpha=4, target_modules=["o_proj", up], layers_to_transform=[0, 2], **common),
        ),
        Recipe(
            "adalora",
            AdaLoraConfig(
                init_r=6,
                target_r=4,
                lora_alpha=12,
                target_modules=[q, "down_proj"],
                total_step=10,
                task_type="CAUSAL_LM",
            ),
        ),
        Recipe("one-linear-r33", LoraConfig(r=33, lora_alpha=33, target_modules=["down_proj"], **common)),
        Recipe("rank-1", LoraConfig(r=1, lora_alpha=3, target_modules=[k], **common)),
        Recipe(
            "rslora-patterns",
            LoraConfig(
                r=12, lora_alpha=5, use_rslora=True, rank_pattern={"o_proj": 2}, target_modules=[v, "o_proj"], **common
            ),
        ),
    ]


class Oracle:
    """The adapters, made and saved, and what PEFT answers with each run alone.

    Args:
        directory: the 16-bit base.
        chosen: what to make; PEFT keeps LoRA and AdaLoRA on models of their own.
        out: every adapter is saved to out/<name>, as PEFT saves it.
        device: where they are made, and where PEFT answers.
    """

    def __init__(self, directory: Path, chosen: list[Recipe], out: Path, device: torch.device = CPU) -> None:
        torch.manual_seed(7)
        self._directory, self._out, self._device = directory, out, device
        self._models: dict[str, PeftModel] = {}
        self._groups = [[r for r in chosen if isinstance(r.config, AdaLoraConfig) is kind] for kind in (False, True)]
        for group in filter(None, self._groups):
            model = _with_adapters(nf4_model(directory, device), group)
            for recipe in group:
                model.save_pretrained(out, selected_adapters=[recipe.name])
                self._models[recipe.name] = model

    def computing_in(self, dtype: torch.dtype) -> "Oracle":
        """PEFT with what was saved, on a base that computes in another type; it keeps adapters in fp32."""
        other = Oracle(self._directory, [], self._out, self._device)
        for group in filter(None, self._groups):
            first, *others = (recipe.name for recipe in group)
            base = nf4_model(self._directory, self._device, dtype)
            model = PeftModel.from_pretrained(base, str(self._out / first), adapter_name=first)  # type: ignore[arg-type]
            for name in others:
                model.load_adapter(str(self._out / name), name)
            other._models |= dict.fromkeys((first, *others), model.eval())
        return other

    @torch.inference_mode()
    def logits(self, adapter: str, ids: list[int]) -> Tensor:
        """fp32 logits of every position, [len(ids), vocab] on the CPU, with one adapter ("": none)."""
        inputs = torch.tensor([ids], device=self._device)
        if not adapter:
            model = next(iter(self._models.values()))
            with model.disable_adapter():
                return model(input_ids=inputs, use_cache=False).logits[0].float().cpu()
        model = self._models[adapter]
        model.set_adapter(adapter)
        return model(input_ids=inputs, use_cache=False).logits[0].float().cpu()

    def greedy(self, adapter: str, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """Greedy continuation without a cache, and by how much each token led the second best (in logits)."""
        ids, margins = list(prompt), []
        for _ in range(count):
            top = self.logits(adapter, ids)[-1].topk(2)
            margins.append((top.values[0] - top.values[1]).item())
            ids.append(int(top.indices[0]))
        return ids[len(prompt) :], margins


def _with_adapters(model: nn.Module, group: list[Recipe]) -> PeftModel:
    """Random adapters, large enough that each changes the greedy answer."""
    first, *others = group
    peft_model = get_peft_model(model, first.config, adapter_name=first.name)  # type: ignore[arg-type]
    for recipe in others:
        peft_model.add_adapter(recipe.name, recipe.config)
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name:
            # lora_B, and AdaLoRA's lora_E, would start at zero.
            parameter.data.normal_(std=1.0 if "lora_E" in name else 0.2)
    return peft_model.eval()  # type: ignore[no-any-return]
