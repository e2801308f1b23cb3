"""Every format that PEFT saves answers as PEFT answers: alone, mixed with all others, in chunks, after preemption.

PEFT made the adapters on transformers' bitsandbytes NF4 model, and runs each request alone there (format_oracle.py).
"""

import pytest
from lorikeet.server.app import App

from .conftest import World
from .format_oracle import Members, random_prompts
from .format_requests import Asked, ask_together, check

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's hints for training


def submit(
    served: App, world: World, names: list[str], lengths: tuple[int, int], tokens: int, seed: int
) -> list[Asked]:
    """A request of each ("" is the base), all at once."""
    asked: list[tuple[str, Members, list[int]]] = []
    for number, name in enumerate(names, start=seed):
        members: Members = ((name, 1.0),) if name else ()
        (prompt,) = random_prompts(1, lengths, world.oracle.known_ids(members), seed=number)
        asked.append((f"{name} {number}", members, prompt))
    return ask_together(served, asked, tokens)


def test_alone(served: App, world: World) -> None:
    for number, name in enumerate(world.made):
        (call,) = submit(served, world, [name], (3, 20), tokens=4, seed=100 + number)
        check(call, world.oracle)


def test_mixed_with_all_others_and_the_base_in_chunks(served: App, world: World) -> None:
    names = ["", *world.made, "", *reversed(world.made), ""]
    calls = submit(served, world, names, (1, 60), tokens=6, seed=200)
    for call in calls:
        check(call, world.oracle)


def test_after_preemption(served: App, world: World) -> None:
    calls = submit(served, world, ["", *world.made], (30, 60), tokens=32, seed=300)
    for call in calls:
        check(call, world.oracle)
    preempted = [call.request.num_preemptions for call in calls]
    assert sum(map(bool, preempted)) >= len(calls) // 8, preempted
