"""Whatever PEFT saves beside low-rank deltas: every tensor lands where it must, in the regions of a packed adapter."""

import pytest
import torch
from lorikeet.adapters.errors import AdapterIncompatibleError
from lorikeet.adapters.inspection import inspect_directory
from lorikeet.adapters.packing import OverrideKind
from peft import LNTuningConfig, TrainableTokensConfig
from torch.testing import assert_close

from .full_module_world import HIDDEN, VOCAB, World, lora
from .tiny_base import EMBEDDING, HEAD

Q0 = "model.layers.0.self_attn.q_proj"
EXACT = {"rtol": 0, "atol": 0}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's hints for training


@pytest.fixture
def world(tmp_path):
    return lambda **kwargs: World(tmp_path, **kwargs)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "lm_head"]},
        {"bias": "lora_only"},
        {"bias": "all", "use_dora": True},
        {"lora_bias": True},
        {"lora_bias": True, "bias": "all", "use_rslora": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_affines_make_linears_equal_to_peft(changes, world):
    world = world()
    peft = world.save(lora(**changes)).base_model.model
    world.pack()
    x = torch.randn(7, HIDDEN)
    adapted = [Q0, "model.layers.1.self_attn.q_proj"] + (
        [HEAD] if "lm_head" in changes.get("target_modules", "") else []
    )
    for module in adapted:
        assert_close(world.linear(module, x), peft.get_submodule(module)(x), **FLOAT32)
    other = "model.layers.1.self_attn.k_proj"
    shift = peft.get_submodule(other)(x) - world.model.get_submodule(other)(x)
    if changes.get("bias") == "all":
        gains, offsets = world.affine(other)
        assert gains.eq(1).all()
        assert_close(offsets.expand(7, -1), shift, **FLOAT32)
    else:
        assert world.affine(other) is None
    assert world.overrides() == {}
    assert set(adapted) <= world.packed.report.full_modules


def test_norm_biases_and_plain_lora_need_no_weights(world):
    world = world()
    world.save(lora())
    world.pack()
    assert world.weights.asked == [] and world.packed.report.full_modules == frozenset()
    assert (world.packed.site_affines == -1).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("names", "modules"),
    [
        (["lm_head"], [HEAD]),
        (["embed_tokens"], [EMBEDDING]),
        (["layers.0.self_attn.o_proj"], ["model.layers.0.self_attn.o_proj"]),
        (
            ["norm"],
            ["model.norm"] + [f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")],
        ),
        (["mlp"], [f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")]),
    ],
    ids=str,
)
def test_modules_to_save_run_with_their_own_weights(names, modules, tied, world):
    world = world(tied=tied)
    world.save(lora(modules_to_save=names))
    world.pack()
    found = world.overrides()
    assert found.keys() == {(module, OverrideKind.WEIGHT) for module in modules}
    for (module, _), tensors in found.items():
        for name, tensor in tensors.items():
            assert_close(tensor, world.file[f"{module}.{name}"], **EXACT)
    assert world.packed.report.full_modules == set(modules)
    assert world.packed.vocab_size is None


@pytest.mark.parametrize("tied", [False, True])
def test_lora_on_embedding_and_head_with_saved_copies_of_the_base(tied, world):
    world = world(tied=tied)
    world.save(lora(target_modules=["q_proj", "embed_tokens", "lm_head"]))
    assert f"{EMBEDDING}.base_layer.weight" in world.file
    world.pack()
    found = world.overrides()
    assert found.keys() == {(EMBEDDING, OverrideKind.EMBEDDING_LORA)}
    tensors = found[EMBEDDING, OverrideKind.EMBEDDING_LORA]
    assert_close(tensors["a"], world.file[f"{EMBEDDING}.lora_embedding_A"].t(), **EXACT)
    assert_close(tensors["b"], world.file[f"{EMBEDDING}.lora_embedding_B"].t() * (5 / 3), **FLOAT32)
    a, b_t = world.delta(HEAD)
    assert_close(a, world.file["lm_head.lora_A.weight"], **EXACT)
    assert_close(b_t, world.file["lm_head.lora_B.weight"].t() * (5 / 3), **FLOAT32)
    assert world.packed.report.full_modules == frozenset()
    assert world.packed.report.copies == {EMBEDDING, HEAD}
    assert {EMBEDDING, HEAD, Q0} <= world.packed.report.modules


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_adapters_are_applied_to_embedding_and_head(target, world):
    world = world(tied=True)
    world.save(lora(target_modules=["q_proj", target], ensure_weight_tying=True))
    world.pack()
    b, (a, b_t) = world.overrides()[EMBEDDING, OverrideKind.EMBEDDING_LORA]["b"], world.delta(HEAD)
    assert_close(a * (5 / 3), b, **FLOAT32)
    assert b_t.any()


def test_saved_embedding_that_differs_replaces_the_base_s(world):
    world = world(tied=True)
    world.save(lora(target_modules=["q_proj", "embed_tokens"]))
    with torch.no_grad():
        world.model.model.embed_tokens.weight[3, 4] += 1
    world.pack()
    found = world.overrides()
    assert found.keys() == {(EMBEDDING, OverrideKind.WEIGHT), (HEAD, OverrideKind.WEIGHT)}
    lora_delta = world.file[f"{EMBEDDING}.lora_embedding_B"] @ world.file[f"{EMBEDDING}.lora_embedding_A"] * (5 / 3)
    saved = world.file[f"{EMBEDDING}.base_layer.weight"]
    assert_close(found[EMBEDDING, OverrideKind.WEIGHT]["weight"], saved + lora_delta.t(), **FLOAT32)
    assert_close(found[HEAD, OverrideKind.WEIGHT]["weight"], saved, **EXACT)


RESIZED = {
    "saved": lora(),
    "embedding_whole": lora(modules_to_save=["embed_tokens"]),
    "both_whole": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "lora": lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "dora_head": lora(use_dora=True, target_modules=["q_proj", "lm_head"]),
    "tokens": lora(trainable_token_indices=[63, 2, 60]),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [66, 64, 54])
@pytest.mark.parametrize("name", RESIZED)
@torch.no_grad()
def test_vocabulary_of_another_size(name, rows, tied, world):
    if name == "tokens" and rows < 64:
        return
    world = world(tied=tied)
    model = world.save(RESIZED[name], resize=rows, save_embedding_layers=True)
    if name == "dora_head" and not tied:  # PEFT leaves the embedding out, so its new rows are lost
        with pytest.raises(AdapterIncompatibleError, match=f"61 tokens and the head for {rows}; save both"):
            world.pack()
        return
    packed = world.pack()
    assert packed.vocab_size == packed.report.vocab_size == rows
    found = world.overrides()
    assert found.keys() == {(EMBEDDING, OverrideKind.WEIGHT), (HEAD, OverrideKind.WEIGHT)}
    hidden, ids = torch.randn(5, HIDDEN), torch.arange(rows)
    inner = model.base_model.model
    assert_close(found[EMBEDDING, OverrideKind.WEIGHT]["weight"], inner.get_submodule(EMBEDDING)(ids), **FLOAT32)
    got = hidden @ found[HEAD, OverrideKind.WEIGHT]["weight"].t()
    assert_close(got, inner.get_submodule(HEAD)(hidden), **FLOAT32)
    starts = {override.regions["weight"].start for override in packed.overrides}
    assert len(starts) == (1 if tied and name in ("saved", "tokens") else 2)
    assert packed.nbytes >= len(starts) * rows * HIDDEN * 4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        lora(trainable_token_indices=[7, 2, 60]),
        lora(trainable_token_indices={"embed_tokens": [7, 2], "lm_head": [7, 2]}),
        lora(trainable_token_indices={"embed_tokens": [7, 2], "lm_head": [5, 3, 1]}),
        lora(trainable_token_indices={"lm_head": [5, 3]}),
        TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[9, 0, 4]),
    ],
    ids=["list", "same", "different", "head", "method"],
)
@torch.no_grad()
def test_token_rows(config, tied, world):
    world = world(tied=tied)
    inner = world.save(config).base_model.model
    world.pack()
    hidden, ids = torch.randn(5, HIDDEN), torch.arange(VOCAB)
    embedded, logits = world.model.get_submodule(EMBEDDING)(ids).clone(), world.model.get_submodule(HEAD)(hidden)
    for (module, kind), tensors in world.overrides().items():
        assert kind is OverrideKind.TOKENS and tensors["ids"].tolist() == sorted(tensors["ids"].tolist())
        if module == EMBEDDING:
            embedded[tensors["ids"]] = tensors["rows"]
        else:
            logits[:, tensors["ids"]] = hidden @ tensors["rows"].t()
    assert_close(embedded, inner.get_submodule(EMBEDDING)(ids), **EXACT)
    assert_close(logits, inner.get_submodule(HEAD)(hidden), **FLOAT32)


def test_layer_norm_tuning(world):
    world = world()
    world.save(LNTuningConfig(task_type="CAUSAL_LM"))
    world.pack()
    found = world.overrides()
    assert len(found) == 5
    for (module, kind), tensors in found.items():
        assert kind is OverrideKind.WEIGHT
        assert_close(tensors["weight"], world.file[f"{module}.ln_tuning_layers.weight"], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_counts(dtype, world):
    world = world(dtype=dtype)
    world.save(lora(use_dora=True, modules_to_save=["lm_head", "norm"], bias="all"))
    packed = world.pack()
    blocks = [world.affine(site.name).numel() for site in world.sites.sites if world.affine(site.name) is not None]
    blocks += [tensor.numel() for tensors in world.overrides().values() for tensor in tensors.values()]
    assert packed.data.numel() >= sum(blocks)
    assert packed.nbytes == packed.data.numel() * dtype.itemsize
    world.pack(max_elements=packed.data.numel())


def test_inspection_shows_every_part(world):
    world = world()
    world.save(lora(use_dora=True, modules_to_save=["lm_head"], trainable_token_indices=[1, 2]))
    for base in ((), (world.sites, world.modules)):
        found = inspect_directory(world.directory, *base)
        assert found.problem is None and found.report.method == "DoRA"
        assert found.others[Q0] == (f"DoRA [{HIDDEN}]",)
        assert found.others[HEAD] == (f"weight [{VOCAB}, {HIDDEN}]",)
        assert found.others[EMBEDDING] == (f"token rows [2, {HIDDEN}]",)
        assert {Q0, HEAD, EMBEDDING} <= found.report.full_modules or not base
