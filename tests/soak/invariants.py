"""What must hold: at any moment under the manager's lock, and more when nothing is going on."""

import os

from lorikeet.adapters.golden import GOLDEN_FILE, parse_golden
from lorikeet.adapters.info import AdapterState, Tier
from lorikeet.adapters.rules import check_integrity

from .contents import CONFIG, WEIGHTS
from .world import HANG_S, World


def check_registry(world: World) -> None:
    """At any moment."""
    manager = world.app.manager
    core = manager._core
    with core.changed:
        check_integrity(core.registry)
        manager.store.check_integrity()
        memory = core.registry.memory
        # The arena holds what is on the device or on its way there, and nothing else.
        assert manager.store.used_bytes <= memory.device_used
    assert world.app.state.store.used_bytes <= world.app.config.adapter_store_bytes


def check_quiet(world: World) -> None:
    """With no operation and no request under way, and no load."""
    check_registry(world)
    core = world.app.manager._core
    with core.changed:
        registry = core.registry
        assert not registry.loading and not registry.draining and not core._storing, registry.loading
        for record in registry.records.values():
            assert record.in_flight == record.holds == record.active == 0, record
            assert not record.host_claimed and not record.device_claimed, record
            assert record.pinned is not Tier.DEVICE or record.slot is not None, record
            assert record.pinned is not Tier.HOST or record.host is not None, record
        assert not registry.wanted and not registry.host_wanted
        assert world.app.manager.store.used_bytes == registry.memory.device_used
        current = {adapter_id: record.version.digest for adapter_id, record in registry.current.items()}
        failed = set(registry.failed)
        pins = dict(registry.pins)
        aliases = {alias.name: alias.targets for alias in registry.aliases.all()}
    check_database(world, current, failed, {i: tier.value for i, tier in pins.items()}, aliases)
    check_store(world)
    scheduler = world.app.engine._scheduler
    scheduler.check_integrity()
    assert scheduler.blocks.stats().used == 0 and not scheduler.running and not scheduler.num_waiting
    assert world.app.engine._inbox.is_empty and not world.app.engine._loop._outputs


def check_database(world: World, current: dict, failed: set, pins: dict, aliases: dict) -> None:
    """What is on disk is what is served: nothing less would survive a restart, and nothing else would come back."""
    saved = world.app.state.database.load()
    assert {alias.name: alias.targets for alias in saved.aliases} == aliases
    rows = {adapter.adapter_id: adapter for adapter in saved.adapters}
    for adapter_id, digest in current.items():
        row = rows.get(adapter_id)
        assert row is not None and row.digest == digest, f"{adapter_id} is {digest}, on disk it is {row}"
    for adapter_id, row in rows.items():
        assert not row.digest or adapter_id in current or adapter_id in failed, f"{row} is on disk, and not served"
    assert {adapter_id: row.pinned for adapter_id, row in rows.items() if row.pinned} == pins


def check_store(world: World) -> None:
    """Whole versions within the budget, and nothing half-done."""
    state = world.app.state
    kept = state.store.digests()
    assert sorted(os.listdir(state.path / "versions")) == sorted(kept), "the version store has leftovers"
    assert os.listdir(state.incoming) == []
    assert kept.keys() <= world.by_digest.keys() | world.never_served, "the version store has content that never was"
    for digest, size in kept.items():
        if digest in world.never_served:
            continue
        files = {file.name: file.read_bytes() for file in (state.path / "versions" / digest).iterdir()}
        assert sum(map(len, files.values())) == size
        source = world.by_digest[digest].directory
        assert all(files[name] == (source / name).read_bytes() for name in (CONFIG, WEIGHTS)), f"{digest} is damaged"
        # It may have been read before its golden file was copied into the folder; what is kept is written anew.
        if GOLDEN_FILE in files:
            kept_golden, golden = parse_golden(files[GOLDEN_FILE]), parse_golden((source / GOLDEN_FILE).read_bytes())
            assert kept_golden.digest == digest and kept_golden.logits.equal(golden.logits)


def wait_until_quiet(world: World) -> None:
    """Until requests, loads and drains are over and what is pinned has come in; operations are paused."""
    core = world.app.manager._core

    def is_quiet() -> bool:
        with core.changed:
            registry = core.registry
            busy = registry.loading or registry.draining or core._storing or registry.wanted or registry.host_wanted
            held = any(r.in_flight or r.host_claimed or r.device_claimed for r in registry.records.values())
        return not (world.live or busy or held)

    world.wait_for(is_quiet, "requests, loads and drains end, and pins hold")
    # Whoever has its answer may be ahead of the step thread, which holds the request until its round is over.
    world.app.engine._inbox.wait_until_quiet(HANG_S)


def empty(world: World) -> None:
    """Unload everything, once the folders are gone; nothing may be left of it."""
    manager = world.app.manager
    for alias in manager.list_aliases():
        manager.delete_alias(alias.name)
    core = manager._core

    def is_gone() -> bool:
        with core.changed:
            pinned = list(core.registry.pins)
        for adapter_id in pinned:
            manager.unpin(adapter_id)
        for info in manager.list():
            if (info.current or info.state is AdapterState.FAILED) and not (world.root / info.adapter_id).exists():
                manager.unload(info.adapter_id)
        return not manager.list()

    world.wait_for(is_gone, "everything is unloaded")
    wait_until_quiet(world)
    check_quiet(world)
    with core.changed:
        registry = core.registry
        assert not registry.records and not registry.by_id and not registry.digests and not registry.pins
        assert not registry.wanted and not registry.host_wanted and not registry.draining and not registry.failed
        assert registry.memory.host_used == registry.memory.device_used == 0
    world.wait_for(lambda: not world.watcher._folders, "the watcher has missed the folders")
    world.wait_for(lambda: not world.app.state.database.load().adapters, "the folders are forgotten")
    assert manager.store.used_bytes == 0
