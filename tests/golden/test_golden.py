"""A batch that mixes eight adapters of different rank, targets and method with base rows equals PEFT on that NF4 base.

PEFT runs every request alone, without a cache, on transformers' own bitsandbytes model (peft_oracle.py).
"""

from collections.abc import Iterator

import pytest
import torch
from lorikeet.server.app import App

from ..base.paged_driver import PagedDriver
from ..devices import places
from .in_process import Call, greedy_params, serving
from .mixed_batch import NEAR_TIE, TOLERANCE, AdaptedBase, Golden, make_golden, plain_base, random_prompts


@pytest.fixture(scope="module", params=places(["llama", "qwen2", "gemma2", "phi3"], "golden"))
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Families whose projections differ: plain, with biases, with norms around, already fused."""
    return make_golden(request.param, tmp_path_factory.mktemp(request.param.family))


@pytest.fixture(scope="module")
def app(golden: Golden) -> Iterator[App]:
    """The server's parts with every adapter loaded; 16-token blocks, prompts in chunks of at most 24 tokens."""
    with serving(golden.model, golden.adapters, device=golden.device, step_tokens=24, max_running=12) as app:
        for name in golden.names:
            app.manager.load(name, None)
        yield app


def test_logits_of_a_mixed_batch_equal_peft(golden: Golden) -> None:
    names = [*golden.names, "", "", golden.names[0]]
    prompts = random_prompts(len(names), seed=1)
    for name, prompt, got in zip(names, prompts, AdaptedBase(golden).prefill(names, prompts), strict=True):
        want = golden.oracle.logits(name, prompt)
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        assert (want - golden.oracle.logits("", prompt)).abs().max() > 0.1 or not name


def test_base_rows_of_a_mixed_batch_equal_the_base_without_adapters(golden: Golden) -> None:
    prompts = random_prompts(4, seed=2)
    mixed = AdaptedBase(golden).prefill(["", "", "rslora", "adalora"], prompts)
    alone = PagedDriver(plain_base(golden), prompts).step([(i, len(prompt)) for i, prompt in enumerate(prompts)])
    for i in (0, 1):
        assert torch.equal(mixed[i], alone[i].cpu())
    for i in (2, 3):
        assert not torch.allclose(mixed[i], alone[i].cpu(), atol=0.1)


def test_greedy_tokens_of_every_mixed_request_equal_peft_alone(golden: Golden, app: App) -> None:
    order = ["", *golden.names, "", *reversed(golden.names)]
    prompts = random_prompts(len(order), seed=3)
    calls = [
        Call(app, f"{i}", name, prompt, greedy_params(10))
        for i, (name, prompt) in enumerate(zip(order, prompts, strict=True))
    ]
    for name, prompt, call in zip(order, prompts, calls, strict=True):
        answer = call.result()
        assert answer.finished is not None, answer.failed
        want, margins = golden.oracle.greedy(name, prompt, 10)
        # Beyond a near-tie the two may go different ways, so only what comes before one is compared.
        sure = next((i for i, margin in enumerate(margins) if margin < NEAR_TIE), len(want))
        assert answer.token_ids[:sure] == want[:sure], name
        assert len(answer.token_ids) == 10
