"""One run of one side, and what several runs say together."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Run:
    """One run: all streams from submission to their last token.

    Attributes:
        wall_s: seconds of the whole run, prefill included.
        cpu_s: processor seconds of all threads meanwhile; on a shared machine they say more than `wall_s`.
        output_tokens: tokens generated over all streams.
        steps_s: seconds of each decode step in which every stream got a token.
        tokens: generated token ids by stream, to compare sides with.
    """

    wall_s: float
    cpu_s: float
    output_tokens: int
    steps_s: list[float]
    tokens: list[list[int]] = field(default_factory=list, repr=False)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second, prefill included."""
        return self.output_tokens / self.wall_s

    @property
    def cpu_ms_per_token(self) -> float:
        """Processor milliseconds of all threads for each generated token, prefill included."""
        return 1000 * self.cpu_s / self.output_tokens

    @property
    def step_ms(self) -> float:
        """Median milliseconds of a decode step."""
        return 1000 * statistics.median(self.steps_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens a second of the median decode step, prefill apart: each stream gets one in a step."""
        return 1000 * len(self.tokens) / self.step_ms


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the range around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median, smallest and largest."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def quantiles(cls, values: Sequence[float]) -> "Spread":
        """Median, 20th and 80th percentile."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5])

    def __format__(self, spec: str) -> str:
        """`median (low..high)`, each in the given format."""
        return f"{self.median:{spec}} ({self.low:{spec}}..{self.high:{spec}})"


@dataclass(slots=True)
class Series:
    """All runs of one side at one stream count.

    Attributes:
        side: what ran.
        streams: at the same time.
        runs: one for each round.
    """

    side: str
    streams: int
    runs: list[Run] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> Spread:
        """Over the rounds."""
        return Spread.of([run.tokens_per_s for run in self.runs])

    @property
    def decode_tokens_per_s(self) -> Spread:
        """Over the rounds."""
        return Spread.of([run.decode_tokens_per_s for run in self.runs])

    @property
    def cpu_ms_per_token(self) -> Spread:
        """Over the rounds."""
        return Spread.of([run.cpu_ms_per_token for run in self.runs])

    @property
    def step_ms(self) -> Spread:
        """Over every decode step of every round: median, 20th and 80th percentile."""
        return Spread.quantiles([1000 * s for run in self.runs for s in run.steps_s])


def ratio(one: Sequence[float], other: Sequence[float]) -> Spread:
    """`one / other` round by round: rounds are interleaved, so what the machine did meanwhile cancels out."""
    return Spread.of([a / b for a, b in zip(one, other, strict=True)])


def agreement(one: Run, other: Run, first: int) -> float:
    """Share of streams whose first tokens are the same on both sides: a check that both do the same work."""
    same = [a[:first] == b[:first] for a, b in zip(one.tokens, other.tokens, strict=True)]
    return sum(same) / len(same)
