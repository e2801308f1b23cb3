"""Weights in several files with an index: every file is checked and hashed, and a missing one is named."""

import hashlib
import json

import pytest
import torch
from lorikeet.adapters.checkpoint import check_complete, load_checkpoint
from lorikeet.adapters.errors import AdapterInvalidError
from lorikeet.adapters.inspection import inspect_directory
from lorikeet.adapters.tensor_plan import TensorPlanner
from lorikeet.adapters.weights_file import WEIGHTS_FILE
from safetensors.torch import load_file, save_file

INDEXES = ["adapter_model.safetensors.index.json", "model.safetensors.index.json"]
NAMES = [f"adapter_model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture(params=INDEXES)
def index(request):
    return request.param


@pytest.fixture
def sharded(lora_dir, index):
    """lora_dir with its tensors spread over three files; the directory."""
    tensors = sorted(load_file(lora_dir / WEIGHTS_FILE).items())
    (lora_dir / WEIGHTS_FILE).unlink()
    shards = [dict(tensors[i::3]) for i in range(3)]
    for name, shard in zip(NAMES, shards, strict=True):
        save_file(shard, lora_dir / name)
    places = {tensor: name for name, shard in zip(NAMES, shards, strict=True) for tensor in shard}
    (lora_dir / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return lora_dir


@pytest.fixture
def load(sites, modules, base):
    return lambda directory: load_checkpoint(directory, TensorPlanner(sites, modules, base))


def edit_map(path, change):
    raw = json.loads(path.read_text())
    change(raw["weight_map"])
    path.write_text(json.dumps(raw))


def test_shards_are_read_as_one_file(lora_dir, plain_adapter, sharded, index, load, pack, sites, modules):
    whole, parts = load(plain_adapter), load(sharded)
    assert whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(tensor, parts.tensors[name]) for name, tensor in whole.tensors.items())
    assert torch.equal(pack(plain_adapter).data, pack(sharded).data)
    content = [(sharded / name).read_bytes() for name in ("adapter_config.json", index, *NAMES)]
    assert parts.digest == hashlib.sha256(b"".join(content)).hexdigest()
    assert {name: b"".join(pieces) for name, pieces in parts.files.items()} == dict(
        zip(("adapter_config.json", index, *NAMES), content, strict=True)
    )
    found = inspect_directory(sharded, sites, modules)
    assert found.problem is None and found.digest == parts.digest and found.num_tensors == 12


@pytest.mark.parametrize("name", NAMES)
def test_missing_shard_is_named(name, sharded, load):
    (sharded / name).unlink()
    for check in (load, lambda directory: check_complete(directory, ())):
        with pytest.raises(AdapterInvalidError, match=f"{name} is missing"):
            check(sharded)


@pytest.mark.parametrize("name", NAMES)
def test_half_copied_shard_is_named(name, sharded, load):
    (sharded / name).write_bytes((sharded / name).read_bytes()[:-10])
    with pytest.raises(AdapterInvalidError, match=f"{name}.*is the copy complete"):
        load(sharded)


def test_any_byte_changes_the_digest(sharded, index, load):
    digests = {load(sharded).digest}
    for name in NAMES:
        data = bytearray((sharded / name).read_bytes())
        data[-1] ^= 1
        (sharded / name).write_bytes(data)
        digests.add(load(sharded).digest)
    (sharded / index).write_text((sharded / index).read_text() + " ")
    digests.add(load(sharded).digest)
    assert len(digests) == 5


SPOILED = {
    "tensor_elsewhere": (lambda m: m.update({next(iter(m)): NAMES[2]}), "does not fit.*lora_A"),
    "tensor_nowhere": (lambda m: m.pop(next(iter(m))), "the index does not say so"),
    "tensor_made_up": (lambda m: m.update(x=NAMES[0]), "tensor 'x' is not in it"),
    "other_file": (lambda m: m.update(x="../secret.safetensors"), "must name all of the files"),
    "shard_left_out": (lambda m: [m.pop(k) for k in list(m) if m[k] == NAMES[1]], "must name all of the files"),
    "no_shard": (lambda m: m.clear(), "weight_map"),
    "not_a_name": (lambda m: m.update(x=3), "weight_map"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_index_that_lies_is_refused(name, sharded, index, load):
    change, message = SPOILED[name]
    edit_map(sharded / index, change)
    with pytest.raises(AdapterInvalidError, match=message):
        load(sharded)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"[" * 100_000, b'{"weight_map": []}'])
def test_index_that_is_none_is_refused(data, sharded, index, load):
    (sharded / index).write_bytes(data)
    with pytest.raises(AdapterInvalidError, match=index):
        load(sharded)


def test_nan_in_a_shard_is_named_by_tensor(sharded, load):
    tensors = load_file(sharded / NAMES[1])
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, sharded / NAMES[1])
    with pytest.raises(AdapterInvalidError, match="not finite") as error:
        load(sharded)
    assert error.value.metadata == {"tensor": name}
