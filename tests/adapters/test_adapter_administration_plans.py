"""`dry_run`: a plan says what a load would do, the load then does it, and planning itself changes nothing."""

import hashlib
import random

import pytest
from lorikeet.adapters.errors import (
    AdapterExistsError,
    AdapterIdError,
    AdapterIncompatibleError,
    AdapterInvalidError,
    AdapterMismatchError,
    AdapterNotFoundError,
    AdapterUnloadedError,
    ServingError,
)
from lorikeet.adapters.info import AdapterState, Eviction, LoadOptions, Tier
from peft import LoraConfig

from .managing import PLAIN_BYTES, activate, checked, digest_of, end, serve, stall_reads, start


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def many(lora_dir, clone_adapter):
    """Six adapters a0 ... a5 of the same size."""
    return [clone_adapter(f"a{i}", 1.0 + i).name for i in range(6)]


def everything(manager):
    """All that a plan might change: the registry, the tables, the state directory with the times of its files."""
    with manager._changed:
        records = {
            str(version): (record.tier, record.in_flight, record.last_used, record.candidacies, record.is_stored)
            for version, record in manager._registry.records.items()
        }
        registry = (dict(manager._registry.failed), list(manager._registry.loading), dict(manager._registry.wanted))
    path = manager._core.state.path
    files = {p: (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).digest()) for p in path.rglob("*") if p.is_file()}
    files = {p: content for p, content in files.items() if "state.sqlite-" not in p.name}  # reading writes there, too
    return records, registry, manager.snapshot(), manager._core.state.database.load(), files


def test_plan_of_a_new_adapter(make_manager, lora_dir):
    manager = make_manager()
    before = everything(manager)
    plan = manager.plan_load("plain")
    assert everything(manager) == before and manager.list() == []
    assert (plan.is_new, plan.fits_host, plan.fits_device, plan.evictions) == (True, True, True, ())
    assert plan.host_bytes == PLAIN_BYTES and plan.device_bytes >= PLAIN_BYTES
    assert (plan.adapter.state, plan.adapter.tier) == (AdapterState.STORED, Tier.DISK)
    info = manager.load("plain")
    same = ("adapter_id", "digest", "bytes", "max_rank", "slices", "source", "method", "trained_for", "num_modules")
    assert all(getattr(plan.adapter, name) == getattr(info, name) for name in same)


def test_plan_says_whether_the_content_is_new(make_manager, lora_dir, edit_config):
    manager = make_manager()
    manager.load("plain")
    serve(manager, "plain")
    before = everything(manager)
    plan = manager.plan_load("plain")
    assert (plan.is_new, plan.evictions) == (False, ()) and plan.adapter.digest == digest_of(lora_dir)
    edit_config(lora_dir, lora_alpha=3)
    plan = manager.plan_load("plain")
    assert plan.is_new and plan.adapter.digest == digest_of(lora_dir) != manager.get("plain").digest
    assert everything(manager) == before


def copies(manager):
    """(id, digest, tier) of every copy."""
    with manager._changed:
        records = list(manager._registry.records.values())
        found = {(r.version.adapter_id, r.version.digest, Tier.HOST) for r in records if r.host is not None}
        return found | {(r.version.adapter_id, r.version.digest, Tier.DEVICE) for r in records if r.slot is not None}


@pytest.mark.parametrize("seed", range(6))
def test_plan_foresees_what_the_load_evicts(seed, make_manager, many):
    """The load evicts from host memory, bringing the adapter to the device then evicts there: just what was planned."""
    rng = random.Random(seed)
    manager = make_manager(host_budget_bytes=3 * PLAIN_BYTES, device_budget_bytes=2 * PLAIN_BYTES)
    for name in rng.sample(many[:5], 5):
        manager.load(name)
    for name in rng.choices(many[:5], k=6):
        serve(manager, name)
    if rng.random() < 0.5:
        manager.pin(rng.choice(many[:5]), Tier.HOST)
    plan = manager.plan_load("a5")
    before = copies(manager)
    assert plan.fits_host and plan.fits_device
    manager.load("a5")
    manager.prefetch("a5", Tier.DEVICE)
    after = copies(manager)
    gone = {(e.adapter_id, e.digest, e.tier) for e in plan.evictions}
    assert before - after == gone and len(plan.evictions) == len(gone)
    assert after - before == {("a5", plan.adapter.digest, tier) for tier in (Tier.HOST, Tier.DEVICE)}


def test_plan_names_evictions_in_order(make_manager, many):
    manager = make_manager(max_slots=2)
    for name in many[:3]:
        manager.load(name)
    for name in ("a1", "a0"):
        serve(manager, name)
    plan = manager.plan_load("a3")
    assert plan.evictions == (Eviction("a1", manager.get("a1").digest, Tier.DEVICE),)


def test_plan_says_when_all_is_in_use(make_manager, many, save_adapter, tmp_path):
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    save_adapter(config, tmp_path / "adapters" / "large")
    manager = make_manager(host_budget_bytes=4 * PLAIN_BYTES, device_budget_bytes=2 * PLAIN_BYTES)
    for name in many[:4]:
        manager.load(name)
    running = [manager.resolve(name) for name in many[:2]]
    for version in running:
        activate(manager, version)
    plan = manager.plan_load("a4")
    assert (plan.fits_host, plan.fits_device) == (True, False)
    assert [e.tier for e in plan.evictions] == [Tier.HOST]
    end(manager, running[1])
    plan = manager.plan_load("large")
    assert (plan.fits_device, Tier.DEVICE in {e.tier for e in plan.evictions}) == (False, False)
    end(manager, running[0])
    plan = manager.plan_load("large")
    assert plan.fits_device and [e.adapter_id for e in plan.evictions if e.tier is Tier.DEVICE] == ["a1", "a0"]


def test_plan_refuses_what_the_load_refuses(make_manager, lora_dir, clone_adapter, edit_config, edit_tensors, tmp_path):
    manager = make_manager()
    digest = manager.load("plain").digest
    manager.set_alias("prod", [("plain", 1.0)])
    edit_tensors(clone_adapter("zero"), lambda tensors: [t.zero_() for t in tensors.values()])
    edit_config(clone_adapter("qalora"), use_qalora=True)
    edit_config(clone_adapter("foreign"), base_model_name_or_path="someone/other-model")
    (clone_adapter("broken") / "adapter_model.safetensors").write_bytes(b"nothing")
    cases = [
        ("zero", None, AdapterInvalidError),
        ("qalora", None, AdapterIncompatibleError),
        ("foreign", None, AdapterIncompatibleError),
        ("broken", None, AdapterInvalidError),
        ("nope", None, AdapterNotFoundError),
        ("prod", "plain", AdapterExistsError),
        ("a/b", None, AdapterIdError),
        ("x", tmp_path, AdapterIdError),
    ]
    before = everything(manager)
    for adapter_id, source, error in cases:
        with pytest.raises(error) as planned:
            manager.plan_load(adapter_id, source)
        assert everything(manager) == before
        with pytest.raises(error) as loaded:
            manager.load(adapter_id, source)
        assert loaded.value.message == planned.value.message
        if adapter_id in ("zero", "qalora", "foreign", "broken"):
            manager.unload(adapter_id)
    with pytest.raises(AdapterMismatchError):
        manager.plan_load("plain", None, LoadOptions(expected_digest="0" * 64))
    lenient = LoadOptions(allow_zero=True, allow_other_base=True)
    assert manager.plan_load("zero", None, lenient).is_new and manager.plan_load("foreign", None, lenient).is_new
    assert manager.get("plain").digest == digest


def test_plan_does_not_hold_up_the_load_of_the_same_id(make_manager, lora_dir, monkeypatch):
    manager = make_manager()
    with stall_reads(monkeypatch, "/plain/") as gate:
        planning = start(manager.plan_load, "plain")
        gate.wait_reached()
        assert manager.list() == [], "a plan is no load"
        with pytest.raises(AdapterNotFoundError, match="not known"):
            manager.unload("plain")
        loading = start(manager.load, "plain")
    assert loading.result(20).digest == planning.result(20).adapter.digest


def test_close_ends_plans_and_aliases_that_have_not_begun(make_manager, many, monkeypatch):
    manager = make_manager()
    digests = {manager.load("x", name).digest for name in ("a0", "a1")}
    with stall_reads(monkeypatch, "") as gate:
        calls = [start(manager.plan_load, name) for name in many * 2]
        calls.append(start(manager.rollback, "x"))
        gate.wait_reached()
        closing = start(manager.close)
    closing.result(20)
    for call in calls:
        error = call.exception(20)
        assert error is None or isinstance(error, ServingError), error
    previous = (digests - {info.digest for info in manager.list()}).pop()
    for call in (lambda: manager.plan_load("a0"), lambda: manager.set_alias("new", [(f"x@{previous}", 1.0)])):
        with pytest.raises(AdapterUnloadedError, match="shutting down"):
            call()
