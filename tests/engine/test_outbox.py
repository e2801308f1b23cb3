"""Beside a device that waits for the host, a step's events are handed over while the next step runs."""

import random

import pytest
from lorikeet.server.engine import step_loop
from lorikeet.server.engine.request import Delta, Finished

from .fake_adapters import version
from .fake_world import World, expected_tokens, greedy, prompt_of, reason_of

A = version("a")


@pytest.fixture(autouse=True)
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "_is_asynchronous", lambda logits: True)


def test_events_come_once_the_next_step_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    client = world.submit([1, 2], greedy(4))
    at_launch: list[int] = []
    forward = world.runner.forward
    monkeypatch.setattr(world.runner, "forward", lambda step: (at_launch.append(len(client.tokens)), forward(step))[1])
    seen = []
    for _ in range(4):
        assert world.engine.step()
        seen.append(len(client.tokens))
    assert at_launch == [0, 0, 1, 2]
    assert seen == [0, 1, 2, 3] and client.end is None
    assert not world.engine.step()  # nothing is launched any more
    assert client.tokens == expected_tokens(None, [1, 2], 4) and isinstance(client.end, Finished)
    world.check_nothing_is_held()


def test_everybody_gets_everything_in_order_and_one_end() -> None:
    rng = random.Random(5)
    world = World(num_blocks=12, max_running=4)
    clients = []
    for number in range(30):
        adapter = rng.choice([None, A, version("b")])
        clients.append(
            (world.submit(prompt_of(number, rng.randint(1, 9)), greedy(rng.randint(1, 9)), adapter), adapter)
        )
        for _ in range(rng.randrange(4)):
            world.engine.step()
        if number % 7 == 3:
            world.engine.abort(clients[-1][0].request.request_id)
        if number % 9 == 4:
            world.runner.oom_above = 3
            world.engine.step()
            world.runner.oom_above = None
    world.run()
    for client, adapter in clients:
        *deltas, last = client.events
        assert all(isinstance(event, Delta) for event in deltas) and not isinstance(last, Delta)
        count = len(client.tokens)
        assert client.tokens == expected_tokens(adapter, client.request.prompt_token_ids, max(count, 1))[:count]
        assert isinstance(last, Finished) or reason_of(client) in {"CANCELLED", "DEVICE_MEMORY"}
    world.check_nothing_is_held()


def test_client_that_cannot_be_reached_is_ended_and_the_others_go_on() -> None:
    world = World()
    broken, fine = world.submit([1], greedy(500), A), world.submit([1, 2], greedy(20), A)

    def emit(event: object) -> None:
        broken.events.append(event)
        raise RuntimeError("loop is closed")

    broken.request.emit = emit
    world.run()
    assert reason_of(broken) == "CANCELLED" and len(broken.tokens) <= 2
    assert fine.tokens == expected_tokens(A, [1, 2], 20)
    world.check_nothing_is_held()


def test_what_is_held_back_arrives_when_the_engine_is_stopped_or_dies() -> None:
    for die in (False, True):
        world = World()
        client = world.submit([3], greedy(50))
        for _ in range(3):
            world.engine.step()
        assert len(client.tokens) == 2
        if die:
            world.engine._die(RuntimeError("boom"))
        else:
            world.engine.stop()
        assert client.tokens == expected_tokens(None, [3], 3)
        assert reason_of(client) == ("ENGINE_DEAD" if die else "DRAINING")
