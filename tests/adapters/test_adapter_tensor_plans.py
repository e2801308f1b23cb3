"""What adapters with the same config and headers share: it is worked out once, and nothing of one gets into another."""

import json
import random
import secrets
import shutil
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lorikeet.adapters.checkpoint import load_checkpoint
from lorikeet.adapters.errors import AdapterIncompatibleError, AdapterInvalidError
from lorikeet.adapters.fingerprint import BaseFingerprint
from lorikeet.adapters.memo import Memo
from lorikeet.adapters.packing import pack_adapter
from lorikeet.adapters.shards import open_weights
from lorikeet.adapters.tensor_plan import TensorPlanner
from lorikeet.adapters.weights_file import MAX_SHARED_BYTES, WEIGHTS_FILE
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from .full_module_world import World

NUM_THREADS = 4


@pytest.fixture
def planner(sites, modules, base):
    return TensorPlanner(sites, modules, base)


@pytest.fixture
def other_dir(lora_dir, tmp_path):
    """A copy of lora_dir with other values: the same config and header."""
    target = tmp_path / "adapters" / "other"
    shutil.copytree(lora_dir, target)
    header, payload = split(lora_dir)
    values = torch.randn(len(payload) // 4)
    (target / WEIGHTS_FILE).write_bytes(header + values.numpy().tobytes())
    return target


def split(directory):
    """Header and payload of a weights file."""
    data = (directory / WEIGHTS_FILE).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return data[:end], data[end:]


def pad_header(directory, size):
    """Make a header longer with the spaces that the format allows."""
    header, payload = split(directory)
    text = header[8:].ljust(size - 8)
    (directory / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + payload)


def header_of(directory):
    with open_weights(directory) as weights:
        (header,) = weights.headers
    return header


def test_equal_config_and_header_are_planned_once(lora_dir, other_dir, planner, weights):
    one, other = load_checkpoint(lora_dir, planner), load_checkpoint(other_dir, planner)
    assert one.plan is other.plan and one.digest != other.digest
    assert header_of(lora_dir) is header_of(other_dir)
    first, second = (pack_adapter(c, weights, dtype=torch.float32, pin_memory=False) for c in (one, other))
    assert first.site_ranks is second.site_ranks and first.report is second.report
    assert not torch.equal(first.data, second.data)


def test_another_config_or_header_is_another_plan(lora_dir, other_dir, planner, edit_config, edit_tensors):
    plan = load_checkpoint(lora_dir, planner).plan
    edit_config(other_dir, lora_alpha=9)
    changed = load_checkpoint(other_dir, planner).plan
    assert changed is not plan and changed.config.alpha == 9 and plan.config.alpha == 8
    edit_tensors(lora_dir, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    halved = load_checkpoint(lora_dir, planner)
    assert halved.plan is not plan
    assert {t.dtype for t in halved.tensors.values()} == {torch.bfloat16}


def test_planners_of_other_bases_share_no_plan(lora_dir, planner, sites, modules, base):
    other = TensorPlanner(sites, modules, base)
    assert load_checkpoint(lora_dir, planner).plan is not load_checkpoint(lora_dir, other).plan


@pytest.mark.parametrize("tied", [False, True])
def test_copies_of_the_base_are_told_apart_though_the_plan_is_shared(tied, tmp_path):
    """PEFT saves the embedding beside the adapter, trained or not: only the values tell."""
    world = World(tmp_path / "trained", tied)
    config = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    world.save(config, save_embedding_layers=True)
    untrained = shutil.copytree(world.directory, tmp_path / "untrained")
    path = world.directory / WEIGHTS_FILE
    tensors = load_file(path)
    changed = [name for name in tensors if "lora_" not in name]
    assert changed
    for name in changed:
        tensors[name] += torch.randn(tensors[name].shape)
    save_file(tensors, path, metadata={"format": "pt"})
    planner, packs = TensorPlanner(world.sites, world.modules, BaseFingerprint()), {}
    for _ in range(2):
        for directory in (world.directory, untrained):
            checkpoint = load_checkpoint(directory, planner)
            fresh = load_checkpoint(directory, TensorPlanner(world.sites, world.modules, BaseFingerprint()))
            packs[directory], expected = (
                pack_adapter(c, world.weights, dtype=torch.float32, pin_memory=False) for c in (checkpoint, fresh)
            )
            assert torch.equal(packs[directory].data, expected.data)
            assert packs[directory].overrides == () or directory == world.directory
            assert packs[directory].report == expected.report
    assert packs[world.directory].overrides and packs[untrained].report.copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_of_one_plan_read_at_once_equal_peft(
    dtype, tmp_path, planner, save_adapter, peft_deltas, weights, sites, modules, base, unpack
):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    folders = [tmp_path / f"a{i}" for i in range(6)]
    for folder in folders:
        save_adapter(config, folder, seed=secrets.randbits(31))
        config_bytes = (folders[0] / "adapter_config.json").read_bytes()
        (folder / "adapter_config.json").write_bytes(config_bytes)  # sets are written in any order
    plans, start = set(), threading.Barrier(NUM_THREADS)

    def read(seed):
        start.wait()
        order = folders * 3
        random.Random(seed).shuffle(order)
        found = []
        for folder in order:
            checkpoint = load_checkpoint(folder, planner)
            plans.add(checkpoint.plan)
            found.append((folder, pack_adapter(checkpoint, weights, dtype=dtype, pin_memory=False)))
        return found

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = [each for part in pool.map(read, [secrets.randbits(31) for _ in range(NUM_THREADS)]) for each in part]
    assert len(plans) == 1
    for folder in folders:
        fresh = load_checkpoint(folder, TensorPlanner(sites, modules, base))
        alone = pack_adapter(fresh, weights, dtype=dtype, pin_memory=False)
        mine = [packed for at, packed in found if at == folder]
        assert len(mine) == 3 * NUM_THREADS
        for packed in mine:
            assert torch.equal(packed.data, alone.data) and packed.report == alone.report
            for table in ("site_offsets", "site_ranks", "site_affines"):
                assert torch.equal(getattr(packed, table), getattr(alone, table))
        if dtype is torch.float32:
            assert_close(unpack(mine[0]), peft_deltas(folder), rtol=1e-5, atol=1e-6)


def test_size_is_checked_for_each_file(lora_dir, other_dir, planner):
    load_checkpoint(lora_dir, planner)
    data = (other_dir / WEIGHTS_FILE).read_bytes()
    for wrong in (data[:-4], data + b"\0\0\0\0"):
        (other_dir / WEIGHTS_FILE).write_bytes(wrong)
        with pytest.raises(AdapterInvalidError, match="is the copy complete"):
            load_checkpoint(other_dir, planner)


def test_errors_are_raised_each_time_and_do_not_outlast_their_cause(lora_dir, planner, edit_config):
    good_config, good_header = (lora_dir / "adapter_config.json").read_bytes(), split(lora_dir)[0]
    for _ in range(2):
        edit_config(lora_dir, use_qalora=True)
        for _ in range(2):
            with pytest.raises(AdapterIncompatibleError, match="use_qalora"):
                load_checkpoint(lora_dir, planner)
        (lora_dir / "adapter_config.json").write_bytes(good_config)
        for old, new, message in (
            (b'"F32"', b'"X32"', "type X32"),  # the header is refused
            (b"q_proj.lora_A", b"qxproj.lora_A", "has no lora_"),  # the plan is
        ):
            payload = split(lora_dir)[1]
            (lora_dir / WEIGHTS_FILE).write_bytes(good_header.replace(old, new) + payload)
            for _ in range(2):
                with pytest.raises((AdapterInvalidError, AdapterIncompatibleError), match=message):
                    load_checkpoint(lora_dir, planner)
            (lora_dir / WEIGHTS_FILE).write_bytes(good_header + payload)
            load_checkpoint(lora_dir, planner)


@pytest.mark.parametrize(("size", "is_kept"), [(MAX_SHARED_BYTES, True), (MAX_SHARED_BYTES + 1, False)])
def test_large_header_is_not_kept(size, is_kept, lora_dir, planner, pack):
    before = pack(lora_dir)
    pad_header(lora_dir, size)
    assert (header_of(lora_dir) is header_of(lora_dir)) is is_kept
    plans = {load_checkpoint(lora_dir, planner).plan for _ in range(3)}
    assert len(plans) == (1 if is_kept else 3)
    assert torch.equal(pack(lora_dir).data, before.data)


@pytest.mark.parametrize(("size", "is_kept"), [(MAX_SHARED_BYTES, True), (MAX_SHARED_BYTES + 1, False)])
def test_large_config_is_not_kept(size, is_kept, lora_dir, planner):
    path = lora_dir / "adapter_config.json"
    path.write_bytes(path.read_bytes().ljust(size))
    configs = {id(c): c for c in (load_checkpoint(lora_dir, planner).plan.config for _ in range(3))}
    assert len(configs) == (1 if is_kept else 3)


def test_same_tensors_elsewhere_in_the_payload_are_another_plan(lora_dir, other_dir, planner, weights):
    """Two headers that differ in nothing but where their tensors lie."""
    first = json.loads(split(lora_dir)[0][8:])
    names = [name for name, entry in first.items() if name != "__metadata__" and entry["shape"] == [4, 32]]
    one, two = names[:2]
    first[one]["data_offsets"], first[two]["data_offsets"] = first[two]["data_offsets"], first[one]["data_offsets"]
    payload = split(lora_dir)[1]
    text = json.dumps(first).encode()
    (other_dir / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + payload)
    before, after = load_checkpoint(lora_dir, planner), load_checkpoint(other_dir, planner)
    assert before.plan is not after.plan
    assert torch.equal(before.tensors[one], after.tensors[two]) and torch.equal(before.tensors[two], after.tensors[one])
    assert not torch.equal(before.tensors[one], before.tensors[two])


def test_memo_keeps_what_was_asked_for_last():
    memo, made = Memo(3), []

    def ask(key):
        return memo.get(key, lambda: made.append(key) or object())

    kept = {key: ask(key) for key in "abc"}
    assert ask("a") is kept["a"] and made == ["a", "b", "c"]
    ask("d")  # "b" was not asked for the longest
    assert all(ask(key) is kept[key] for key in "ac") and made == ["a", "b", "c", "d"]
    assert ask("b") is not kept["b"]


def test_memo_gives_all_threads_the_same_object():
    memo, ready = Memo(4), threading.Barrier(NUM_THREADS)

    def make():
        ready.wait()  # every thread is making it
        return object()

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = list(pool.map(lambda _: memo.get("key", make), range(NUM_THREADS)))
    assert len(set(map(id, found))) == 1


def test_memo_keeps_nothing_of_an_error():
    memo = Memo(2)

    def fail():
        raise ValueError

    with pytest.raises(ValueError):
        memo.get("key", fail)
    assert memo.get("key", lambda: 5) == 5
