"""The table of the fidelity benchmark, for a terminal and as the page docs/fidelity.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from fidelity_findings import PUBLISHED, findings, shares
from fidelity_steps import ROUNDS, step_spreads
from lorikeet.server.evaluation.measured import StepTimes, Way
from lorikeet.server.evaluation.report import PathResult, rows, table

Results = Mapping[str, Mapping[Way, PathResult]]
Missing = Mapping[str, Mapping[Way, str]]

HEAD = """\
# What each way of deploying an adapter costs

<!-- Written by `make fidelity`. -->

An adapter can be served unmerged on the NF4 base, or merged into one model that is kept in 16 bit or quantized again.
For each of the demo's adapters and its held-out text, every way side by side. All text is scored token by token, each
paragraph on its own, by the log probabilities that each model gives; the ways on NF4 by Lorikeet's own engine, the
others by transformers. KL is the divergence of a way's next-token distributions from those of the unmerged adapter, in
nats. Memory is what the weights take in the types that they are stored in.

Merged AutoRound, AWQ and NF4 are made of the adapter merged onto NF4's values in 16 bit. AWQ is the algorithm of that
name (auto-round's: its search for scales, without that for clipping, then rounding to the nearest), in the layout of
that name. AutoRound learns how to round. Both are scored by the values that their files stand for, and not timed: what
reads them computes in float16, which takes a CPU minutes. `lorikeet merge --to gptq` writes AutoRound's values in
GPTQ's layout, not what the algorithm GPTQ gives, and is no way of its own here.
"""

STEPS = """\
## Decode step

One token of one sequence with the adapter {name}: all models loaded side by side, steps in turns over {rounds} rounds;
medians with the 20th and 80th percentile, ratios to the unmerged adapter round by round with smallest and largest. NF4
base and unmerged run in Lorikeet's engine, the others in transformers, whose own work for each step (Python, kernels
for any model) is part of the time: the table says what a step takes as these are run, not what merging costs. {machine}
"""


def text_table(
    results: Results, missing: Missing, steps: Mapping[str, StepTimes], unchanged: Mapping[str, float]
) -> str:
    """For a terminal."""
    parts = []
    for name, found in results.items():
        lines = [name, table([found[way] for way in Way if way in found])]
        lines += [f"{way}: missing: {why}" for way, why in missing[name].items()]
        parts.append("\n".join([*lines, *findings(found, unchanged.get(name))]))
    for name, times in steps.items():
        lines = [f"{name}: decode step in ms; over unmerged"]
        lines += [f"{way}: {cost}; {over}" for way, cost, over in _spreads(times)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def page(
    results: Results,
    missing: Missing,
    steps: Mapping[str, StepTimes],
    unchanged: Mapping[str, float],
    settings: Mapping[str, Any],
    machine: str,
    plot: str,
) -> str:
    """The page.

    Args:
        results: by adapter and way.
        missing: why others have none.
        steps: step times by adapter.
        unchanged: share of the NF4 values that are the base's after merging, by adapter.
        settings: of the run.
        machine: where it ran, in a line.
        plot: path of the picture, from the page.
    """
    parts = [HEAD, f"`{settings['command']}` on {machine}.\n", f"![perplexity and divergence by way]({plot})\n"]
    parts.append("\n".join(["## In short\n", *_in_short(results)]) + "\n")
    for name, found in results.items():
        lines = [f"## {name}\n", _markdown(rows([found[way] for way in Way if way in found]))]
        lines += [f"\nNot measured: {way}: {why}" for way, why in missing[name].items()]
        lines += ["", *(f"- {line}" for line in findings(found, unchanged.get(name)))]
        parts.append("\n".join(lines) + "\n")
    for name, times in steps.items():
        lines = [STEPS.format(name=name, rounds=ROUNDS, machine=f"Measured on {times.machine}.")]
        parts.append("\n".join([*lines, _markdown([("PATH", "STEP, MS", "/ UNMERGED"), *_spreads(times)])]) + "\n")
    return "\n".join(parts)


def _in_short(results: Results) -> list[str]:
    """What each way keeps of the gain, adapters side by side, and what is published."""
    kept = {name: shares(found) for name, found in results.items()}
    ways = [way for way in Way if any(way in found for found in kept.values())]
    body = []
    for way in ways:
        cells = [f"{found[way]:.0%}" if way in found else "-" for found in kept.values()]
        body.append((way.value, *cells, f"{PUBLISHED[way]:.2f}" if way in PUBLISHED else "-"))
    return [
        "Of the perplexity that each adapter gains on the NF4 base, each way keeps:\n",
        _markdown([("PATH", *kept, "PUBLISHED PERPLEXITY"), *body]),
    ]


def _spreads(times: StepTimes) -> list[tuple[str, str, str]]:
    """Way, milliseconds of a step, and its ratio to the unmerged adapter's."""
    return [
        (way.value, f"{cost:.1f}", "-" if over is None else f"{over:.2f}")
        for way, (cost, over) in step_spreads(times).items()
    ]


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *body = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *body))
