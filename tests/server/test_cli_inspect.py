"""`lorikeet adapters inspect`: a table for people, JSON for scripts, and the exit status."""

import json
import shutil

import pytest
from lorikeet.adapters.card import CARD_FILE, HASH_KEY
from lorikeet.server.base.base_hash import hash_checkpoint
from lorikeet.server.base.checkpoint import BaseCheckpoint
from lorikeet.server.cli_inspect import inspect
from lorikeet.server.errors import BaseModelError

from ..tiny import save_tiny_adapter


@pytest.fixture
def cedar(tiny_adapters, tmp_path):
    """A copy of an adapter of rank 8 on all 14 linears, to be spoiled."""
    return shutil.copytree(tiny_adapters / "cedar", tmp_path / "cedar")


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cells(text, kind):
    [line] = [line.split() for line in text.splitlines() if line.startswith(f"{kind} ")]
    return line


def test_table_shows_what_a_server_would_apply(cedar, capsys):
    assert inspect(cedar, None, False) == 0
    text = capsys.readouterr().out
    assert "method         LoRA\n" in text and "modules        14, of rank 8 at most\n" in text
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        _, count, rank, scaling, least, to, greatest = cells(text, kind)
        assert (count, rank, scaling, to) == ("2", "8", "1", "to") and 0 < float(least) < float(greatest)
    assert "--model" in text.splitlines()[-1]


def test_layers_that_differ_are_shown_as_ranges(tiny_model, tmp_path, capsys):
    save_tiny_adapter(tiny_model, tmp_path, seed=1, rank=4, alpha=8)
    edit_config(tmp_path, alpha_pattern={"layers.0.self_attn.q_proj": 2})
    assert inspect(tmp_path, None, False) == 0
    text = capsys.readouterr().out
    assert cells(text, "q_proj")[:6] == ["q_proj", "2", "4", "0.5", "to", "2"]
    assert cells(text, "k_proj")[:4] == ["k_proj", "2", "4", "2"]


def test_base_is_compared_without_loading_it(cedar, tiny_model, capsys):
    assert inspect(cedar, str(tiny_model), False) == 0
    text = capsys.readouterr().out
    assert hash_checkpoint(BaseCheckpoint(tiny_model)) in text
    assert text.splitlines()[-1] == "The files are in order, and names and shapes fit the base."


def test_base_without_weights_is_enough_for_names_and_shapes(cedar, tiny_model, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_model / "config.json", bare)
    edit_config(cedar, base_model_name_or_path=str(bare))
    assert inspect(cedar, str(bare), False) == 0
    assert "unknown, its weights are not on this machine" in capsys.readouterr().out


def test_adapter_for_another_shape_is_refused(cedar, tiny_model, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((tiny_model / "config.json").read_text()) | {"hidden_size": 256, "head_dim": 64}
    (other / "config.json").write_text(json.dumps(config))
    assert inspect(cedar, str(other), False) == 2
    captured = capsys.readouterr()
    assert "ADAPTER_INCOMPATIBLE" in captured.err and "to 256 features" in captured.err
    assert cells(captured.out, "q_proj")[2] == "8"  # what was found is shown all the same


def test_card_with_another_hash_is_refused(cedar, tiny_model, capsys):
    (cedar / CARD_FILE).write_text(f"---\n{HASH_KEY}: {'ab' * 32}\n---\n")
    assert inspect(cedar, str(tiny_model), False) == 2
    captured = capsys.readouterr()
    assert f"with hash    {'ab' * 32}" in captured.out and "--adapter-allow-other-base" in captured.err


def test_warnings_are_shown(cedar, capsys):
    (cedar / CARD_FILE).write_text(f"---\n{HASH_KEY}: abc\n---\n")
    assert inspect(cedar, None, False) == 0
    assert "warning: README.md gives base_model_sha256 as 'abc'; it must be 64 hex digits" in capsys.readouterr().out


def test_json_has_every_module(cedar, tiny_model, capsys):
    assert inspect(cedar, str(tiny_model), True) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["modules"]) == 14 and len(found["version"]) == 64
    module = found["modules"]["model.layers.1.mlp.down_proj"]
    assert module["rank"] == 8 and module["scaling"] == 1.0 and module["delta_norm"] > 0
    assert found["base"]["sha256"] == hash_checkpoint(BaseCheckpoint(tiny_model))
    assert found["checked_against_base"] and found["problem"] is None and found["golden"] is None


def test_json_says_why_a_server_would_refuse(cedar, capsys):
    edit_config(cedar, use_qalora=True)
    assert inspect(cedar, None, True) == 2
    captured = capsys.readouterr()
    problem = json.loads(captured.out)["problem"]
    assert problem["reason"] == "ADAPTER_INCOMPATIBLE" and "use_qalora" in problem["message"]


def test_folder_that_is_not_there_is_a_problem(tmp_path, capsys):
    assert inspect(tmp_path / "nowhere", None, False) == 2
    assert "ADAPTER_INVALID" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["nowhere", "./no/such/folder"])
def test_base_that_is_not_there_is_an_error(cedar, model):
    with pytest.raises(BaseModelError, match="neither an existing directory nor a hub id"):
        inspect(cedar, model, False)
