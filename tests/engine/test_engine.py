"""The engine's promises one by one; its rounds are turned by hand. Those about its thread: test_engine_thread.py."""

import pytest
from lorikeet.server.engine.request import Delta, Finished, FinishReason, Phase
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.errors import (
    BadRequestError,
    CancelledError,
    DeadlineError,
    PromptTooLongError,
    QueueFullError,
)

from .fake_adapters import version
from .fake_world import GREEDY, World, expected_tokens, greedy, prompt_of, reason_of

A, B = version("a"), version("b")
LONG = SamplingParams(temperature=0.0, max_tokens=150)


def text_of(tokens: list[int]) -> str:
    return "".join(chr(97 + token) for token in tokens)


# How a request ends.


def test_max_tokens_ends_with_length_and_usage():
    world = World()
    prompt = prompt_of(1, 9)
    first = world.submit(prompt, greedy(5), A)
    world.run()
    again = world.submit(prompt, greedy(5), A)
    world.run()
    assert first.tokens == again.tokens == expected_tokens(A, prompt, 5)
    assert first.text == text_of(first.tokens)
    assert first.end == Finished(FinishReason.LENGTH, 9, 0, 5)
    assert again.end == Finished(FinishReason.LENGTH, 9, 8, 5)


def test_one_delta_per_token():
    world = World()
    client = world.submit([1, 2], greedy(4))
    world.run()
    assert [event.token_ids for event in client.events if isinstance(event, Delta)] == [(t,) for t in client.tokens]


def test_end_of_sequence_stops_without_its_text():
    tokens = expected_tokens(None, [1, 2, 3], 8)
    position = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
    world = World(eos=(tokens[position],))
    client = world.submit([1, 2, 3])
    ignoring = world.submit([1, 2, 3], greedy(8, ignore_eos=True))
    world.run()
    assert client.end == Finished(FinishReason.STOP, 3, 0, position + 1)
    assert client.tokens == tokens[: position + 1]
    assert client.text == text_of(tokens[:position])
    assert ignoring.tokens == tokens
    assert ignoring.end.reason is FinishReason.LENGTH


def test_stop_token_stops_and_is_named():
    tokens = expected_tokens(None, [1, 2, 3], 8)
    position = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
    world = World()
    client = world.submit([1, 2, 3], greedy(8, stop_token_ids=(tokens[position],)))
    world.run()
    assert client.end == Finished(FinishReason.STOP, 3, 0, position + 1, stop=tokens[position])
    assert client.text == text_of(tokens[:position])


def test_stop_string_stops_and_is_named():
    text = text_of(expected_tokens(None, [1, 2, 3], 8))
    stop = text[3:6]
    cut = text.index(stop)
    world = World()
    client = world.submit([1, 2, 3], greedy(8, stop=("#", stop)))
    kept = world.submit([1, 2, 3], greedy(8, stop=(stop,), include_stop=True))
    world.run()
    assert client.text == text[:cut]
    assert kept.text == text[: cut + 3]
    assert client.end == Finished(FinishReason.STOP, 3, 0, cut + 3, stop=stop)


def test_held_back_text_comes_with_the_last_token():
    text = text_of(expected_tokens(None, [1, 2, 3], 8))
    world = World()
    client = world.submit([1, 2, 3], greedy(8, stop=(text[6:8] + "#",)))
    world.run()
    assert client.text == text
    assert client.end.reason is FinishReason.LENGTH


def test_min_tokens_delays_every_kind_of_stop():
    tokens = expected_tokens(None, [1, 2, 3], 8)
    world = World(eos=(tokens[0],))
    params = greedy(8, min_tokens=4, stop=(text_of(tokens[1:2]),), stop_token_ids=(tokens[1],))
    client = world.submit([1, 2, 3], params)
    world.run()
    assert len(client.tokens) >= 4
    assert tokens[0] not in client.tokens[:4] and tokens[1] not in client.tokens[:4]


def test_end_of_the_context_ends_with_length():
    world = World(max_context=12)
    client = world.submit(prompt_of(1, 9), LONG)
    world.run()
    assert client.end == Finished(FinishReason.LENGTH, 9, 0, 3)


def test_end_of_the_kv_cache_ends_with_length():
    world = World(num_blocks=3, block_size=4)
    client = world.submit(prompt_of(1, 12), LONG)
    other = world.submit(prompt_of(2, 5), LONG)
    world.run()
    assert client.end == Finished(FinishReason.LENGTH, 12, 0, 1)
    assert other.end == Finished(FinishReason.LENGTH, 5, 0, 8)
    assert other.tokens == expected_tokens(None, prompt_of(2, 5), 8)


def test_abort_ends_a_running_and_a_waiting_request():
    world = World(max_running=1)
    running, waiting = world.submit([1], LONG, A), world.submit([2], LONG, B)
    for _ in range(4):
        world.engine.step()
    for client in (running, waiting):
        world.engine.abort(client.request.request_id)
    world.engine.abort("never was")
    world.engine.step()
    assert [reason_of(client) for client in (running, waiting)] == ["CANCELLED"] * 2
    assert running.tokens and not waiting.tokens
    world.engine.abort(running.request.request_id)
    world.engine.step()
    world.check_nothing_is_held()


def test_abort_before_the_first_round():
    world = World()
    client = world.submit([1])
    world.engine.abort(client.request.request_id)
    world.engine.step()
    assert isinstance(client.end.error, CancelledError)


def test_deadline_ends_a_running_and_a_waiting_request():
    world = World(max_running=1)
    clients = [world.submit([1], LONG, A, deadline=103.0), world.submit([2], LONG, B, deadline=102.0)]
    in_time = world.submit([1], greedy(1), deadline=1000.0)
    world.run()
    assert all(isinstance(client.end.error, DeadlineError) for client in clients)
    assert isinstance(in_time.end, Finished)
    world.check_nothing_is_held()


def test_deadlines_of_ended_requests_are_not_kept():
    world = World()
    for _ in range(300):
        client = world.submit([1], greedy(1), deadline=1e9)
        while not client.end:
            world.engine.step()
    assert len(world.engine._loop._deadlines._heap) <= 65


def test_dropped_version_fails_its_requests_and_its_cached_kv_is_forgotten():
    world = World(max_running=2)
    prompt = prompt_of(1, 9)
    clients = [world.submit(prompt, LONG, A), world.submit([1], LONG, B), world.submit(prompt, LONG, A)]
    for _ in range(6):
        world.engine.step()
    assert clients[0].tokens
    world.engine.on_version_dropped(*A.versions)
    world.engine.step()
    assert [reason_of(clients[i]) for i in (0, 2)] == ["ADAPTER_UNLOADED"] * 2
    assert clients[1].end is None
    world.engine.on_version_dropped(*A.versions)
    world.engine.abort(clients[1].request.request_id)
    world.engine.step()
    assert world.blocks.stats().cached == 0 or world.blocks.allocate(clients[0].request) == 0


def test_version_that_failed_to_load_fails_its_requests_only():
    world = World()
    world.adapters.fail(A)
    doomed, alive = world.submit([1], GREEDY, A), world.submit([1], GREEDY, B)
    world.run()
    assert reason_of(doomed) == "ADAPTER_UNLOADED"
    assert isinstance(alive.end, Finished)
    world.check_nothing_is_held()


def test_client_whose_emit_raises_is_ended_and_the_others_go_on():
    world = World()
    broken, fine = world.submit([1], LONG, A), world.submit([1, 2], greedy(20), A)

    def emit(event):
        broken.events.append(event)
        raise RuntimeError("loop is closed")

    broken.request.emit = emit
    world.run()
    assert reason_of(broken) == "CANCELLED"
    assert len(broken.tokens) == 1
    assert fine.tokens == expected_tokens(A, [1, 2], 20)
    world.check_nothing_is_held()


def test_logits_that_are_not_finite_fail_their_request_only():
    world = World()
    bad, good = world.submit([1, 2, 3]), world.submit([4, 5, 6])
    world.runner.nan_for = bad.request
    world.run()
    assert reason_of(bad) == "NON_FINITE_LOGITS"
    assert good.tokens == expected_tokens(None, [4, 5, 6], 8)


def test_out_of_memory_fails_the_youngest_prompt_and_the_others_are_not_disturbed():
    world = World(token_budget=32)
    old = world.submit([7, 8], greedy(12))
    world.engine.step()
    world.runner.oom_above = 12
    small, large = world.submit(prompt_of(1, 9)), world.submit(prompt_of(2, 10), GREEDY, None)
    world.run()
    assert reason_of(large) == "DEVICE_MEMORY"
    assert old.tokens == expected_tokens(None, [7, 8], 12)
    assert small.tokens == expected_tokens(None, prompt_of(1, 9), 8)
    world.check_nothing_is_held()


def test_out_of_memory_in_a_step_of_decodes_fails_the_youngest_until_it_fits():
    world = World()
    clients = [world.submit([7, 8 + i], greedy(12), adapter) for i, adapter in enumerate((A, None, B, None))]
    while not all(client.tokens for client in clients):
        world.engine.step()
    world.runner.oom_above = 2
    world.run()
    assert [reason_of(client) for client in clients[2:]] == ["DEVICE_MEMORY"] * 2
    for i, adapter in enumerate((A, None)):
        assert clients[i].tokens == expected_tokens(adapter, [7, 8 + i], 12)
    world.check_nothing_is_held()


def test_engine_outlives_running_out_of_memory_for_its_only_request():
    world = World()
    client = world.submit([1, 2], LONG)
    world.engine.step()
    world.runner.oom_above = 0
    world.run()
    assert client.tokens and reason_of(client) == "DEVICE_MEMORY"
    world.runner.oom_above = None
    after = world.submit([1, 2])
    world.run()
    assert after.tokens == expected_tokens(None, [1, 2], 8)


# What is not accepted.


def test_queue_full_is_refused_at_once_and_leaves_nothing_behind():
    world = World(max_waiting=3, max_running=2)
    accepted = [world.submit([1], LONG) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests"):
        world.engine.submit(world.client([1]).request)
    world.engine.step()  # two of them run now
    accepted += [world.submit([1], LONG) for _ in range(2)]
    with pytest.raises(QueueFullError):
        world.engine.submit(world.client([1]).request)
    world.engine.abort(accepted[2].request.request_id)
    world.engine.step()
    world.submit([1])


@pytest.mark.parametrize(
    ("prompt", "error"),
    [([], BadRequestError), ([1] * 40, PromptTooLongError), ([1] * 25, PromptTooLongError)],
    ids=["empty", "beyond the context", "beyond the KV cache"],
)
def test_prompt_that_cannot_run_is_refused(prompt, error):
    world = World(num_blocks=6, block_size=4, max_context=40)
    with pytest.raises(error):
        world.engine.submit(world.client(prompt).request)
    world.submit([1] * 24)


def test_id_of_a_live_request_is_refused():
    world = World()
    client = world.submit([1])
    twin = world.client([1])
    twin.request.request_id = client.request.request_id
    with pytest.raises(BadRequestError, match="id"):
        world.engine.submit(twin.request)
    world.clients.remove(twin)
    world.run()
    world.engine.submit(twin.request)


# What the engine tells.


def test_observer_hears_everything_once():
    world = World(num_blocks=8, block_size=4, token_budget=64)
    first = world.submit(prompt_of(1, 13), greedy(12), A)
    world.submit(prompt_of(2, 9), greedy(12))
    world.engine.step()
    world.clock.now += 0.5
    world.run()
    heard = world.observer
    assert sorted(adapter for adapter, _ in heard.of("admitted")) == ["", "a"]
    assert len(heard.of("first_token")) == 2
    assert len(heard.of("token")) == 22
    assert {(adapter, outcome, p, o) for adapter, outcome, p, _, o, _ in heard.of("finished")} == {
        ("a", "length", 13, 12),
        ("", "length", 9, 12),
    }
    assert heard.of("preempted")
    assert max(num_adapters for *_, num_adapters in heard.of("step")) == 1
    assert sum(num_tokens for _, num_tokens, *_ in heard.of("step")) >= 13 + 9 + 22
    assert first.request.first_token is not None and first.request.first_token > first.request.arrival


def test_outcome_of_a_failed_request_is_its_reason():
    world = World()
    client = world.submit([1], LONG, A)
    world.engine.abort(client.request.request_id)
    world.engine.step()
    assert world.observer.of("finished") == [("a", "cancelled", 1, 0, 0, 0.0)]


def test_stats_name_adapters_and_count_blocks():
    world = World(max_running=2, num_blocks=16)
    for adapter in (A, A, None, B, B):
        world.submit([1, 2, 3], LONG, adapter)
    for _ in range(3):
        world.engine.step()
        world.clock.now += 1.0
    world.engine.step()
    stats = world.engine.stats()
    assert (stats.running, stats.waiting) == (2, 3)
    assert sum(stats.running_by_adapter.values()) == 2
    assert sum(stats.waiting_by_adapter.values()) == 3
    assert stats.waiting_by_adapter["b"] == 2
    assert stats.blocks.total == 16 and stats.blocks.used >= 2
    for client in world.clients:
        world.engine.abort(client.request.request_id)
    world.engine.step()
    stats = world.engine.stats()
    assert (stats.running, stats.waiting, stats.blocks.used) == (0, 0, 0)
    assert not stats.running_by_adapter and not stats.waiting_by_adapter


def test_request_phase_moves_forward_to_finished():
    world = World()
    client = world.submit([1])
    assert client.request.phase is Phase.WAITING
    world.engine.step()
    assert client.request.phase is Phase.RUNNING
    world.run()
    assert client.request.phase is Phase.FINISHED
