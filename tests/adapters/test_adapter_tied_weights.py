"""Embedding and head that share one weight: whichever weights an adapter's file has of them, both run as in PEFT."""

import copy
import json

import pytest
import torch
from lorikeet.adapters.errors import AdapterIncompatibleError, AdapterInvalidError
from lorikeet.adapters.packing import OverrideKind
from peft import PeftModel
from safetensors.torch import save_file
from torch.testing import assert_close

from .full_module_world import HIDDEN, VOCAB, World, lora
from .tiny_base import EMBEDDING, HEAD

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's hints for training


def write_weights(world, modules, whole=()):
    """Replace what the saved adapter has of embedding and head.

    Args:
        world: with a saved adapter.
        modules: module -> its weight, or None for the base's own; in the file's order.
        whole: the config's modules_to_save, without PEFT having made any.
    """
    targets = json.loads((world.directory / "adapter_config.json").read_text())["target_modules"]
    tensors = {name: tensor for name, tensor in world.file.items() if "lora_" in name}
    for module, change in modules.items():
        weight = world.model.get_submodule(module).weight.detach()
        under = ".base_layer" if module.rsplit(".")[-1] in targets else ""
        tensors[f"{module}{under}.weight"] = weight + change * torch.randn_like(weight)
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        world.directory / "adapter_model.safetensors",
        {"format": "pt"},
    )
    set_config(world.directory, modules_to_save=list(whole) or None)


def set_config(directory, **values):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def embedded(world, ids):
    """What the device computes for token ids [n]: [n, HIDDEN]."""
    found = world.overrides()
    own = found.get((EMBEDDING, OverrideKind.WEIGHT))
    rows = (world.model.get_submodule(EMBEDDING).weight if own is None else own["weight"])[ids]
    low_rank = found.get((EMBEDDING, OverrideKind.EMBEDDING_LORA))
    return rows if low_rank is None else rows + low_rank["a"][ids] @ low_rank["b"]


def scored(world, hidden):
    """What the device computes at the head for hidden states [n, HIDDEN]: [n, VOCAB]."""
    own = world.overrides().get((HEAD, OverrideKind.WEIGHT))
    if own is not None:
        return hidden @ own["weight"].t()
    site, _ = world.sites.by_module[HEAD]
    adapted = int(world.packed.site_ranks[site.index, 0]) > 0
    return world.linear(HEAD, hidden) if adapted else world.model.get_submodule(HEAD)(hidden)


@pytest.mark.parametrize(
    ("target", "whole"),
    [
        ("k_proj", ()),
        ("lm_head", ()),
        ("embed_tokens", ()),
        ("embed_tokens", ("lm_head",)),
        ("lm_head", ("embed_tokens",)),
        ("k_proj", ("embed_tokens", "lm_head")),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "changes",
    [{HEAD: 1}, {EMBEDDING: 1}, {EMBEDDING: 1, HEAD: 1}, {HEAD: 1, EMBEDDING: 0}, {EMBEDDING: 1, HEAD: 0}],
    ids=["head", "embedding", "both", "head-and-copy", "embedding-and-copy"],
)
@torch.no_grad()
def test_saved_weights_of_a_tied_base_run_as_in_peft(changes, target, whole, tmp_path):
    world = World(tmp_path, tied=True)
    world.save(lora(target_modules=["q_proj", target]), save_embedding_layers=False)
    write_weights(world, changes, whole)
    lacking = {"embed_tokens": EMBEDDING, "lm_head": HEAD}
    if any(lacking[name] not in changes for name in whole):
        with pytest.raises(KeyError):
            PeftModel.from_pretrained(copy.deepcopy(world.model), tmp_path)
        with pytest.raises(AdapterInvalidError, match="has weights of its own, but the file has none"):
            world.pack()
        return
    inner = PeftModel.from_pretrained(copy.deepcopy(world.model), tmp_path).base_model.model
    world.pack()
    ids, hidden = torch.randperm(VOCAB), torch.randn(7, HIDDEN)
    assert_close(embedded(world, ids), inner.get_submodule(EMBEDDING)(ids), **FLOAT32)
    assert_close(scored(world, hidden), inner.get_submodule(HEAD)(hidden), **FLOAT32)


@torch.no_grad()
def test_weight_under_a_whole_head_is_the_embedding_s(tmp_path):
    """Files that were not saved through save_pretrained have it; PEFT's own loading only takes the saved form."""
    world = World(tmp_path, tied=True)
    world.save(lora())
    shape = world.model.get_submodule(HEAD).weight.shape
    own, under = torch.randn(shape), torch.randn(shape)
    saved = {name: tensor for name, tensor in world.file.items() if "lora_" in name}
    saved |= {f"{HEAD}.modules_to_save.default.weight": own, f"{HEAD}.original_module.weight": under}
    save_file(saved, tmp_path / "adapter_model.safetensors")
    set_config(tmp_path, modules_to_save=["lm_head"])
    world.pack()
    found = world.overrides()
    assert_close(found[HEAD, OverrideKind.WEIGHT]["weight"], own, rtol=0, atol=0)
    assert_close(found[EMBEDDING, OverrideKind.WEIGHT]["weight"], under, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(VOCAB, HIDDEN - 1), (VOCAB,), (VOCAB, HIDDEN, 1)], ids=str)
def test_weight_of_the_wrong_shape_under_a_whole_head_is_refused_by_name(shape, tmp_path):
    world = World(tmp_path, tied=True)
    world.save(lora())
    own = torch.randn(VOCAB, HIDDEN)
    saved = {name: tensor for name, tensor in world.file.items() if "lora_" in name}
    saved |= {f"{HEAD}.modules_to_save.default.weight": own, f"{HEAD}.original_module.weight": torch.randn(shape)}
    save_file(saved, tmp_path / "adapter_model.safetensors")
    set_config(tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(AdapterIncompatibleError, match=r"'lm_head.original_module.weight' cannot be applied: it has"):
        world.pack()


def test_weights_of_different_sizes_for_one_tied_weight_are_refused_by_name(tmp_path):
    """PEFT needs a base of as many rows as both."""
    world = World(tmp_path, tied=True)
    world.save(lora())
    saved = {name: tensor for name, tensor in world.file.items() if "lora_" in name}
    saved |= {f"{EMBEDDING}.weight": torch.randn(VOCAB + 4, HIDDEN), f"{HEAD}.weight": torch.randn(VOCAB, HIDDEN)}
    save_file(saved, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterIncompatibleError, match=r"'lm_head.weight' cannot be applied: it has shape \[61, 32\]"):
        world.pack()
