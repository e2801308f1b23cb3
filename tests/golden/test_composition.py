"""Several adapters in one request, and one with a strength, answer as PEFT's `cat` and scaling do, beside others."""

import pytest
from lorikeet.server.app import App

from .conftest import World
from .format_oracle import Members, random_prompts
from .format_requests import Asked, ask, ask_together, check

LOW_RANK: tuple[Members, ...] = (
    (("plain", 0.7), ("rslora", 0.3)),
    (("rslora", -0.4), ("plain", 1.0)),
    (("plain", 0.5), ("one-linear", -1.25), ("lora-head", 0.35)),
    (("one-linear", 2.0), ("lora-head", 1.0)),
    (("plain", 0.0), ("one-linear", 0.5)),
)
# Of Qwen2, for which every format is made.
MORE: tuple[Members, ...] = (
    (("patterns", 0.6), ("plain", 0.2), ("bf16", -0.5)),
    (
        ("plain", 0.5), ("rslora", -0.25), ("patterns", 0.3), ("gaussian", 0.7), ("eva", -0.9), ("pissa", 1.0),
        ("fp16", 0.2), ("lora-head", 0.1),
    ),
)  # fmt: skip
# What has no weight but 1, beside what changes other modules.
FULL: tuple[Members, ...] = (
    (("dora", 1.0), ("one-linear", 1.0)),
    (("whole-head", 1.0), ("plain", 1.0)),
    (("whole-norms", 1.0), ("one-linear", 1.0), ("lora-head", 1.0)),
    (("lora-bias", 1.0), ("one-linear", 1.0)),
    (("added-tokens", 1.0), ("plain", 1.0)),
    (("tokens", 1.0), ("plain", 1.0)),
)
STRENGTHS = (0.3, -1.0, 2.5)

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's hints for training


def sums(world: World) -> list[Members]:
    """Every sum, and every low-rank adapter with a strength."""
    low_rank = [name for name, made in world.made.items() if made.is_low_rank]
    strengths = [((name, STRENGTHS[number % 3]),) for number, name in enumerate(low_rank)]
    return [*LOW_RANK, *(MORE if "pissa" in world.made else ()), *FULL, *strengths]


def submit(served: App, world: World, wanted: list[Members], lengths: tuple[int, int], tokens: int) -> list[Asked]:
    asked = []
    for number, members in enumerate(wanted, start=len(wanted) * tokens):
        (prompt,) = random_prompts(1, lengths, world.oracle.known_ids(members), seed=number)
        asked.append((f"sum {number}", members, prompt))
    return ask_together(served, asked, tokens)


def test_sums_and_strengths_beside_plain_adapters_and_the_base(served: App, world: World) -> None:
    plain: list[Members] = [(), *(((name, 1.0),) for name in ("plain", "dora", "rslora", "whole-head"))]
    wanted = [each for members in sums(world) for each in (members, plain[len(members) % len(plain)])]
    for call in submit(served, world, wanted, (1, 50), tokens=5):
        check(call, world.oracle)


def test_sums_after_preemption(served: App, world: World) -> None:
    calls = submit(served, world, sums(world), (30, 60), tokens=32)
    for call in calls:
        check(call, world.oracle)
    preempted = [call.request.num_preemptions for call in calls]
    assert any(preempted), preempted


def test_same_prompt_with_other_weights_is_not_answered_from_their_cache(served: App, world: World) -> None:
    (prompt,) = random_prompts(1, (48, 49), world.oracle.vocab_size, seed=77)
    for weights in ((0.7, 0.3), (0.3, 0.7), (0.7, 0.3), (1.0, 1.0), (0.7, -0.3)):
        members = tuple(zip(("plain", "rslora"), weights, strict=True))
        check(ask(served, f"cached {weights}", members, prompt, tokens=3), world.oracle)
    for members in ((), (("plain", 1.0),), (("plain", 0.7),)):
        check(ask(served, f"cached {members}", members, prompt, tokens=3), world.oracle)
