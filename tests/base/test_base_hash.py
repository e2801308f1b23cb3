"""The hash of a base is that of its content: not of its shards, its files' names, its place or its metadata."""

import json
import secrets
import shutil
import struct

import pytest
import torch
from lorikeet.server.base import base_hash
from lorikeet.server.base.base_hash import SAMPLE_BYTES, hash_checkpoint, identify_base
from lorikeet.server.base.checkpoint import BaseCheckpoint
from lorikeet.server.base.loader import load_base, outline_base
from lorikeet.server.errors import BaseModelError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from .family_models import VOCAB, save_family


def save_checkpoint(directory, tensors, shards=1, metadata=None):
    """Save tensors as a sharded checkpoint, in an order and with metadata of its own."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    names = sorted(tensors, key=lambda name: secrets.token_hex(4))
    weight_map = {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, directory / file, metadata)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def hash_of(directory):
    return hash_checkpoint(BaseCheckpoint(directory))


@pytest.fixture
def tensors():
    shapes = {"a": (3, 5), "b": (64, 700), "model.layers.0.q.weight": (2, 2), "empty": (0,), "scalar": ()}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def test_hash_does_not_depend_on_shards_metadata_or_place(tensors, tmp_path):
    expected = hash_of(save_checkpoint(tmp_path / "one", tensors))
    assert len(expected) == 64 and set(expected) <= set("0123456789abcdef")
    for shards, metadata in ((1, {"format": "pt"}), (2, None), (4, {"x": "y" * 999})):
        directory = save_checkpoint(tmp_path / str(shards) / secrets.token_hex(4), tensors, shards, metadata)
        assert hash_of(directory) == expected


CHANGES = {
    "a value at the beginning": lambda t: t["b"].view(-1)[0].add_(1),
    "a value at the end": lambda t: t["b"].view(-1)[-1].add_(1),
    "a value of the smallest": lambda t: t["scalar"].add_(1),
    "a name": lambda t: t.update(c=t.pop("a")),
    "a shape": lambda t: t.update(a=t["a"].t().contiguous()),
    "a type": lambda t: t.update(a=t["a"].view(torch.float16)),
    "one tensor more": lambda t: t.update(c=torch.zeros(1)),
    "one tensor less": lambda t: t.pop("empty"),
    "two tensors swapped": lambda t: t.update(a=t["b"], b=t["a"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_hash_depends_on_the_content(change, tensors, tmp_path):
    before = hash_of(save_checkpoint(tmp_path / "before", tensors))
    change(tensors)
    assert hash_of(save_checkpoint(tmp_path / "after", tensors)) != before


def test_reads_are_bounded_by_the_number_of_samples(tmp_path, monkeypatch):
    sizes = []

    def pread(descriptor, size, offset, real=base_hash.os.pread):
        sizes.append(size)
        return real(descriptor, size, offset)

    monkeypatch.setattr(base_hash.os, "pread", pread)
    monkeypatch.setattr(base_hash, "MAX_SAMPLED", 10)
    tensors = {f"experts.{i:03}": torch.randn(20_000) for i in range(95)}
    before = hash_of(save_checkpoint(tmp_path / "before", tensors))
    assert len(sizes) <= 20 and max(sizes) == SAMPLE_BYTES
    tensors["experts.000"][0] += 1
    assert hash_of(save_checkpoint(tmp_path / "after", tensors)) != before
    tensors["experts.001"] = tensors["experts.001"][:-1].clone()
    tensors["experts.000"][0] -= 1
    assert hash_of(save_checkpoint(tmp_path / "shape", tensors)) != before


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 8, struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b'{"a"',
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(64),
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-9,4]}}'.ljust(64) + b"1234",
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":null,"data_offsets":[0,4]}}'.ljust(64) + b"1234",
        struct.pack("<Q", 10_000) + b"[" * 10_000,
    ],
)  # fmt: skip
def test_damaged_file_is_refused_by_name(content, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BaseModelError, match=r"model\.safetensors is truncated or damaged"):
        hash_of(tmp_path)


def test_file_that_cannot_be_read_is_refused(tensors, tmp_path, monkeypatch):
    checkpoint = BaseCheckpoint(save_checkpoint(tmp_path / "one", tensors))

    def fail(descriptor, size, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(base_hash.os, "pread", fail)
    with pytest.raises(BaseModelError, match="Input/output error"):
        hash_checkpoint(checkpoint)


def test_name_is_the_most_certain_one(tensors, tmp_path):
    directory = save_checkpoint(tmp_path / "my-model", tensors)
    checkpoint = BaseCheckpoint(directory)
    sha256 = hash_of(directory)

    named = identify_base(str(directory), "org/public", directory, checkpoint)
    assert (named.name, named.certain, named.sha256) == ("org/public", True, sha256)
    from_hub = identify_base("org/hub", "", directory, None)
    assert (from_hub.name, from_hub.certain, from_hub.sha256) == ("org/hub", True, "")
    local = identify_base(str(directory), "", directory, checkpoint)
    assert (local.name, local.certain) == (str(directory), False)

    (directory / "config.json").write_text(json.dumps({"_name_or_path": "org/original"}))
    saved = identify_base(str(directory), "", directory, checkpoint)
    assert (saved.name, saved.certain) == ("org/original", True)
    assert saved.matches("me/my-model") and saved.matches("org/original-bnb-4bit") and not saved.matches("org/other")
    for useless in ("/data/original", "", None, 7, "./original"):
        (directory / "config.json").write_text(json.dumps({"_name_or_path": useless}))
        assert identify_base(str(directory), "", directory, checkpoint).name == str(directory)


def test_loaded_base_has_the_hash_of_its_source_with_and_without_the_cache(tmp_path):
    save_family("llama", tmp_path / "model")
    expected = hash_of(tmp_path / "model")
    options = {"device": torch.device("cpu"), "compute_dtype": torch.float32, "progress": False}
    for _ in range(2):  # the second reads the cache
        base = load_base(str(tmp_path / "model"), cache_dir=tmp_path / "cache", **options)
        assert base.fingerprint.sha256 == expected
    outline = outline_base(str(tmp_path / "model"), tmp_path / "model")
    assert outline.fingerprint == base.fingerprint
    assert outline.site_table.sites == base.site_table.sites
    assert outline.module_table == base.module_table
    assert outline.vocab_size == base.vocab_size == VOCAB


def test_outline_needs_no_weights(tmp_path):
    save_family("phi3", tmp_path / "model")
    whole = outline_base("x", tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    outline = outline_base("x", tmp_path / "model")
    assert outline.site_table.sites == whole.site_table.sites
    assert outline.module_table == whole.module_table
    assert whole.fingerprint.sha256 and not outline.fingerprint.sha256


def test_quantized_copy_is_another_base(tmp_path):
    save_family("llama", tmp_path / "model")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=settings, device_map="cpu")
    model.save_pretrained(tmp_path / "copy")
    shutil.copy(tmp_path / "model" / "tokenizer.json", tmp_path / "copy")
    assert any("quant_state" in name for name in load_file(tmp_path / "copy" / "model.safetensors"))
    assert hash_of(tmp_path / "copy") != hash_of(tmp_path / "model")
