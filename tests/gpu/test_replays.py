"""Graphs captured before any adapter was there answer for whatever is loaded, replaced, evicted and moved since."""

import random
from collections.abc import Iterator, Sequence

import pytest
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.server.app import App

from ..devices import Place, gpu_place
from .answers import answer_all, assert_alike
from .worlds import FP32, World, make_world, num_replays, requests, server


@pytest.fixture(scope="module", params=[gpu_place(family, "replays") for family in ("llama", "gemma2")])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    place: Place = request.param
    return make_world(place.family, tmp_path_factory.mktemp(place.family))


@pytest.fixture(scope="module")
def eager(world: World) -> Iterator[App]:
    """Room for everything, no graphs."""
    with server(world, graphs=False) as app:
        yield app


def check(app: App, eager: App, names: Sequence[str], seed: int) -> None:
    """Plain adapters and the base, which are replayed, and then combinations beside them, of which some steps are."""
    for combined in (False, True):
        wanted = requests(names, 10, tokens=10, seed=seed, combined=combined)
        before = num_replays(app)
        got = answer_all(app, wanted)
        assert combined or num_replays(app) > before
        assert_alike(answer_all(eager, wanted), got, FP32)


def test_replayed_with_more_and_more_adapters(world: World, eager: App) -> None:
    with server(world, load=()) as app:
        for count in (2, 4, len(world.names)):
            for name in world.names[:count]:
                app.manager.load(name)
            check(app, eager, world.names[:count], seed=count)


def test_loads_replacements_evictions_and_compaction_between_replays(
    world: World, eager: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(3)
    moved: list[object] = []
    removed: list[int] = []
    move, remove = DeviceStore.move, DeviceStore.remove
    monkeypatch.setattr(DeviceStore, "move", lambda self, moves: (moved.extend(moves), move(self, moves))[1])
    monkeypatch.setattr(DeviceStore, "remove", lambda self, slot: (removed.append(slot), remove(self, slot))[1])
    # In fp32 the adapters take 560 KiB; two that run together must fit, and can both be the largest.
    with server(world, load=(), adapter_device_bytes="400KiB") as app:
        for name in world.names:
            app.manager.load(name)
        for number in range(8):
            replaced_by = world.names[number % len(world.names)]
            for each in (app, eager):
                each.manager.load("replaced", replaced_by)
            check(app, eager, [*rng.sample(world.names, 4), "replaced"], seed=100 + number)
        assert removed, "nothing was evicted"
        assert moved, "nothing was compacted"
        app.manager.store.check_integrity()
