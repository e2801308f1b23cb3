"""The server's own requests get the logits of their first token, and neither metrics nor other requests notice."""

import subprocess
import sys

import pytest
import torch
from lorikeet.server.engine.request import Finished, FinishReason
from lorikeet.server.engine.sampling_params import SamplingParams

from .fake_adapters import version
from .fake_world import VOCAB, World, expected_tokens, prompt_of

A, B = version("a"), version("b")
ONE = SamplingParams(temperature=0.0, max_tokens=1)


def capture(world: World, prompt: list[int], adapter=A, params=ONE) -> tuple[list[torch.Tensor], object]:
    """Submit a request with `capture`; returns the list of what it got, and its client."""
    rows: list[torch.Tensor] = []
    client = world.client(prompt, params, adapter)
    client.request.capture = rows.append
    world.engine.submit(client.request)
    return rows, client


@pytest.mark.parametrize("length", [1, 5, 16, 61])
def test_logits_are_those_that_the_first_token_comes_from(length):
    world = World(token_budget=16)  # 61 tokens take several steps
    prompt = prompt_of(length, length)
    rows, client = capture(world, prompt)
    world.run()
    assert client.end == Finished(FinishReason.LENGTH, length, 0, 1)
    [row] = rows
    assert row.shape == (VOCAB,) and row.dtype is torch.float32 and row.device.type == "cpu"
    assert [int(row.argmax())] == client.tokens == expected_tokens(A, prompt, 1)
    world.check_nothing_is_held()


def test_each_of_a_mixed_batch_gets_its_own():
    world = World()
    prompts = [prompt_of(seed, 3 + seed) for seed in range(5)]
    adapters = [A, None, B, A, B]
    captured = [capture(world, prompt, adapter) for prompt, adapter in zip(prompts, adapters, strict=True)]
    others = [world.submit(prompt, adapter=adapter) for prompt, adapter in zip(prompts, adapters, strict=True)]
    world.run()
    for (rows, _), other, prompt, adapter in zip(captured, others, prompts, adapters, strict=True):
        assert [int(row.argmax()) for row in rows] == expected_tokens(adapter, prompt, 1) == other.tokens[:1]


def test_logits_are_a_copy():
    world = World()
    returned: list[torch.Tensor] = []
    forward = world.runner.forward

    def remember(step):
        returned.append(forward(step))
        return returned[-1]

    world.runner.forward = remember
    rows, _ = capture(world, prompt_of(1, 4))
    world.run()
    before = rows[0].clone()
    returned[-1].fill_(-1.0)
    assert torch.equal(rows[0], before)


def test_ids_that_only_others_of_the_step_know_are_left_out():
    world = World()
    forward = world.runner.forward

    def wider(step):
        """As if adapters had 5 ids more than the base."""
        logits = torch.nn.functional.pad(forward(step), (0, 5), value=-torch.inf)
        slots = [item.request.slot for item in step.requests if item.samples]
        logits[torch.tensor(slots) >= 0, VOCAB:] = 0.0
        return logits

    world.runner.forward = wider
    captured = [capture(world, prompt_of(seed, 4), adapter) for seed, adapter in enumerate((None, A))]
    world.run()
    assert [len(row) for rows, _ in captured for row in rows] == [VOCAB, VOCAB + 5]


def test_a_hit_in_the_prefix_cache_changes_nothing():
    world = World()
    prompt = prompt_of(7, 13)
    first, _ = capture(world, prompt)
    world.run()
    second, client = capture(world, prompt)
    world.run()
    assert client.end.cached_tokens == 12
    assert torch.equal(first[0], second[0])


def test_only_the_first_token_is_captured_also_after_preemption():
    world = World(num_blocks=10, block_size=4)
    long = SamplingParams(temperature=0.0, max_tokens=20)
    captured = [capture(world, prompt_of(seed, 6), A, long) for seed in range(3)]
    world.run()
    assert world.engine.stats().num_preemptions > 0
    for seed, (rows, client) in enumerate(captured):
        assert len(rows) == 1 and len(client.tokens) == 20
        assert int(rows[0].argmax()) == expected_tokens(A, prompt_of(seed, 6), 1)[0]


def test_metrics_do_not_count_it():
    world = World(num_blocks=10, block_size=4)
    for seed in range(4):
        capture(world, prompt_of(seed, 6), A, SamplingParams(temperature=0.0, max_tokens=20))
    _, failing = capture(world, prompt_of(9, 6), B)
    world.adapters.fail(B)
    world.run()
    assert failing.end is not None
    assert {call[0] for call in world.observer.calls} == {"step"}
    client = world.submit(prompt_of(3, 5), adapter=A)
    world.run()
    assert len(client.tokens) == 8
    for name in ("admitted", "first_token", "finished"):
        assert [call[0] for call in world.observer.of(name)] == ["a"]


def test_capture_that_fails_harms_nobody():
    world = World()

    def fail(row):
        raise RuntimeError("no")

    client = world.client(prompt_of(1, 4), ONE, A)
    client.request.capture = fail
    world.engine.submit(client.request)
    other = world.submit(prompt_of(2, 4), adapter=A)
    world.run()
    assert client.end == Finished(FinishReason.LENGTH, 4, 0, 1)
    assert other.tokens == expected_tokens(A, prompt_of(2, 4), 8)
    world.check_nothing_is_held()


def test_request_needs_no_torch():
    program = "import sys, lorikeet.server.engine.request; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
