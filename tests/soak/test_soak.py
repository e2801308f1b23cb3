"""Random loads, replacements, unloads, cancels and faults for a while: every invariant holds, and nothing is left.

LORIKEET_SOAK_SECONDS is how long all soaks together may take, about 40 s unless it is set; `make soak` takes an
hour. LORIKEET_SOAK_SEED repeats what was drawn.
"""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lorikeet.adapters.loading import LOAD_THREADS
from lorikeet.adapters.watcher import AdapterWatcher
from lorikeet.adapters.weights_file import NUM_SHARED
from lorikeet.server.engine.step_inputs import StepTensors

from ..golden.in_process import serving
from .actor import Actor
from .adversary import Adversary
from .contents import Content
from .durations import IN_PROCESS_S, WARM_UP_S
from .faults import Faults
from .folders import FolderKeeper
from .footprint import Footprint, measure
from .invariants import check_quiet, check_registry, empty, wait_until_quiet
from .ledger import Ledger
from .logs import Logs, watched_logs
from .owner import Owner
from .progress import Progress
from .references import References
from .requesters import Requester
from .wild import WildOperator
from .world import World

OWNED = (["a0", "a1", "a2"], ["b0", "b1"])
OWNED_ALIASES = (["p0", "p1"], ["p2"])
FOLDERS = ["f0", "f1", "f2"]
SHARED, SHARED_ALIASES = ["w0", "w1"], ["q0"]

# Room for three of the largest versions on the device and five in host memory; a KV cache that preempts.
SETTINGS: dict[str, Any] = {
    "adapter_device_bytes": 400 * 2**10,
    "adapter_host_bytes": 640 * 2**10,
    "adapter_store_bytes": 360 * 2**10,
    "adapter_slots": 7,
    "adapter_drain_timeout_s": 1.0,
    "kv_cache_bytes": 24 * 16 * 2**10,
    "step_tokens": 32,
    "max_running": 8,
    "max_waiting": 14,
    "metrics_max_adapters": 8,
}
# In bytes, however long a soak takes. The allocator keeps some of what many threads took for a while, so the sharper
# bound is on what it has handed out; the library that watches folders takes some hundred bytes for each that comes.
RSS_BOUND = 32 * 2**20
MALLOC_BOUND = 4 * 2**20
OBJECTS_BOUND = 1000
TENSORS_OF_A_STEP = 16  # of the last step with an adapter some are kept until the next
# Of what is remembered for steps of so many decodes; a warm-up need not have had each number up to `max_running`.
TENSORS_OF_A_LAYOUT = len(StepTensors._fields)
# Of what is remembered for adapters that have their headers in common, NUM_SHARED times at most.
TENSORS_OF_A_PLAN, OBJECTS_OF_A_PLAN = 3, 200
CLOSE_AFTER_S = 3.0
CHECK_EVERY_S = 0.25
QUIET_CHECK_EVERY_S = 6.0


@contextmanager
def soaking(
    model: Path, tmp_path: Path, contents: list[Content], references: References, faults: Faults, logs: Logs
) -> Iterator[World]:
    """A server as `lorikeet serve` makes it, with a quick watcher, on an empty adapter directory."""
    root = tmp_path / "adapters"
    shutil.copytree(contents[0].directory.parent, root / ".staged")
    with serving(model, root, state_dir=tmp_path / "state", cache_dir=tmp_path / "cache", **SETTINGS) as app:
        watcher = AdapterWatcher(app.manager, [root], settle_s=0.25, incomplete_s=1.0)
        world = World(app, watcher, root, contents, references, faults, Ledger(), logs)
        app.manager.on_dead = app.engine.on_dead = lambda error: world.report(f"a thread died: {error!r}")
        app.manager.restore()
        watcher.start()
        app.manager.finish_restore()
        try:
            yield world
        finally:
            watcher.close()


def make_actors(world: World, seed: int) -> list[Actor]:
    """Everybody."""
    actors: list[Actor] = [
        Owner(world, f"owner-{i}", seed, 0.03, ids=ids, aliases=aliases, moves=i == 0)
        for i, (ids, aliases) in enumerate(zip(OWNED, OWNED_ALIASES, strict=True))
    ]
    actors += [WildOperator(world, f"wild-{i}", seed, 0.05, SHARED, SHARED_ALIASES) for i in range(2)]
    actors += [FolderKeeper(world, "folders", seed, 0.15, [*FOLDERS, SHARED[0]], SHARED)]
    actors += [Adversary(world, "adversary", seed, 0.1, [*OWNED[0], *FOLDERS, *SHARED])]
    names = [*FOLDERS, *SHARED, *SHARED_ALIASES, "bad-0", "nobody"]
    actors += [Requester(world, f"requester-{i}", seed, 0.02, names) for i in range(3)]
    return actors


def pause(world: World, actors: list[Actor]) -> None:
    """Everything that must hold when nothing goes on; the gate is closed."""
    world.faults.enabled = False
    wait_until_quiet(world)
    for actor in actors:
        if isinstance(actor, FolderKeeper):
            actor.check_followed()
    wait_until_quiet(world)
    check_quiet(world)
    for actor in actors:
        if isinstance(actor, Requester):
            actor.check_ended()
            assert not actor._live, "a request ended without a terminal event"


def let_run(world: World, actors: list[Actor], seconds: float) -> None:
    """Watch the actors for a while, and check."""
    end = time.monotonic() + seconds
    next_pause = time.monotonic() + QUIET_CHECK_EVERY_S
    while time.monotonic() < end and not world.stopping.wait(CHECK_EVERY_S):
        check_registry(world)
        if time.monotonic() > next_pause:
            with world.gate.closed():
                pause(world, actors)
                world.faults.enabled = True
            next_pause = time.monotonic() + QUIET_CHECK_EVERY_S


def measure_empty(world: World, actors: list[Actor]) -> Footprint:
    """What is left when everything is unloaded."""
    with world.gate.closed():
        pause(world, actors)
        for actor in actors:
            actor.forget()
        empty(world)
        footprint = measure()
        world.faults.enabled = True
    return footprint


@pytest.mark.timeout(IN_PROCESS_S + 240)
def test_soak(
    tiny_model: Path,
    tmp_path: Path,
    soak_contents: list[Content],
    soak_references: References,
    soak_seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = measure()
    with watched_logs() as logs:
        faults = Faults(monkeypatch, soak_seed)
        with soaking(tiny_model, tmp_path, soak_contents, soak_references, faults, logs) as world:
            actors = make_actors(world, soak_seed)
            progress = Progress(world)
            faults.enabled = True
            for thread in (*actors, progress):
                thread.start()
            try:
                let_run(world, actors, WARM_UP_S)
                start = measure_empty(world, actors)
                let_run(world, actors, IN_PROCESS_S - WARM_UP_S)
                end = measure_empty(world, actors)
            finally:
                world.stopping.set()
                for thread in (*actors, progress):
                    thread.join(60)
            print(progress.line())
            print(f"start {start}\nend   {end}\nlogged {dict(logs.counts())}", flush=True)
            del actors, progress
        assert world.problems == []
        assert logs.unexpected == []
        assert not logs.forsaken & set(OWNED[1]), "what stays where it is was lost"
    del world
    after = measure()
    check_returned(start, end)
    threads = {thread.name for thread in threading.enumerate()}
    assert after.threads <= before.threads, threads
    assert after.files <= before.files


def check_returned(start: Footprint, end: Footprint) -> None:
    """The process is back where it was after the warm-up."""
    grown = end.objects - start.objects
    plans = grown.pop("LaidOut", 0)
    assert plans <= NUM_SHARED
    layouts = grown.pop("StepTensors", 0)
    assert layouts <= SETTINGS["max_running"]
    tensors = TENSORS_OF_A_STEP + TENSORS_OF_A_PLAN * plans + TENSORS_OF_A_LAYOUT * layouts
    assert grown.pop("Tensor", 0) <= tensors
    assert not grown, "objects of requests or adapters leaked"
    assert end.num_objects - start.num_objects < OBJECTS_BOUND + OBJECTS_OF_A_PLAN * plans
    # Pools start their threads as they need them, and keep them. Other tests may have left a server in this process.
    pools = {name for name in start.threads | end.threads if name.startswith("adapter-") and name.endswith("_N")}
    assert all(end.threads[name] - start.threads[name] <= LOAD_THREADS for name in pools)
    assert all(end.threads[name] == start.threads[name] for name in (start.threads | end.threads).keys() - pools)
    assert end.files == start.files
    assert end.malloc_bytes - start.malloc_bytes < MALLOC_BOUND
    assert end.rss_bytes - start.rss_bytes < RSS_BOUND


@pytest.mark.timeout(120)
def test_closing_under_load(
    tiny_model: Path,
    tmp_path: Path,
    soak_contents: list[Content],
    soak_references: References,
    soak_seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With every kind of call under way: each ends, with an answer or an error that says why, and so do all threads."""
    with watched_logs() as logs:
        faults = Faults(monkeypatch, soak_seed)
        with soaking(tiny_model, tmp_path, soak_contents, soak_references, faults, logs) as world:
            actors = make_actors(world, soak_seed)
            for actor in actors:
                actor.start()
            world.stopping.wait(CLOSE_AFTER_S)
            world.is_closing = True
            world.app.engine.drain(0.1)
            world.watcher.close()
            world.app.engine.stop()
            world.app.manager.close()
            world.app.state.close()
            world.stopping.wait(0.5)
            world.stopping.set()
            for actor in actors:
                actor.join(30)
            assert not any(actor.is_alive() for actor in actors), "a call never ended"
            for actor in actors:
                if isinstance(actor, Requester):
                    actor.check_ended()
            assert world.problems == []
            assert world.live == 0
            core = world.app.manager._core
            assert not any(r.in_flight or r.holds or r.active for r in core.registry.records.values())
            check_registry(world)
    assert logs.unexpected == []
