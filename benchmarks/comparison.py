"""Runs several sides on the same work, in turns, so that what the machine does meanwhile meets all of them."""

import gc
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from measurement import Run, Series
from workload import Workload

WARM_UP_TOKENS = 3

RunSide = Callable[[list[list[int]], int], Run]
"""`run(prompts, new_tokens)`."""


@dataclass(frozen=True, slots=True)
class Side:
    """One row of the comparison.

    Attributes:
        name: as printed.
        run: generates for all prompts at once.
        only: the stream counts at which it runs; None stands for all.
    """

    name: str
    run: RunSide
    only: Collection[int] | None = None

    def runs_at(self, streams: int) -> bool:
        """Whether it takes part at this stream count."""
        return self.only is None or streams in self.only


def compare(sides: Sequence[Side], workloads: Sequence[Workload], *, rounds: int, vocab_size: int) -> list[Series]:
    """Every side at every stream count, `rounds` times.

    Within a round all sides get the same prompts; no prompt is used twice by a side, so no prefix cache helps. The
    order rotates from round to round.

    Returns:
        By stream count, then in the order of `sides`; without those that do not run at a stream count.
    """
    series: list[Series] = []
    longest = max(len(side.name) for side in sides)
    for workload in workloads:
        here = [side for side in sides if side.runs_at(workload.streams)]
        of_side = {side.name: Series(side.name, workload.streams) for side in here}
        for number in range(-1, rounds):
            # Seeds differ between stream counts too: a prefix of a smaller run would be cached.
            prompts = workload.prompts(vocab_size, seed=1000 * workload.streams + number)
            turn = number % len(here)
            for side in (*here[turn:], *here[:turn]):
                gc.collect()
                if number < 0:
                    side.run(prompts, min(WARM_UP_TOKENS, workload.new_tokens))
                    continue
                run = side.run(prompts, workload.new_tokens)
                of_side[side.name].runs.append(run)
                sys.stderr.write(
                    f"  {workload.streams:>3} streams, round {number + 1}/{rounds}: {side.name:<{longest}} "
                    f"{run.tokens_per_s:8.1f} tokens/s  {run.step_ms:8.1f} ms/step\n"
                )
        series += of_side.values()
    return series


def find(series: Sequence[Series], side: str, streams: int) -> Series | None:
    """The one series of a side at a stream count; None where it did not run."""
    return next((s for s in series if s.side == side and s.streams == streams), None)
