"""Perplexities of texts with several adapters at once, over anything that scores: a server or an engine in here.

Windows of all adapters are under way together and in turns, so that the server computes them in one batch. Imports no
torch.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from tqdm import tqdm

from .perplexity import Perplexity, PerplexityMeter
from .windows import Sizes, Window, choose_sizes, cut_all

Who = TypeVar("Who", contravariant=True)

CONCURRENT = 16  # windows under way


class TextScorer(Protocol[Who]):
    """Scores windows; `score` is called on several threads."""

    @property
    def max_context(self) -> int:
        """Most tokens of a window; known after the first `encode`."""
        ...

    def encode(self, text: str, members: Who) -> list[int]:
        """Token ids of a text, as these adapters read it."""
        ...

    def score(self, token_ids: Sequence[int], first: int, members: Who) -> list[float]:
        """Log probabilities of the tokens from `first` on."""
        ...


class ScoringRun(NamedTuple):
    """Perplexities by the name of what was evaluated, and the sizes of the windows."""

    results: dict[str, Perplexity]
    sizes: Sizes


class _Work(Generic[Who]):
    """The windows of one adapter, and what they gave."""

    def __init__(self, who: Who, texts: list[list[int]], windows: list[tuple[int, Window]]) -> None:
        self.who = who
        self.texts = texts
        self.windows = windows
        self.meter = PerplexityMeter()


def perplexities(
    scorer: TextScorer[Who],
    adapters: Mapping[str, Who],
    texts: Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    least: int = 1,
    progress: bool = False,
) -> ScoringRun:
    """Score texts with every adapter.

    Args:
        scorer: has the adapters.
        adapters: what to evaluate, by what to call it.
        texts: each on its own.
        context, stride: of the windows; `choose_sizes` says what None is.
        least: tokens that are to be scored at least.
        progress: show a bar on standard error.

    Raises:
        TextTooShortError: there are fewer tokens.
        EvaluationError: sizes that are not allowed.
        Exception: what the scorer raises.
    """
    encoded = {name: [scorer.encode(text, who) for text in texts] for name, who in adapters.items()}
    sizes = choose_sizes(context, stride, scorer.max_context)
    works = {
        name: _Work(who, encoded[name], cut_all(encoded[name], *sizes, least=least)) for name, who in adapters.items()
    }
    # In turns: the first window of each adapter, then the second.
    longest = max((len(work.windows) for work in works.values()), default=0)
    order = [(work, index) for index in range(longest) for work in works.values() if index < len(work.windows)]
    total = sum(window.num_scored for work in works.values() for _, window in work.windows)
    with (
        ThreadPoolExecutor(CONCURRENT) as pool,
        tqdm(total=total, desc="Scoring", unit="token", disable=not progress) as bar,
    ):
        under_way: dict[Future[list[float]], _Work[Who]] = {}
        try:
            for work, index in order:
                number, window = work.windows[index]
                if len(under_way) == CONCURRENT:
                    _collect(under_way, bar)
                tokens = work.texts[number][window.start : window.stop]
                under_way[pool.submit(scorer.score, tokens, window.first - window.start, work.who)] = work
            while under_way:
                _collect(under_way, bar)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return ScoringRun({name: work.meter.result() for name, work in works.items()}, sizes)


def _collect(under_way: "dict[Future[list[float]], _Work[Who]]", bar: "tqdm[Any]") -> None:
    """Wait for some to end, and take what they gave."""
    done, _ = wait(under_way, return_when=FIRST_COMPLETED)
    for future in done:
        logprobs = future.result()
        under_way.pop(future).meter.add(logprobs)
        bar.update(len(logprobs))
