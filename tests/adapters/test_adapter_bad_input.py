"""Folders that change while they are read, links out of the root, lying headers, and clients that invent names."""

import itertools
import json
import os
import shutil
import threading

import pytest
from lorikeet.adapters.errors import (
    AdapterDigestError,
    AdapterIdError,
    AdapterIncompatibleError,
    AdapterInvalidError,
    AdapterMemoryError,
    AdapterNotFoundError,
    AdapterNoVersionError,
)
from lorikeet.adapters.info import AdapterState, Tier
from lorikeet.adapters.registry import MAX_FAILED

from .managing import CONFIG, WEIGHTS, checked, digest_of, serve, stall_reads, start, watch_opens, watch_reads


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


# What is done to the folder `plain` while it is read; `other` holds other content of the same size.


def rewrite_weights(plain, other):
    (plain / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())


def rewrite_both(plain, other):
    (plain / CONFIG).write_bytes((other / CONFIG).read_bytes())
    rewrite_weights(plain, other)


def rename_files(plain, other):
    for name in (CONFIG, WEIGHTS):
        os.replace(other / name, plain / name)


def rename_folder(plain, other):
    plain.rename(plain.parent / "old.tmp")
    other.rename(plain)


def truncate(plain, other):
    os.truncate(plain / WEIGHTS, 1000)


def delete(plain, other):
    shutil.rmtree(plain)


@pytest.mark.parametrize("moment", ["between-the-files", 1, 2, 3])  # numbers: before that read of the weights file
@pytest.mark.parametrize("change", [rewrite_weights, rewrite_both, rename_files, rename_folder, truncate, delete])
def test_folder_replaced_while_it_is_read(
    change, moment, make_manager, lora_dir, clone_adapter, edit_config, edit_tensors, monkeypatch
):
    """Never a mixture of two contents: what is served was in the folder as a whole at some moment, or is refused."""
    edit_tensors(lora_dir, lambda tensors: None)  # now both weights files have the same length and header
    other = clone_adapter("other.tmp", 3.0)
    edit_config(other, lora_alpha=9)
    manager = make_manager()
    before = manager.load("plain").digest
    edit_config(lora_dir, lora_alpha=11)
    whole = {before, digest_of(lora_dir)}
    reads = itertools.count(1)

    def spoil():
        threading.Event().wait(0.02)  # a file's times move with the kernel's tick
        change(lora_dir, other)
        if change not in (truncate, delete):
            whole.add(digest_of(lora_dir))

    with monkeypatch.context() as patch:
        if moment == "between-the-files":
            watch_opens(patch, lambda path: spoil() if path.endswith(f"/plain/{WEIGHTS}") and len(whole) < 3 else None)
        else:
            watch_reads(patch, lambda path, _: spoil() if "/plain/" in path and next(reads) == moment else None)
        try:
            digest = manager.load("plain").digest
        except AdapterInvalidError as error:
            digest = before
            assert manager.get("plain").error == error.message
    assert digest in whole, "a mixture is served"
    assert serve(manager, "plain").digest == digest
    if change not in (truncate, delete):
        assert manager.load("plain").digest == digest_of(lora_dir)


def test_two_loads_of_one_id_with_the_same_content(make_manager, lora_dir, monkeypatch):
    manager = make_manager()
    with stall_reads(monkeypatch, "/plain/") as gate:
        loads = [start(manager.load, "plain") for _ in range(6)]
        gate.wait_reached()
    assert {load.result(20).digest for load in loads} == {digest_of(lora_dir)}
    assert [(i.digest, i.state) for i in manager.list()] == [(digest_of(lora_dir), AdapterState.READY)]
    serve(manager, "plain")


def test_two_loads_of_one_id_with_different_content(make_manager, lora_dir, clone_adapter, monkeypatch):
    """The one that was asked for last wins, although it is read first; both calls say what is served."""
    first, second = clone_adapter("first", 2.0), clone_adapter("second", 3.0)
    manager = make_manager()
    with stall_reads(monkeypatch, "/first/") as gate:
        slow = start(manager.load, "x", first)
        gate.wait_reached()
        assert manager.load("x", second).digest == digest_of(second)
    assert slow.result(20).digest == digest_of(second)
    assert [i.digest for i in manager.list()] == [digest_of(second)]
    assert serve(manager, "x").digest == digest_of(second)


def link_out(tmp_path, lora_dir, level):
    """Put a link that leads out of the root at some level; returns the source to load."""
    outside = shutil.copytree(lora_dir, tmp_path / "outside" / "plain")
    root = tmp_path / "adapters"
    match level:
        case "folder":
            (root / "link").symlink_to(outside)
            return "link"
        case "parent":
            (root / "link").symlink_to(outside.parent)
            return "link/plain"
        case "parent-and-back":
            (root / "link").symlink_to(outside)
            return "link/../../outside/plain"
        case "chain":
            (root / "link").symlink_to(root / "second")
            (root / "second").symlink_to(outside)
            return "link"
        case "config" | "weights":
            name = CONFIG if level == "config" else WEIGHTS
            (lora_dir / name).unlink()
            (lora_dir / name).symlink_to(outside / name)
            return "plain"
        case "file-chain":
            (lora_dir / "second").symlink_to(outside / WEIGHTS)
            (lora_dir / WEIGHTS).unlink()
            (lora_dir / WEIGHTS).symlink_to("second")
            return "plain"
        case "file-parent":
            (root / "shortcut").symlink_to(outside)
            (lora_dir / WEIGHTS).unlink()
            (lora_dir / WEIGHTS).symlink_to("../shortcut/" + WEIGHTS)
            return "plain"
        case "loop":
            (lora_dir / WEIGHTS).unlink()
            (lora_dir / WEIGHTS).symlink_to(WEIGHTS)
            return "plain"


@pytest.mark.parametrize(
    "level",
    ["folder", "parent", "parent-and-back", "chain", "config", "weights", "file-chain", "file-parent", "loop"],
)
def test_link_out_of_the_root_is_refused_at_every_level(level, make_manager, tmp_path, lora_dir):
    manager = make_manager()
    source = link_out(tmp_path, lora_dir, level)
    for given in (source, tmp_path / "adapters" / source):
        for call in (manager.load, manager.plan_load):
            with pytest.raises((AdapterIdError, AdapterInvalidError)) as raised:
                call("plain", given)
            assert str(tmp_path / "outside") not in raised.value.message
    assert manager.snapshot().bytes_used[Tier.HOST] == 0


def test_card_and_golden_file_out_of_the_root_are_not_read(make_manager, tmp_path, lora_dir):
    manager = make_manager()
    (lora_dir / "README.md").unlink()  # PEFT's
    (tmp_path / "secret").write_text("---\nbase_model_sha256: " + "5" * 64 + "\n---\n")
    (lora_dir / "README.md").symlink_to(tmp_path / "secret")
    info = manager.load("plain")
    assert info.state is AdapterState.READY and "5555" not in str(info)
    (lora_dir / "lorikeet.golden.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterInvalidError, match=r"lorikeet\.golden\.safetensors"):
        manager.load("plain")


def test_links_inside_the_root_are_fine(make_manager, tmp_path, lora_dir):
    (tmp_path / "adapters" / "link").symlink_to(lora_dir)
    (tmp_path / "linked-root").symlink_to(tmp_path / "adapters")
    manager = make_manager(roots=[tmp_path / "linked-root"])
    assert manager.load("link").digest == digest_of(lora_dir)


def header(tensors, directory):
    """Write a weights file with any header, and a payload of the given size behind it (without using the disk)."""
    entries, size = tensors
    raw = json.dumps(entries).encode()
    with (directory / WEIGHTS).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + size)


A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")
HUGE = 2**20


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


LIES = {
    "2^40 elements, file of nothing": ({A: entry([HUGE, HUGE], 0, 2**42)}, 0),
    "2^40 elements, file as long": ({A: entry([HUGE, HUGE], 0, 2**42)}, 2**42),
    "2^40 elements, few bytes announced": ({A: entry([HUGE, HUGE], 0, 64)}, 64),
    "product overflows 64 bit": ({A: entry([2**47, 2**47], 0, 0)}, 0),
    "2^40 tensors' worth of rank": ({A: entry([2**35, 32], 0, 2**42), B: entry([32, 2**35], 2**42, 2**43)}, 2**43),
    "negative size": ({A: entry([-4, 32], 0, 512)}, 512),
    "size that is a bool": ({A: entry([True, 32], 0, 128)}, 128),
    "size that is a float": ({A: entry([4.0, 32], 0, 512)}, 512),
    "no shape": ({A: {"dtype": "F32", "data_offsets": [0, 512]}}, 512),
    "offsets backwards": ({A: entry([4, 32], 512, 0)}, 512),
    "tensors that overlap": ({A: entry([4, 32], 0, 512), B: entry([32, 4], 256, 768)}, 768),
    "hole": ({A: entry([4, 32], 0, 512), B: entry([32, 4], 1024, 1536)}, 1536),
    "bytes behind the last": ({A: entry([4, 32], 0, 512), B: entry([32, 4], 512, 1024)}, 1025),
    "dtype of another width": ({A: entry([4, 32], 0, 512, "F16")}, 512),
    "unknown dtype": ({A: entry([4, 32], 0, 128, "F8_E4M3")}, 128),
    "entry that is no object": ({A: [1, 2, 3]}, 0),
    "only metadata": ({"__metadata__": {"format": "pt"}}, 0),
    "no tensor": ({}, 0),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_header_that_lies(lie, make_manager, lora_dir, edit_config):
    """Refused by the header alone: no memory is taken for what it announces."""
    manager = make_manager()
    if lie is LIES["2^40 tensors' worth of rank"]:
        edit_config(lora_dir, r=2**35, lora_alpha=2**35, target_modules=["q_proj"])
    try:
        header(lie, lora_dir)
    except OSError:
        pytest.skip("this file system has no files of that size")
    with pytest.raises((AdapterInvalidError, AdapterIncompatibleError, AdapterMemoryError)) as raised:
        manager.load("plain")
    assert raised.value.message == manager.get("plain").error and manager.list()[0].state is AdapterState.FAILED
    assert manager.snapshot().bytes_used[Tier.HOST] == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        (2**62).to_bytes(8, "little") + b"{}",
        (9).to_bytes(8, "little") + b"[" * 9,
        (30_000).to_bytes(8, "little") + b"[" * 30_000,
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"\xff{}\xff",
    ],
    ids=["empty", "length 0", "length 2^64", "length 2^62", "not JSON", "deep", "a list", "not UTF-8"],
)
def test_file_that_is_no_safetensors_file(data, make_manager, lora_dir):
    (lora_dir / WEIGHTS).write_bytes(data)
    with pytest.raises(AdapterInvalidError):
        make_manager().load("plain")


def footprint(manager, tmp_path):
    """How much there is of everything that an invented name might leave behind."""
    registry, state = manager._registry, manager._core.state
    tables = (registry.records, registry.by_id, registry.digests, registry.current, registry.failed, registry.loading)
    more = (registry.wanted, registry.host_wanted, registry.draining, registry.pins, registry.aliases.all())
    saved = state.database.load()
    files = sorted(str(p) for p in tmp_path.rglob("*") if not p.name.startswith("state.sqlite"))
    return [len(t) for t in (*tables, *more, saved.adapters, saved.aliases, state.store.digests())], files


def test_ten_thousand_invented_names_leave_nothing_behind(make_manager, lora_dir, tmp_path):
    manager = make_manager()
    digest = manager.load("plain").digest
    manager.set_alias("prod", [("plain", 1.0)])
    before = footprint(manager, tmp_path)
    calls = [
        manager.resolve, manager.get, manager.describe, manager.unload, manager.load, manager.plan_load,
        manager.rollback, manager.unpin, manager.delete_alias, lambda name: manager.pin(name, Tier.HOST, 0),
        lambda name: manager.prefetch(name, Tier.HOST, 0), lambda name: manager.set_alias("new", [(name, 1.0)]),
        lambda name: manager.set_alias(name, [("nope", 1.0)]), lambda name: manager.resolve("nope", name),
    ]  # fmt: skip
    for i in range(10_000):
        other = int(digest[:8], 16) ^ (i + 1)
        names = [f"invented-{i}", f"invented-{i}@{i:08x}", f"plain@{other:08x}", f"../{i}", "é"]
        call, name = calls[i % len(calls)], names[i // len(calls) % len(names)]
        with pytest.raises((AdapterNotFoundError, AdapterIdError, AdapterDigestError, AdapterNoVersionError)):
            call(name)
    assert footprint(manager, tmp_path) == before
    assert [info.adapter_id for info in manager.list()] == ["plain"]
    serve(manager, "prod")


def test_ids_invented_for_a_broken_folder_are_remembered_up_to_a_bound(make_manager, lora_dir, edit_config, tmp_path):
    manager = make_manager()
    edit_config(lora_dir, use_qalora=True)
    for i in range(MAX_FAILED + 50):
        with pytest.raises(AdapterIncompatibleError):
            manager.load(f"invented-{i}", "plain")
    sizes, _ = footprint(manager, tmp_path)
    assert len(manager.list()) == MAX_FAILED == sum(sizes)
    assert manager.get(f"invented-{MAX_FAILED + 49}").state is AdapterState.FAILED
    manager.unload(f"invented-{MAX_FAILED + 49}")
    with pytest.raises(AdapterNotFoundError, match="not known"):
        manager.get("invented-0")


def find_twins(lora_dir, edit_config):
    """Values of a harmless setting whose versions share the first four digits."""
    seen = {}
    for seed in itertools.count():
        edit_config(lora_dir, revision=f"r{seed}")
        prefix = digest_of(lora_dir)[:4]
        if prefix in seen:
            return f"r{seen[prefix]}", f"r{seed}"
        seen[prefix] = seed


def test_ambiguous_prefix_is_refused_and_a_longer_one_is_not(make_manager, lora_dir, edit_config):
    manager = make_manager()
    digests = []
    for revision in find_twins(lora_dir, edit_config):
        edit_config(lora_dir, revision=revision)
        digests.append(manager.load("plain").digest)
        manager.set_alias(revision, [("plain", 1.0)])
    short = f"plain@{digests[0][:4]}"
    assert digests[0] != digests[1] and digests[1].startswith(digests[0][:4])
    calls = [manager.resolve, manager.get, lambda name: manager.set_alias("new", [(name, 1.0)])]
    calls += [lambda name: manager.prefetch(name, Tier.HOST), lambda _: manager.rollback("plain", digests[0][:4])]
    for call in calls:
        with pytest.raises(AdapterDigestError, match="fits several versions") as raised:
            call(short)
        assert all(digest[:12] in raised.value.message for digest in digests)
    longer = next(n for n in range(5, 65) if digests[0][:n] != digests[1][:n])
    for digest in digests:
        assert serve(manager, f"plain@{digest[:longer]}").digest == digest
        assert serve(manager, f"plain@{digest.upper()}").digest == digest
    with pytest.raises(AdapterNotFoundError, match="has no version"):
        manager.resolve("plain@" + "0" * 64)


@pytest.mark.parametrize("reference", ["plain@", "plain@abc", "plain@xyzxyz", "plain@" + "0" * 65, "plain@abcd@abcd"])
def test_malformed_prefix(reference, make_manager, lora_dir):
    manager = make_manager()
    manager.load("plain")
    for call in (manager.resolve, manager.get):
        with pytest.raises(AdapterDigestError, match="digest prefix"):
            call(reference)
