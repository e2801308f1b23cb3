"""Bad adapter folders: each is refused with the tensor or file and the reason, and nothing else is read."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from lorikeet.adapters.checkpoint import check_complete, load_checkpoint
from lorikeet.adapters.errors import (
    AdapterIncompatibleError,
    AdapterInvalidError,
    AdapterMemoryError,
    ServingError,
)
from lorikeet.adapters.fingerprint import BaseFingerprint
from lorikeet.adapters.inspection import inspect_directory
from lorikeet.adapters.sites import Site, SiteTable, Slice
from lorikeet.adapters.tensor_plan import TensorPlanner

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def load(sites, modules, base):
    return lambda directory, **kwargs: load_checkpoint(directory, TensorPlanner(sites, modules, base), **kwargs)


def write_raw(path, header, payload=b""):
    """A safetensors file with any header."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + payload)


def test_digest_is_of_config_and_weights(lora_dir, load):
    content = b"".join((lora_dir / name).read_bytes() for name in ("adapter_config.json", WEIGHTS))
    assert load(lora_dir).digest == hashlib.sha256(content).hexdigest()


def test_digest_changes_with_the_config_alone(lora_dir, load, edit_config):
    before = load(lora_dir).digest
    edit_config(lora_dir, lora_alpha=9)
    assert load(lora_dir).digest != before


def test_tensors_are_those_of_the_file(lora_dir, load):
    from safetensors.torch import load_file

    tensors = load_file(lora_dir / WEIGHTS)
    checkpoint = load(lora_dir)
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in tensors.items())
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    assert checkpoint.placement.lora["model.layers.1.mlp.down_proj"].lora_a.name == name


def _rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def _add(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def _set(name, value):
    return lambda tensors: tensors[name].view(-1).__setitem__(3, value)


SPOILED_TENSORS = {
    "lora_A_without_lora_B": (lambda t: t.pop(f"{Q0}.lora_B.weight"), "lora_A.*has no lora_B"),
    "lora_B_without_lora_A": (lambda t: t.pop(f"{Q0}.lora_A.weight"), "lora_B.*has no lora_A"),
    "nan": (_set(f"{Q0}.lora_A.weight", float("nan")), r"q_proj\.lora_A.*not finite"),
    "infinity": (_set(f"{Q0}.lora_B.weight", float("inf")), r"q_proj\.lora_B.*not finite"),
    "wrong_rank": (_add(f"{Q0}.lora_A.weight", torch.ones(5, 32)), r"lora_A.*rank 5.*rank 4"),
    "wrong_rank_of_b": (_add(f"{Q0}.lora_B.weight", torch.ones(32, 3)), r"lora_B.*rank 3.*rank 4"),
    "wrong_input_width": (_add(f"{Q0}.lora_A.weight", torch.ones(4, 64)), r"lora_A.*\[4, 64\].*maps 32 to 32"),
    "wrong_output_width": (_add(f"{Q0}.lora_B.weight", torch.ones(48, 4)), r"lora_B.*\[48, 4\].*maps 32 to 32"),
    "not_a_matrix": (_add(f"{Q0}.lora_A.weight", torch.ones(4, 32, 1)), r"lora_A.*must be a matrix"),
    "unknown_module": (
        lambda t: (
            _rename(f"{Q0}.lora_A.weight", f"{Q0}x.lora_A.weight")(t),
            _rename(f"{Q0}.lora_B.weight", f"{Q0}x.lora_B.weight")(t),
        ),
        "q_projx.*the base has no linear",
    ),
    "wrong_prefix": (
        lambda t: [_rename(n, n.replace("base_model.model.model.", "base_model.model."))(t) for n in list(t)],
        "the base has no linear 'layers",
    ),
    "dora_magnitude": (_add(f"{Q0}.lora_magnitude_vector", torch.ones(32)), "lora_magnitude_vector.*DoRA"),
    "bias_of_base": (_add(f"{Q0}.base_layer.bias", torch.ones(32)), "bias.*is 'none' in the config"),
    "bias_of_lora_B": (_add(f"{Q0}.lora_B.bias", torch.ones(32)), "lora_B.bias.*bias"),
    "bias_of_named_lora_B": (_add(f"{Q0}.lora_B.default.bias", torch.ones(32)), "lora_B.default.bias.*bias"),
    "embedding_lora": (
        _add("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 64)),
        "lora_embedding_A.*embedding",
    ),
    "lm_head_lora": (
        lambda t: (
            _add("base_model.model.lm_head.lora_A.weight", torch.ones(4, 32))(t),
            _add("base_model.model.lm_head.lora_B.weight", torch.ones(64, 4))(t),
        ),
        r"lm_head.*target_modules does not name",
    ),
    "extended_vocabulary": (
        _add("base_model.model.model.embed_tokens.weight", torch.ones(70, 32)),
        "embed_tokens.weight.*rows for 70 tokens and the head for 64",
    ),
    "extended_head": (
        _add("base_model.model.lm_head.weight", torch.ones(70, 32)),
        "lm_head.weight.*and the head for 70",
    ),
    "modules_to_save": (
        _add("base_model.model.score.modules_to_save.default.weight", torch.ones(2, 32)),
        "modules_to_save.*the base has no module 'score'",
    ),
    "trainable_tokens": (
        _add("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(2, 32)),
        "trainable_tokens_delta.*does not name tokens",
    ),
    "adalora_tensor_in_lora": (_add(f"{Q0}.lora_E", torch.ones(4, 1)), "lora_E.*AdaLoRA"),
    "other_method": (_add(f"{Q0}.vera_lambda_b", torch.ones(4)), "vera_lambda_b.*no tensor of a format"),
    "two_adapters_in_one_file": (
        _add(f"{Q0}.lora_A.second.weight", torch.ones(4, 32)),
        "both lora_A of the same module",
    ),
    "missing_target": (
        lambda t: [t.pop(n) for n in list(t) if "layers.2.mlp.down_proj" in n],
        r"targets model\.layers\.2\.mlp\.down_proj, but the file has no tensors",
    ),
    "not_targeted": (
        lambda t: [_rename(n, n.replace("q_proj", "o_proj"))(t) for n in list(t) if "layers.0" in n],
        "o_proj.*target_modules does not name",
    ),
    "no_tensors": (lambda t: t.clear(), "no module would be adapted"),
    "float64": (_add(f"{Q0}.lora_A.weight", torch.ones(4, 32, dtype=torch.float64)), "lora_A.*type F64"),
    "int8": (_add(f"{Q0}.lora_A.weight", torch.ones(4, 32, dtype=torch.int8)), "lora_A.*type I8"),
}


@pytest.mark.parametrize(("change", "message"), SPOILED_TENSORS.values(), ids=SPOILED_TENSORS)
def test_spoiled_tensor_is_refused_by_name(change, message, lora_dir, edit_tensors, load):
    edit_tensors(lora_dir, change)
    with pytest.raises((AdapterInvalidError, AdapterIncompatibleError), match=message):
        load(lora_dir)


def test_layers_to_transform_explains_missing_tensors(lora_dir, edit_tensors, edit_config, load):
    edit_tensors(lora_dir, lambda t: [t.pop(n) for n in list(t) if "layers.0" not in n])
    edit_config(lora_dir, layers_to_transform=[0])
    assert len(load(lora_dir).placement.lora) == 2


def test_target_that_the_base_lacks_altogether_is_no_error(lora_dir, edit_config, load):
    edit_config(lora_dir, target_modules=["q_proj", "down_proj", "c_attn"])
    assert len(load(lora_dir).placement.lora) == 6


def test_null_target_modules_takes_what_the_file_has(lora_dir, edit_config, load):
    edit_config(lora_dir, target_modules=None)
    assert len(load(lora_dir).placement.lora) == 6


def test_other_base_is_named_when_shapes_do_not_fit(lora_dir, edit_config, modules):
    other = SiteTable(
        [Site(0, "model.layers.0.self_attn.q_proj", 0, 64, (Slice("model.layers.0.self_attn.q_proj", 64),))]
    )
    edit_config(lora_dir, base_model_name_or_path="meta-llama/Llama-3-8B", target_modules=None)
    with pytest.raises(AdapterIncompatibleError, match=r"trained for 'llama-3-8b'; this server's base is 'smollm2'"):
        load_checkpoint(lora_dir, TensorPlanner(other, modules, BaseFingerprint("/models/SmolLM2")))


@pytest.mark.parametrize(
    ("served", "trained_for", "matches"),
    [
        ("meta-llama/Llama-3-8B", "unsloth/llama-3-8b-bnb-4bit", True),
        ("/data/models/Llama-3-8B/", "meta-llama/Llama-3-8B", True),
        ("", "anything", True),
        ("Llama-3-8B", None, True),
        ("Llama-3-8B", "mistralai/Mistral-7B-v0.1", False),
    ],
)
def test_base_names_are_compared_loosely(served, trained_for, matches):
    assert BaseFingerprint(served).matches(trained_for) is matches


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_missing_file_is_refused_by_name(name, lora_dir, load):
    (lora_dir / name).unlink()
    with pytest.raises(AdapterInvalidError, match=f"{name} is missing"):
        load(lora_dir)


def test_empty_folder_is_refused(tmp_path, load):
    with pytest.raises(AdapterInvalidError, match=r"adapter_config\.json is missing"):
        load(tmp_path)


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", WEIGHTS])
def test_pickle_is_refused_by_name_and_never_opened(name, lora_dir, load, tmp_path):
    bomb = _Bomb()
    bomb.path = str(tmp_path / "exploded")
    (lora_dir / WEIGHTS).unlink()
    (lora_dir / name).write_bytes(pickle.dumps(bomb))
    with pytest.raises(AdapterInvalidError, match=f"{name}.*pickle"):
        load(lora_dir)
    assert not (tmp_path / "exploded").exists()


def test_training_leftovers_beside_safetensors_are_ignored(lora_dir, load):
    (lora_dir / "optimizer.pt").write_bytes(b"x")
    (lora_dir / "training_args.bin").write_bytes(b"x")
    load(lora_dir)


BROKEN_FILES = {
    "empty": (b"", "not a safetensors file"),
    "few_bytes": (b"abc", "not a safetensors file"),
    "zip": (b"PK\x03\x04" + b"\0" * 100, "pickled torch checkpoint"),
    "git_lfs_pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs pointer"),
    "huge_header": (struct.pack("<Q", 2**60) + b"{}", "not a safetensors file"),
    "header_cut": (struct.pack("<Q", 1000) + b'{"a"', "ends inside its header"),
    "header_not_json": (struct.pack("<Q", 4) + b"{{{{", "not JSON"),
    "header_not_object": (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
    "header_nested": (struct.pack("<Q", 100_000) + b"[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_broken_weights_file_is_refused(data, message, lora_dir, load):
    (lora_dir / WEIGHTS).write_bytes(data)
    with pytest.raises(AdapterInvalidError, match=message):
        load(lora_dir)


ENTRY = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}
BAD_ENTRIES = {
    "no_dtype": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "entry_not_object": {"a": 3},
    "negative_offset": {"a": ENTRY | {"data_offsets": [-8, 0]}},
    "reversed_offsets": {"a": ENTRY | {"data_offsets": [8, 0]}},
    "absurd_shape": {"a": ENTRY | {"shape": [2**62, 2**62]}},
    "wrong_size": {"a": ENTRY | {"shape": [3, 3]}},
    "boolean_shape": {"a": ENTRY | {"shape": [True, 2]}},
    "overlap": {"a": ENTRY, "b": ENTRY},
    "hole": {"a": ENTRY | {"data_offsets": [4, 12]}},
    "beyond_the_file": {"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 16]}},
}


@pytest.mark.parametrize("header", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_header_that_lies_is_refused_before_the_payload_is_read(header, lora_dir, load):
    write_raw(lora_dir / WEIGHTS, header, b"\0" * 8)
    with pytest.raises(AdapterInvalidError, match=WEIGHTS):
        load(lora_dir)


@pytest.mark.parametrize("cut", [1, 100, 2000])
def test_half_copied_file_is_refused(cut, lora_dir, load, tmp_path):
    data = (lora_dir / WEIGHTS).read_bytes()
    (lora_dir / WEIGHTS).write_bytes(data[:-cut])
    with pytest.raises(AdapterInvalidError, match="is the copy complete"):
        load(lora_dir)
    with pytest.raises(AdapterInvalidError, match="is the copy complete"):
        check_complete(lora_dir, ())
    (lora_dir / WEIGHTS).write_bytes(data)
    check_complete(lora_dir, ())


def test_trailing_bytes_are_refused(lora_dir, load):
    with (lora_dir / WEIGHTS).open("ab") as file:
        file.write(b"x")
    with pytest.raises(AdapterInvalidError, match="announces"):
        load(lora_dir)


def test_adapter_larger_than_the_memory_is_refused_before_it_is_read(lora_dir, load):
    with pytest.raises(AdapterMemoryError, match="elements"):
        load(lora_dir, max_elements=100)


def test_file_outside_the_roots_is_refused_although_linked(lora_dir, load, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.move(lora_dir / WEIGHTS, outside / WEIGHTS)
    (lora_dir / WEIGHTS).symlink_to(outside / WEIGHTS)
    with pytest.raises(AdapterInvalidError, match="leads out of"):
        load(lora_dir, roots=[lora_dir.parent])
    load(lora_dir)


def test_link_inside_the_roots_is_followed(lora_dir, load):
    blobs = lora_dir.parent / "blobs"
    blobs.mkdir()
    shutil.move(lora_dir / WEIGHTS, blobs / "abc")
    (lora_dir / WEIGHTS).symlink_to(blobs / "abc")
    load(lora_dir, roots=[lora_dir.parent])


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_pipe_or_directory_in_place_of_a_file_is_refused_without_waiting(name, lora_dir, load):
    (lora_dir / name).unlink()
    os.mkfifo(lora_dir / name)
    with pytest.raises(AdapterInvalidError, match="regular file"):
        load(lora_dir)
    (lora_dir / name).unlink()
    (lora_dir / name).mkdir()
    with pytest.raises(AdapterInvalidError, match=name):
        load(lora_dir)


def test_adalora_with_wrong_singular_values_is_refused(tmp_path, save_adapter, edit_tensors, load):
    from peft import AdaLoraConfig

    save_adapter(AdaLoraConfig(init_r=3, target_modules=["q_proj"], total_step=5, task_type="CAUSAL_LM"), tmp_path)
    load(tmp_path)
    edit_tensors(tmp_path, _add(f"{Q0}.lora_E", torch.ones(2, 1)))
    with pytest.raises(AdapterInvalidError, match=r"lora_E.*must be \[3, 1\]"):
        load(tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop(f"{Q0}.lora_E"))
    with pytest.raises(AdapterInvalidError, match="has no lora_E"):
        load(tmp_path)


def test_error_messages_never_show_where_a_root_lies(lora_dir, load, edit_tensors):
    for name in (WEIGHTS, "adapter_config.json"):
        (lora_dir / name).unlink()
        with pytest.raises(ServingError) as error:
            load(lora_dir)
        assert str(lora_dir.parent) not in error.value.message


def test_inspection_reports_a_good_adapter(lora_dir, sites, modules, base, load):
    result = inspect_directory(lora_dir, sites, modules, base)
    assert result.problem is None and result.checked_against_base
    assert result.digest == load(lora_dir).digest
    assert result.num_tensors == 12
    assert result.report is not None and result.report.slices == {"q_proj": (4, 2.0), "down_proj": (4, 2.0)}


def test_inspection_without_a_base_checks_the_files_alone(lora_dir):
    result = inspect_directory(lora_dir, None)
    assert result.problem is None and not result.checked_against_base and result.report is not None


def test_inspection_reports_a_bad_adapter_with_what_it_found(lora_dir, sites, modules, edit_tensors):
    edit_tensors(lora_dir, _set(f"{Q0}.lora_A.weight", float("nan")))
    result = inspect_directory(lora_dir, sites, modules)
    assert result.problem is not None and "not finite" in result.problem.message
    assert result.report is not None and result.digest
    (lora_dir / WEIGHTS).unlink()
    assert inspect_directory(lora_dir, sites, modules).report is None


def test_files_replaced_one_by_one_are_not_taken_for_an_adapter(lora_dir, edit_config, load):
    def replace_weights() -> None:
        weights = lora_dir / WEIGHTS
        fresh = lora_dir / f"{WEIGHTS}.new"
        fresh.write_bytes(weights.read_bytes())
        os.replace(fresh, weights)

    edit_config(lora_dir, lora_alpha=3)  # the new configuration is there, the new weights come while we read
    threading.Timer(0.1, replace_weights).start()
    with pytest.raises(AdapterInvalidError, match=f"{WEIGHTS} changed while the adapter was read"):
        load(lora_dir, settle_s=0.4)
    load(lora_dir, settle_s=0.4)


def test_files_that_were_left_alone_are_not_waited_for(lora_dir, load, monkeypatch):
    waits = []
    now = time.time()
    monkeypatch.setattr("lorikeet.adapters.checkpoint.time", SimpleNamespace(time=lambda: now, sleep=waits.append))
    load(lora_dir, settle_s=30.0)
    now += 60.0
    load(lora_dir, settle_s=30.0)
    now -= 120.0  # a file server whose clock is ahead
    load(lora_dir, settle_s=30.0)
    assert 0.0 < waits[0] <= 30.0 and waits[1:] == [0.0, 30.0]
