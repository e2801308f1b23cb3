"""Decode step times of every way of deploying one adapter, models side by side and steps in turns."""

from collections.abc import Mapping
from contextlib import ExitStack

from fidelity_ways import Setup, Subject, deployed
from lorikeet.server.evaluation.errors import EvaluationError
from lorikeet.server.evaluation.local_engine import local_engine
from lorikeet.server.evaluation.measured import MeasuredTable, StepTimes, Way
from lorikeet.server.evaluation.step_times import Stepper, step_times
from measurement import Spread, ratio
from tqdm import tqdm

# Of AutoRound's, AWQ's and GPTQ's layouts the unpacked values would be timed; what is in 32 bit is for comparisons.
TIMED = (
    Way.BASE_16BIT,
    Way.BASE_NF4,
    Way.UNMERGED,
    Way.MERGED_ONTO_ORIGINAL,
    Way.MERGED_ONTO_NF4,
    Way.MERGED_NF4,
)
ROUNDS = 11
STEPS = 6


def measure_steps(subject: Subject, setup: Setup, ways: list[Way], machine: str) -> StepTimes:
    """Time all ways that can be, and keep that.

    Args:
        subject: the adapter; what is merged of it stays where it is if `setup` says so, and is taken from there.
        setup: everything else.
        ways: of these, those of TIMED.
        machine: where and when, in a line.
    """
    models: dict[Way, Stepper] = {}
    with local_engine(setup.config, [subject.adapter], context=setup.context) as engine, ExitStack() as stack:
        tokens = [engine.encode(text) for text in subject.texts]
        for way in tqdm([way for way in TIMED if way in ways], desc=f"{subject.name}: loading", unit="way"):
            try:
                models[way], _ = stack.enter_context(deployed(way, subject, setup, engine))
            except EvaluationError as error:
                tqdm.write(f"{way} is not timed: {error.message}")
        with tqdm(total=(ROUNDS + 1) * len(models), desc=f"{subject.name}: steps", unit="turn") as bar:
            seconds = step_times(models, tokens, rounds=ROUNDS, steps=STEPS, tell=bar.update)
    found = StepTimes(machine, STEPS, seconds)
    MeasuredTable(setup.config.cache_dir, subject.digest).put_steps(found)
    return found


def step_spreads(times: StepTimes) -> Mapping[Way, tuple[Spread, Spread | None]]:
    """By way: milliseconds of a step, and their ratio to the unmerged adapter's in the same rounds."""
    unmerged = times.seconds.get(Way.UNMERGED)
    return {
        way: (
            Spread.quantiles([1000 * each for each in times.seconds[way]]),
            None if unmerged is None else ratio(times.seconds[way], unmerged),
        )
        for way in TIMED
        if way in times.seconds
    }
