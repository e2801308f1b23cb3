"""Embedding and head stay in 16 bits on a CPU where that loses nothing, and nobody else sees it."""

from pathlib import Path

import pytest
import torch
from lorikeet.kernels.linear import has_kernel
from lorikeet.server.base.loader import load_base
from lorikeet.server.base.model import BaseModel
from safetensors.torch import load_file, save_file
from torch import nn

from .family_models import oracle, save_family

pytestmark = pytest.mark.skipif(not has_kernel(torch.float32), reason="built without the C++ kernels")


def load(directory: Path) -> BaseModel:
    return load_base(str(directory), device=torch.device("cpu"), compute_dtype=torch.float32, progress=False)


def head_of(base: BaseModel) -> nn.Linear:
    head = base.model.get_submodule(base.module_table.head)
    assert isinstance(head, nn.Linear)
    return head


# Llama and Gemma 3 are tied, the latter's embedding is scaled; Qwen 2 and Phi 3 as their configurations say.
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3"])
def test_vocabulary_of_16_bits_has_the_same_values(family: str, tmp_path: Path) -> None:
    save_family(family, tmp_path)
    base, reference = load(tmp_path), oracle(tmp_path)
    embedding = base.model.get_submodule(base.module_table.embedding)
    scaled = type(embedding) is not nn.Embedding
    assert head_of(base).weight.dtype == (torch.float32 if scaled and base.module_table.is_tied else torch.bfloat16)
    assert torch.equal(head_of(base).weight.float(), reference.get_output_embeddings().weight)  # type: ignore[operator]
    assert (embedding.weight is head_of(base).weight) == base.module_table.is_tied
    ids = torch.randint(3, 64, (7,))
    y = embedding(ids)
    assert y.dtype == torch.float32
    assert torch.equal(y, reference.get_submodule(base.module_table.embedding)(ids))


def test_values_that_need_32_bits_keep_them(tmp_path: Path) -> None:
    save_family("llama", tmp_path, max_shard_size="1GB")
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].float()
    tensors[name][-1, -1] = 1 + 2**-20
    save_file(tensors, file, metadata={"format": "pt"})
    base = load(tmp_path)
    assert head_of(base).weight.dtype == torch.float32
    tensors[name][-1, -1] = 1 + 2**-10  # fp16 has it, bf16 has not
    tensors[name] = tensors[name].clamp(-8, 8).half().float()
    save_file(tensors, file, metadata={"format": "pt"})
    assert head_of(load(tmp_path)).weight.dtype == torch.float16


def test_another_weight_that_16_bits_would_round_to_the_same_is_not_equal(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    base = load(tmp_path)
    own = head_of(base).weight.float()
    assert base.weights.equals(base.module_table.head, "weight", own)
    own[0, 0] = torch.nextafter(own[0, 0], torch.tensor(torch.inf))
    assert not base.weights.equals(base.module_table.head, "weight", own)
