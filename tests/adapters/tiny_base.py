"""A base described by hand, and its weights read from a dense model: what `server/base` does for a real one."""

import torch
from lorikeet.adapters.modules import Module, ModuleKind, ModuleTable
from lorikeet.adapters.sites import Site, SiteTable, Slice
from torch import nn

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


class DenseWeights:
    """The `BaseWeights` of a transformers model that is not quantized."""

    def __init__(self, model):
        self._model = model
        self.asked = []  # (question, module)

    def column_norms(self, module, lora_a, lora_b):
        self.asked.append(("column_norms", module))
        assert lora_a.dtype is lora_b.dtype is torch.float32
        return torch.linalg.vector_norm(
            self._model.get_submodule(module).weight.detach().float() + lora_b @ lora_a, dim=1
        )

    def bias(self, module):
        self.asked.append(("bias", module))
        bias = self._model.get_submodule(module).bias
        return None if bias is None else bias.detach().float().clone()

    def equals(self, module, parameter, tensor):
        self.asked.append(("equals", module))
        own = self._model.get_parameter(f"{module}.{parameter}")
        return own.shape == tensor.shape and torch.equal(own.detach(), tensor.to(own.dtype))


def describe_modules(model, scale=1.0):
    """The module table of a transformers model."""
    by_path = {}
    for path, module in model.named_modules():
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        if isinstance(module, nn.Embedding):
            by_path[path] = Module(path, ModuleKind.EMBEDDING, shapes)
        elif shapes and not isinstance(module, nn.Linear):
            by_path[path] = Module(path, ModuleKind.NORM, shapes)
    rows = model.get_input_embeddings().weight.shape[0]
    return ModuleTable(by_path, EMBEDDING, HEAD, model.config.tie_word_embeddings, rows, scale)


def describe_sites(model):
    """A site for every linear of a transformers model, the head last."""
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    ordered = [*(path for path in linears if path != HEAD), HEAD]
    return SiteTable(
        Site(i, path, -1 if path == HEAD else int(path.split(".")[2]), linears[path].in_features,
             (Slice(path, linears[path].out_features),), is_head=path == HEAD)
        for i, path in enumerate(ordered)
    )  # fmt: skip
