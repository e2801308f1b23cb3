"""The engine's thread: requests from many threads, sleeping and waking, draining, stopping and dying."""

import threading
import time
from collections.abc import Callable

import pytest
from lorikeet.server.engine import step_loop
from lorikeet.server.engine.request import Finished
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.engine.stats import EngineState
from lorikeet.server.errors import (
    DrainingError,
    EngineDeadError,
)

from .fake_adapters import NEVER, version
from .fake_world import GREEDY, World, expected_tokens, greedy, prompt_of, reason_of

A, B = version("a"), version("b")
LONG = SamplingParams(temperature=0.0, max_tokens=150)


def wait_for(condition: Callable[[], object], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        pause.wait(0.002)


@pytest.fixture
def threaded():
    """Worlds whose engine runs on its thread, with the real clock."""
    worlds = []

    def make(**settings) -> World:
        world = World(clock=time.monotonic, **settings)
        worlds.append(world)
        world.engine.start()
        return world

    yield make
    for world in worlds:
        world.engine.stop()


def test_requests_from_many_threads_end_once_each(threaded):
    world = threaded(num_blocks=24, num_slots=2)
    versions = [None, A, B, version("c")]
    lock = threading.Lock()

    def submit(seed: int) -> None:
        for i in range(5):
            with lock:  # of the fake world's list of clients
                client = world.client(prompt_of(seed + i, 5), greedy(6), versions[(seed + i) % 4])
            world.engine.submit(client.request)
            if i == 3:
                world.engine.abort(client.request.request_id)

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: all(client.end for client in world.clients))
    world.engine.drain(90.0)
    world.check_nothing_is_held()
    for client in world.clients:
        assert client.tokens == expected_tokens(
            client.request.adapter, client.request.prompt_token_ids, len(client.tokens)
        )


def test_idle_engine_sleeps_and_wakes_for_a_request(threaded):
    world = threaded()
    wait_for(lambda: world.adapters.num_step_works > 0)
    before = world.adapters.num_step_works
    assert not threading.Event().wait(0.5)
    assert world.adapters.num_step_works <= before + 1
    client = world.submit([1])
    wait_for(lambda: client.end)


def test_engine_with_a_blocked_request_hardly_turns_and_wakes_for_its_adapter(threaded, monkeypatch):
    monkeypatch.setattr(step_loop, "_RETRY_EVERY_S", 3600.0)  # nothing but the adapter wakes it
    world = threaded(load_steps=NEVER)
    client = world.submit([1], GREEDY, A)
    wait_for(lambda: client.request.order >= 0)
    threading.Event().wait(0.1)
    before = world.adapters.num_step_works
    threading.Event().wait(0.5)
    assert world.adapters.num_step_works - before <= 2  # it had not come to rest yet, at worst
    world.adapters.put(A)
    world.adapters._wanted.clear()
    world.adapters.on_ready()
    wait_for(lambda: client.end)
    assert isinstance(client.end, Finished)


def test_deadline_wakes_an_engine_that_has_nothing_to_run(threaded):
    world = threaded(load_steps=NEVER)
    client = world.submit([1], GREEDY, A, deadline=time.monotonic() + 0.1)
    wait_for(lambda: client.end)
    assert reason_of(client) == "DEADLINE_EXCEEDED"


def test_drain_finishes_what_is_in_flight_and_accepts_nothing(threaded):
    world = threaded()
    clients = [world.submit([i], greedy(50), A) for i in range(4)]
    world.engine.drain(60.0)
    assert all(isinstance(client.end, Finished) for client in clients)
    assert world.engine.stats().state is EngineState.DRAINING
    with pytest.raises(DrainingError):
        world.engine.submit(world.client([1]).request)


def test_drain_fails_what_has_not_ended_at_its_deadline(threaded):
    world = threaded(load_steps=NEVER)
    blocked = world.submit([1], GREEDY, A)
    world.engine.drain(0.05)
    assert isinstance(blocked.end.error, DrainingError)
    world.check_nothing_is_held()


def test_drain_of_an_idle_engine_returns_at_once(threaded):
    world = threaded()
    world.engine.drain(3600.0)  # longer than a test may take


@pytest.mark.parametrize("is_started", [True, False], ids=["started", "never started"])
def test_stop_fails_what_is_in_flight(is_started):
    world = World(clock=time.monotonic, max_context=10**6, num_blocks=5000, load_steps=NEVER)
    if is_started:
        world.engine.start()
    client = world.submit([1], GREEDY, A)
    world.engine.stop()
    world.engine.stop()
    assert isinstance(client.end.error, DrainingError)
    assert world.engine.stats().state is EngineState.STOPPED
    with pytest.raises(DrainingError):
        world.engine.submit(world.client([1]).request)


def test_failed_step_ends_every_request_and_the_engine():
    world = World(max_running=2, load_steps=1)
    died = []
    world.engine.on_dead = died.append
    clients = [world.submit([i], LONG, adapter) for i, adapter in enumerate([None, A, A, B, None])]
    for _ in range(4):
        world.engine.step()
    assert clients[0].tokens
    boom = RuntimeError("secret path /models/x")
    world.runner.error = boom
    world.engine.start()
    wait_for(lambda: died)
    assert died == [boom]
    for client in clients:
        assert isinstance(client.end.error, EngineDeadError)
        assert "secret" not in client.end.error.message
    assert world.engine.stats().state is EngineState.DEAD
    assert not +world.adapters.pins and not +world.adapters.active
    with pytest.raises(EngineDeadError):
        world.engine.submit(world.client([1]).request)
    world.engine.stop()


def test_failed_release_still_gives_every_request_its_end():
    world = World(clock=time.monotonic)

    def release(_):
        raise RuntimeError("registry is broken")

    world.adapters.release = release
    clients = [world.submit([i], greedy(5), A) for i in range(3)]
    world.engine.start()
    wait_for(lambda: world.engine.stats().state is EngineState.DEAD and all(client.end for client in clients))
    world.engine.stop()


def test_engine_starts_once(threaded):
    world = threaded()
    with pytest.raises(RuntimeError, match="started"):
        world.engine.start()
