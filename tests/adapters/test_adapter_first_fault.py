"""Values are checked for many tensors at once; an adapter with several faults still names the tensor that comes first.

The oracle of each test is the order in which a file's tensors are gone through one by one: that of the header for
values that are not finite, that of the sites for values that are too large.
"""

import json
import math
import random
import struct

import pytest
import torch
from lorikeet.adapters import packing
from lorikeet.adapters.checkpoint import load_checkpoint
from lorikeet.adapters.errors import AdapterIncompatibleError, AdapterInvalidError
from lorikeet.adapters.inspection import inspect_directory
from lorikeet.adapters.shards import open_weights
from lorikeet.adapters.tensor_plan import TensorPlanner
from lorikeet.adapters.weights_file import WEIGHTS_FILE
from peft import LoraConfig
from safetensors.torch import load_file

from .full_module_world import World, lora

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TARGETS = ["q_proj", "k_proj", "up_proj"]
SHARDS = 3


@pytest.fixture
def rng():
    return random.Random()


@pytest.fixture
def tensors(tmp_path, save_adapter, rng):
    """A PEFT adapter at tmp_path: its tensors, each of a random type; its weights file is to be written again."""
    save_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM"), tmp_path)
    clean = load_file(tmp_path / WEIGHTS_FILE)
    kinds = [*DTYPES.values(), *rng.choices(list(DTYPES.values()), k=len(clean) - len(DTYPES))]
    rng.shuffle(kinds)
    # copies: what `load_file` gives lies in the file itself
    return {name: tensor.to(kind, copy=True) for (name, tensor), kind in zip(clean.items(), kinds, strict=True)}


@pytest.fixture
def load(tmp_path, sites, modules, base):
    return lambda: load_checkpoint(tmp_path, TensorPlanner(sites, modules, base))


def write(path, tensors, rng):
    """A safetensors file whose header and payload have the tensors in orders of their own; the header's."""
    places, payload = {}, b""
    for name in rng.sample(list(tensors), len(tensors)):
        data = tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
        entry = {"dtype": NAMES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        places[name] = entry | {"data_offsets": [len(payload), len(payload) + len(data)]}
        payload += data
    order = rng.sample(list(places), len(places))
    header = json.dumps({name: places[name] for name in order}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + payload)
    return order


def write_sharded(directory, tensors, rng):
    """As `write`, over several files; the names in the order of the files and their headers."""
    (directory / WEIGHTS_FILE).unlink(missing_ok=True)
    names, order, index = rng.sample(list(tensors), len(tensors)), [], {}
    for i in range(SHARDS):
        shard = f"adapter_model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        mine = write(directory / shard, {name: tensors[name] for name in names[i::SHARDS]}, rng)
        order += mine
        index |= dict.fromkeys(mine, shard)
    (directory / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps({"weight_map": index}))
    return order


def write_either(directory, tensors, rng, sharded):
    return write_sharded(directory, tensors, rng) if sharded else write(directory / WEIGHTS_FILE, tensors, rng)


def spoil(tensor, value, rng):
    tensor.view(-1)[rng.randrange(tensor.numel())] = value


def sited(sites):
    """Tensor names in the order in which they are packed."""
    pieces = [piece.module for site in sites.sites for piece in site.slices]
    return [
        f"base_model.model.{module}.lora_{part}.weight"
        for module in pieces
        if module.rpartition(".")[2] in TARGETS
        for part in "AB"
    ]


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_of_mixed_types_are_those_of_the_file(sharded, tensors, tmp_path, load, rng):
    order = write_either(tmp_path, tensors, rng, sharded)
    checkpoint = load()
    assert list(checkpoint.tensors) == order and len(checkpoint.tensors) == len(tensors)
    for name, tensor in checkpoint.tensors.items():
        assert tensor.dtype is tensors[name].dtype and torch.equal(tensor, tensors[name])
    with pytest.raises(KeyError):
        checkpoint.tensors["no such tensor"]


def test_runs_hold_every_byte_once_and_each_tensor_in_one(tensors, tmp_path, rng):
    write(tmp_path / WEIGHTS_FILE, tensors, rng)
    with open_weights(tmp_path) as weights:
        (header,) = weights.headers
    assert [run.start for run in header.runs] == [0, *(run.stop for run in header.runs)][:-1]
    assert header.runs[-1].stop == header.payload_bytes
    assert all(one.dtype != next_one.dtype for one, next_one in zip(header.runs, header.runs[1:], strict=False))
    for info in header.tensors.values():
        assert sum(r.dtype == info.dtype and r.start <= info.start < info.stop <= r.stop for r in header.runs) == 1


def test_empty_tensors_are_in_no_run(tmp_path):
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F16", "shape": [0, 3], "data_offsets": [8, 8]},
        "c": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
        "d": {"dtype": "BF16", "shape": [0], "data_offsets": [12, 12]},
    }
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 12)
    with open_weights(tmp_path) as weights:
        assert weights.headers[0].runs == (("F32", 0, 12),)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sharded", [False, True])
def test_first_tensor_of_the_header_that_is_not_finite_is_named(value, sharded, tensors, tmp_path, load, rng):
    spoiled = rng.sample(list(tensors), rng.randint(1, 4))
    for name in spoiled:
        spoil(tensors[name], value, rng)
    order = write_either(tmp_path, tensors, rng, sharded)
    first = min(spoiled, key=order.index)
    with pytest.raises(AdapterInvalidError, match="not finite") as error:
        load()
    assert error.value.metadata == {"tensor": first} and repr(first) in error.value.message
    problem = inspect_directory(tmp_path).problem
    assert problem is not None and problem.message == error.value.message


@pytest.mark.parametrize("which", [0, 1, -1])
def test_payload_that_is_not_finite_in_one_run_alone(which, tensors, tmp_path, load, rng):
    write(tmp_path / WEIGHTS_FILE, tensors, rng)
    with open_weights(tmp_path) as weights:
        (header,) = weights.headers
    assert len(header.runs) > 2 and load().tensors
    run = header.runs[which]
    inside = [info for info in header.tensors.values() if run.start <= info.start < run.stop]
    target = rng.choice(inside)
    item_bytes = DTYPES[target.dtype].itemsize
    at = len(header.raw) + target.start + item_bytes * rng.randrange((target.stop - target.start) // item_bytes)
    nan = torch.tensor([math.nan], dtype=DTYPES[target.dtype]).view(torch.uint8).numpy().tobytes()
    data = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(data[:at] + nan + data[at + item_bytes :])
    with pytest.raises(AdapterInvalidError, match="not finite") as error:
        load()
    assert error.value.metadata == {"tensor": target.name}


@pytest.mark.parametrize(("arena", "value"), [(torch.float16, 7e4), (torch.float32, 2.0**41), (torch.bfloat16, -1e38)])
@pytest.mark.parametrize("sharded", [False, True])
def test_first_tensor_that_is_too_large_is_named(arena, value, sharded, tensors, tmp_path, sites, pack, rng):
    order = sited(sites)
    assert sorted(order) == sorted(tensors)
    spoiled = rng.sample(order, rng.randint(1, 4))
    for name in spoiled:
        tensors[name] = tensors[name].bfloat16()  # the largest float16 is no weight that is too large
        spoil(tensors[name], value, rng)
    write_either(tmp_path, tensors, rng, sharded)
    first = min(spoiled, key=order.index)
    with pytest.raises(AdapterIncompatibleError, match="do not fit") as error:
        pack(tmp_path, arena)
    how = " times its scaling (2)" if "lora_B" in first else ""
    assert error.value.metadata == {"tensor": first}
    assert error.value.message.startswith(f"Tensor {first!r}{how} has values that do not fit into {arena}, ")


def test_value_that_is_not_finite_goes_before_one_that_is_too_large(tensors, tmp_path, sites, pack, rng):
    large, not_finite = sited(sites)[0], sited(sites)[-1]
    tensors[large] = tensors[large].float()
    spoil(tensors[large], 1e30, rng)
    spoil(tensors[not_finite], math.nan, rng)
    write(tmp_path / WEIGHTS_FILE, tensors, rng)
    with pytest.raises(AdapterInvalidError, match="not finite") as error:
        pack(tmp_path)
    assert error.value.metadata == {"tensor": not_finite}


@pytest.mark.parametrize("sign", [1, -1], ids=["larger first", "norm first"])
def test_of_a_value_too_large_and_a_norm_of_zero_the_first_site_is_named(
    sign, tmp_path, save_adapter_only, edit_tensors, sites, weights, pack, monkeypatch, rng
):
    config = LoraConfig(r=3, target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM")
    save_adapter_only(config, tmp_path)
    adapted = [s for s in sites.sites if any(p.module.rpartition(".")[2] in TARGETS for p in s.slices)]
    large, zero = (rng.choice([p for p in s.slices if p.module.rpartition(".")[2] in TARGETS])
                   for s in sorted(rng.sample(adapted, 2), key=lambda s: s.index)[::sign])  # fmt: skip
    name = f"base_model.model.{large.module}.lora_A.weight"
    edit_tensors(tmp_path, lambda tensors: spoil(tensors[name], 1e20, rng))
    norms = weights.column_norms

    def without_one(module, lora_a, lora_b):
        found = norms(module, lora_a, lora_b)
        return found * 0 if module == zero.module else found

    monkeypatch.setattr(weights, "column_norms", without_one)
    if sign > 0:
        with pytest.raises(AdapterIncompatibleError, match="do not fit") as error:
            pack(tmp_path)
        assert error.value.metadata == {"tensor": name}
    else:
        with pytest.raises(AdapterInvalidError, match=f"adapted weight of {zero.module} has a norm of zero"):
            pack(tmp_path)


def test_too_large_goes_before_a_delta_of_zero(tensors, tmp_path, sites, pack, rng):
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()
    large = rng.choice([name for name in sited(sites) if "lora_A" in name])
    tensors[large] = tensors[large].float()
    spoil(tensors[large], 1e30, rng)
    write(tmp_path / WEIGHTS_FILE, tensors, rng)
    with pytest.raises(AdapterIncompatibleError, match="do not fit") as error:
        pack(tmp_path)
    assert error.value.metadata == {"tensor": large}


KINDS = {
    "plain": {},
    "biases": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 11]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_element_is_written(kind, tmp_path, monkeypatch):
    """All of the memory is looked at, so gaps count, too: here it holds NaN before it is filled."""
    world = World(tmp_path)
    world.save(lora(**KINDS[kind]))
    monkeypatch.setattr(packing, "_host_memory", lambda n, dtype, pin_memory: torch.full((n,), math.nan, dtype=dtype))
    assert world.pack().data.isfinite().all()
