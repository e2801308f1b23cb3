"""In bf16, what CUDA serves in, a mixed batch is as close to PEFT's answers in fp32 as PEFT's own in bf16 are.

Random small models amplify rounding by what their adapters amplify, so no fixed tolerance fits all: each adapter's is
what PEFT loses by the same step from fp32 to bf16, on the same device, for the same tokens.
"""

from collections.abc import Iterator

import pytest
import torch
from lorikeet.server.app import App
from torch import Tensor

from ..base.family_models import VOCAB
from ..base.paged_driver import PagedDriver
from ..devices import CPU, Place, gpu_place
from ..golden.in_process import Call, greedy_params, serving
from ..golden.mixed_batch import AdaptedBase, Golden, make_golden, plain_base, random_prompts
from ..golden.peft_oracle import Oracle

# (dtype bf16, tolerance): errors of a token's logits, over PEFT's. Both round, at other places, and PEFT keeps adapters
# in fp32; a wrong or missing delta is 10 to 100 times as far off.
MEDIAN_RATIO, WORST_RATIO = 2.0, 4.0
# Tokens that PEFT's fp32 logits hold apart by less than so many of its errors in bf16 may swap: four times what the
# difference of two of our logits may be off.
TIE = 8.0
FAMILIES = ("llama", "qwen2", "gemma2", "phi3")


@pytest.fixture(
    scope="module",
    params=[pytest.param(Place("llama", CPU), id="llama"), *(gpu_place(family, "bf16") for family in FAMILIES)],
)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return make_golden(request.param, tmp_path_factory.mktemp(request.param.family))


@pytest.fixture(scope="module")
def half(golden: Golden) -> Oracle:
    """PEFT in bf16."""
    return golden.oracle.computing_in(torch.bfloat16)


@pytest.fixture(scope="module")
def app(golden: Golden) -> Iterator[App]:
    with serving(
        golden.model, golden.adapters, device=golden.device, dtype=torch.bfloat16, step_tokens=24, max_running=12
    ) as app:
        for name in golden.names:
            app.manager.load(name, None)
        yield app


def rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


def by_token(errors: Tensor) -> Tensor:
    """Root mean square over the vocabulary: [tokens]."""
    return errors.square().mean(dim=1).sqrt()


def test_mixed_batch_is_as_close_to_fp32_as_peft_in_bf16(golden: Golden, half: Oracle) -> None:
    names = [*golden.names, ""]
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(3, VOCAB, (len(names), 40), generator=generator).tolist()
    found = AdaptedBase(golden, torch.bfloat16).prefill(names, prompts)
    for name, prompt, got in zip(names, prompts, found, strict=True):
        want = golden.oracle.logits(name, prompt)
        ours, theirs = by_token(got - want), by_token(half.logits(name, prompt) - want)
        assert ours.median() <= MEDIAN_RATIO * theirs.median(), name
        assert ours.max() <= WORST_RATIO * theirs.max(), name
        assert theirs.median() < 0.1 * rms(want), f"{name}: bf16 is too coarse here to compare anything"


def test_base_rows_of_a_mixed_batch_equal_the_base_without_adapters(golden: Golden) -> None:
    prompts = random_prompts(4, seed=6)
    mixed = AdaptedBase(golden, torch.bfloat16).prefill(["", "", "rslora", "adalora"], prompts)
    base = plain_base(golden, torch.bfloat16)
    alone = PagedDriver(base, prompts).step([(i, len(prompt)) for i, prompt in enumerate(prompts)])
    for i in (0, 1):
        assert torch.equal(mixed[i], alone[i].cpu())
    for i in (2, 3):
        assert rms(mixed[i] - alone[i].cpu()) > 0.1


def test_greedy_tokens_are_those_of_peft_in_fp32_or_nearly_tie_with_them(
    golden: Golden, half: Oracle, app: App
) -> None:
    order = ["", *golden.names, ""]
    prompts = random_prompts(len(order), seed=7)
    calls = [
        Call(app, f"{i}", name, prompt, greedy_params(12))
        for i, (name, prompt) in enumerate(zip(order, prompts, strict=True))
    ]
    for name, prompt, call in zip(order, prompts, calls, strict=True):
        answer = call.result()
        assert answer.finished is not None, answer.failed
        read = prompt + answer.token_ids[:-1]
        want = golden.oracle.logits(name, read)[len(prompt) - 1 :]
        tie = TIE * rms(half.logits(name, read)[len(prompt) - 1 :] - want)
        behind = want.amax(dim=1) - want.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert behind.max() < tie, f"{name}: PEFT prefers another token by {behind.max():.3f}, a tie is {tie:.3f}"
        assert tie < 1.0 or name == "plain-all", name  # or it says nothing
