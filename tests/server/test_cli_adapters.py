"""`lorikeet adapters ...` against a server with fakes below, on a thread of its own: what is asked, what is printed."""

import dataclasses
import json

import pytest
from lorikeet.adapters.errors import AdapterInUseError
from lorikeet.adapters.info import LoadOptions, Tier
from lorikeet.server import cli

from .fake_manager import KJV, OLD_KJV
from .fakes import OnlyAccess, serve_on_thread

DEVIL = dataclasses.replace(KJV, adapter_id="devil", aliases=(), pinned=None)


@pytest.fixture
def lorikeet(address, capsys):
    """Runs `lorikeet adapters ...`, which must succeed; what it printed."""

    def run(*arguments):
        *command, last = arguments
        assert cli.run(["adapters", *command, last, "--address", address]) == 0
        return capsys.readouterr().out

    return run


def table(text):
    """Rows of a table as dicts; cells are two or more spaces apart, and may be empty."""
    header, *rows = text.splitlines()
    names = [name for name in header.split("  ") if name]
    starts = [header.index(name.strip()) for name in names]
    ends = [*starts[1:], None]
    return [
        {name.strip(): row[start:end].strip() for name, start, end in zip(names, starts, ends, strict=True)}
        for row in rows
    ]


def test_list_has_pin_and_aliases_if_there_are_any(lorikeet, manager):
    manager.infos = [KJV, DEVIL]
    devil, kjv = table(lorikeet("list"))
    assert kjv == {
        "ADAPTER": "kjv", "STATE": "ready", "TIER": "device", "PIN": "host", "RANK": "8", "SIZE": "0.0 MiB",
        "IN FLIGHT": "3", "VERSION": "d" * 12, "ALIASES": "prod, secret-alias", "FOLDER": "kjv-folder",
    }  # fmt: skip
    assert (devil["PIN"], devil["ALIASES"]) == ("", "")
    manager.infos = [DEVIL]
    [row] = table(lorikeet("list"))
    assert {"PIN", "ALIASES"}.isdisjoint(row)
    manager.infos = []
    assert lorikeet("list") == "no adapters\n"


def test_list_as_json(lorikeet):
    adapters = json.loads(lorikeet("list", "--json"))
    assert [(adapter["adapter_id"], adapter["current"]) for adapter in adapters] == [("kjv", True), ("kjv", False)]


def test_get_prints_the_adapter_its_versions_and_its_slices(lorikeet):
    head, versions, slices = lorikeet("get", "kjv").split("\n\n")
    values = {line[:10].strip(): line[11:] for line in head.splitlines()}
    assert values == {
        "adapter": "kjv", "version": "d" * 64, "state": "ready", "tier": "device", "pinned": "host",
        "aliases": "prod, secret-alias", "in flight": "3", "size": "0.0 MiB", "rank": "8", "modules": "14",
        "method": "rsLoRA", "base": "org/base", "folder": "kjv-folder", "loaded": "2023-11-14 22:13:20Z",
        "proof": "2 prompts replayed", "warning": "another base",
    }  # fmt: skip
    *rows, note = versions.splitlines()
    current, old = table("\n".join(rows))
    assert current == {
        "VERSION": "d" * 12, "CURRENT": "yes", "STATE": "ready", "TIER": "device", "PIN": "host",
        "ALIASES": "prod, secret-alias", "IN FLIGHT": "3", "SIZE": "0.0 MiB", "RANK": "8", "METHOD": "rsLoRA",
        "LOADED": "2023-11-14 22:13:20Z",
    }  # fmt: skip
    assert (old["VERSION"], old["CURRENT"], old["STATE"], old["TIER"]) == ("0" * 12, "", "stored", "disk")
    assert note == "000000000000 error: It was replaced."
    assert table(slices) == [
        {"MODULE": "q_proj", "RANK": "4", "SCALING": "0.5"},
        {"MODULE": "v_proj", "RANK": "8", "SCALING": "2"},
    ]


def test_get_of_one_version_and_as_json(lorikeet):
    assert f"version    {OLD_KJV.digest}\n" in lorikeet("get", "kjv@0000")
    response = json.loads(lorikeet("get", "--json", "kjv"))
    assert [version["version"] for version in response["versions"]] == [KJV.digest, OLD_KJV.digest]
    assert response["adapter"]["pinned_tier"] == "ADAPTER_TIER_HOST"


def test_load_passes_every_flag(lorikeet, manager):
    assert "adapter    new\n" in lorikeet("load", "new")
    lorikeet("load", "new", "--path", "sub/x", "--expected-version", "A" * 64)
    lorikeet("load", "new", "--source", "hf://org/x@main", "--allow-zero", "--allow-other-base")
    plain, path, source = manager.calls
    assert plain == ("load", "new", None, LoadOptions())
    assert (str(path[2]), path[3]) == ("sub/x", LoadOptions(expected_digest="a" * 64))
    assert source == ("load", "new", "hf://org/x@main", LoadOptions(allow_zero=True, allow_other_base=True))
    assert json.loads(lorikeet("load", "new", "--json"))["adapter_id"] == "new"


def test_path_and_source_exclude_each_other(lorikeet, capsys):
    with pytest.raises(SystemExit, match="2"):
        lorikeet("load", "new", "--path", "x", "--source", "s3://b/x")
    assert "not allowed with" in capsys.readouterr().err


def test_dry_run_says_whether_it_fits_and_what_goes(lorikeet, manager):
    text = lorikeet("load", "new", "--dry-run")
    assert text.endswith(
        "\nnew can be loaded; nothing has been changed. The content is new.\n"
        "host        1.0 MiB  does not fit now: what runs or is pinned holds the memory, and a request would wait\n"
        "device      3.0 MiB  fits, and these copies would go:\n"
        "                     devil@eeeeeeeeeeee\n"
        "                     secret@ffffffffffff\n"
    )
    assert text.startswith("adapter    new\n")
    assert manager.infos == [KJV, OLD_KJV]
    plan = json.loads(lorikeet("load", "new", "--dry-run", "--json"))["plan"]
    assert (plan["fits_host"], plan["fits_device"], plan["host_bytes"]) == (False, True, str(2**20))


def test_dry_run_prints_no_name_that_the_client_may_not_see(manager, capsys):
    access = OnlyAccess(manages=["new"], sees=["devil"])
    with serve_on_thread(manager=manager, access=access) as address:
        assert cli.run(["adapters", "load", "new", "--dry-run", "--address", address]) == 0
    text = capsys.readouterr().out
    assert "an adapter that this client may not see\n" in text
    assert "secret" not in text


def test_unload(lorikeet, manager):
    assert lorikeet("unload", "kjv") == "unloaded kjv\n"
    assert manager.infos == []


def test_rollback_to_the_one_before_or_to_a_version(lorikeet, manager):
    assert f"version    {OLD_KJV.digest}\n" in lorikeet("rollback", "kjv")
    lorikeet("rollback", "kjv", "00000000")
    assert manager.calls == [("rollback", "kjv", ""), ("rollback", "kjv", "00000000")]


def test_prefetch_pin_and_unpin(lorikeet, manager):
    assert "tier       device\n" in lorikeet("prefetch", "kjv@dddd")
    assert "pinned     host\n" in lorikeet("pin", "kjv", "--tier", "host")
    assert "pinned     device\n" in lorikeet("pin", "kjv")
    assert "pinned" not in lorikeet("unpin", "kjv")
    assert [call[:3] for call in manager.calls] == [
        ("prefetch", "kjv@dddd", Tier.DEVICE),
        ("pin", "kjv", Tier.HOST),
        ("pin", "kjv", Tier.DEVICE),
        ("unpin", "kjv"),
    ]


def test_alias_is_set_listed_and_deleted(lorikeet, manager):
    assert lorikeet("alias", "list") == "no aliases\n"
    rows = table(lorikeet("alias", "set", "prod", "kjv@dddd=9", "kjv@0000"))
    assert rows == [
        {"ALIAS": "prod", "SHARE": "90.0%", "WEIGHT": "9", "ADAPTER": "kjv", "VERSION": "d" * 12},
        {"ALIAS": "prod", "SHARE": "10.0%", "WEIGHT": "1", "ADAPTER": "kjv", "VERSION": "0" * 12},
    ]
    assert manager.calls[-1] == ("set_alias", "prod", [("kjv@dddd", 9.0), ("kjv@0000", 1.0)])
    lorikeet("alias", "set", "all", "kjv")
    assert [row["ALIAS"] for row in table(lorikeet("alias", "list"))] == ["all", "prod", "prod"]
    assert [alias["name"] for alias in json.loads(lorikeet("alias", "list", "--json"))] == ["all", "prod"]
    assert json.loads(lorikeet("alias", "set", "all", "kjv", "--json"))["targets"][0]["version"] == KJV.digest
    assert lorikeet("alias", "delete", "prod") == "deleted prod\n"
    assert list(manager.aliases) == ["all"]


@pytest.mark.parametrize("target", ["kjv=0", "kjv=-1", "kjv=", "kjv=nan", "kjv=inf", "kjv=x", "=1", "", "kjv=1=2"])
def test_target_with_a_bad_weight_is_refused_before_anything_is_sent(lorikeet, manager, capsys, target):
    with pytest.raises(SystemExit, match="2"):
        lorikeet("alias", "set", "prod", target)
    assert "is no target; give an id or id@digest-prefix" in capsys.readouterr().err
    assert manager.calls == []


def test_target_given_twice_is_refused(address, capsys):
    assert cli.run(["adapters", "alias", "set", "prod", "kjv", "kjv=2", "--address", address]) == 1
    assert "name each version once" in capsys.readouterr().err


def test_error_of_the_server_is_one_line_and_status_1(address, manager, capsys):
    manager.fail = AdapterInUseError("Adapter 'kjv' is pinned; unpin it first.")
    assert cli.run(["adapters", "unload", "kjv", "--address", address]) == 1
    assert capsys.readouterr().err == (
        "lorikeet: FAILED_PRECONDITION (ADAPTER_IN_USE): Adapter 'kjv' is pinned; unpin it first.\n"
    )
