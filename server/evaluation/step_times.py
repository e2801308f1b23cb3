"""Decode step times of several models, taken in turns: what else the machine does meanwhile meets all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol, TypeVar

Name = TypeVar("Name")

# Tokens before the steps.
_PROMPT: Final = 32


class Stepper(Protocol):
    """A model that can be timed."""

    @property
    def is_timed(self) -> bool:
        """Whether its steps take as long as in use."""
        ...

    def decode_step_s(self, prompt: Sequence[int], steps: int) -> float:
        """Median seconds of a greedy decode step."""
        ...


def step_times(
    models: Mapping[Name, Stepper],
    texts: Sequence[Sequence[int]],
    *,
    rounds: int,
    steps: int,
    tell: Callable[[], object] = lambda: None,
) -> dict[Name, list[float]]:
    """Seconds of a decode step of one sequence, behind the beginning of the longest text.

    In each round every model takes `steps` steps, of which the median is kept; every other round goes backwards. A
    round before them is not kept.

    Args:
        models: all loaded; those that are not to be timed are left out.
        texts: token ids.
        rounds: how often.
        steps: of each model in each.
        tell: called when a model had its turn.

    Returns:
        A value for each round, round i of all models side by side.
    """
    prompt = list(max(texts, key=len)[:_PROMPT])
    order = [name for name, model in models.items() if model.is_timed]
    found: dict[Name, list[float]] = {name: [] for name in order}
    for number in range(rounds + 1):
        for name in order:
            seconds = models[name].decode_step_s(prompt, steps)
            if number:
                found[name].append(seconds)
            tell()
        order.reverse()
    return found
