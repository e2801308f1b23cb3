"""A tiny base, adapters that PEFT makes for it, and what becomes of what PEFT saves beside low-rank deltas."""

import copy

import torch
from lorikeet.adapters.checkpoint import load_checkpoint
from lorikeet.adapters.fingerprint import BaseFingerprint
from lorikeet.adapters.packing import REGION_ALIGNMENT, pack_adapter
from lorikeet.adapters.tensor_plan import TensorPlanner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from .tiny_base import DenseWeights, describe_modules, describe_sites

HIDDEN, VOCAB = 32, 61


class World:
    """A tiny base, adapters that PEFT makes for it, and what becomes of them.

    Args:
        directory: where adapters go.
        tied: whether embedding and head are one weight.
        dtype: of the arena.
    """

    def __init__(self, directory, tied=False, dtype=torch.float32):
        torch.manual_seed(5)
        config = LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=VOCAB, tie_word_embeddings=tied, attention_bias=True,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        self.sites, self.modules = describe_sites(self.model), describe_modules(self.model)
        self.weights, self.dtype, self.directory = DenseWeights(self.model), dtype, directory

    def save(self, config, resize=None, **kwargs):
        """An adapter with random weights wherever PEFT trains something; the model that PEFT trained."""
        model = copy.deepcopy(self.model)
        if resize:
            model.resize_token_embeddings(resize, mean_resizing=False)
        model = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
        model.save_pretrained(self.directory, **kwargs)
        self.file = {
            name.removeprefix("base_model.model."): tensor
            for name, tensor in load_file(self.directory / "adapter_model.safetensors").items()
        }
        return model

    def pack(self, **kwargs):
        checkpoint = load_checkpoint(self.directory, TensorPlanner(self.sites, self.modules, BaseFingerprint()))
        self.packed = pack_adapter(checkpoint, self.weights, dtype=self.dtype, pin_memory=False, **kwargs)
        return self.packed

    def overrides(self):
        """(module, kind) -> its tensors by region name, token ids among them."""
        found = {}
        for override in self.packed.overrides:
            assert (override.module, override.kind) not in found
            tensors = {}
            for name, (start, shape) in override.regions.items():
                assert start % REGION_ALIGNMENT == 0
                tensors[name] = self.packed.data[start : start + torch.Size(shape).numel()].view(shape)
            if override.token_ids is not None:
                tensors["ids"] = override.token_ids
            found[override.module, override.kind] = tensors
        return found

    def affine(self, module):
        """Gains and offsets of a site with one slice; None if there is none."""
        site, _ = self.sites.by_module[module]
        start = int(self.packed.site_affines[site.index])
        if start < 0:
            return None
        assert start % REGION_ALIGNMENT == 0
        return self.packed.data[start : start + 2 * site.out_features].view(2, -1)

    def delta(self, module):
        """A and B^T of a site with one slice."""
        site, _ = self.sites.by_module[module]
        start, rank = int(self.packed.site_offsets[site.index]), int(self.packed.site_ranks[site.index, 0])
        end = start + rank * site.in_features
        a = self.packed.data[start:end].view(rank, -1)
        return a, self.packed.data[end : end + rank * site.out_features].view(rank, -1)

    def linear(self, module, x):
        """What the device computes for a linear: affine, then the delta."""
        y = self.model.get_submodule(module)(x)
        affine = self.affine(module)
        y = y if affine is None else y * affine[0] + affine[1]
        a, b_t = self.delta(module)
        return y + (x @ a.t()) @ b_t


def lora(**kwargs):
    return LoraConfig(**({"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]} | kwargs))
