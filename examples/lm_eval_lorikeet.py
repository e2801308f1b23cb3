"""lm-evaluation-harness on a running Lorikeet server: any of its tasks, with the base or any adapter.

    pip install lm-eval
    python examples/lm_eval_lorikeet.py --adapter kjv --tasks arc_easy --limit 100
    python examples/lm_eval_lorikeet.py --adapter kjv --tasks my_task --include-path folder/of/task/files

Requests of a task are sent side by side, so the server computes them in one batch, and one run of the harness for each
adapter shares that batch with the others. The server tokenizes. Where the model wants no token before a text, the first
token of a text without context is not scored: nothing comes before it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lorikeet.server.addresses import DEFAULT_ADDRESS
from lorikeet.server.client import LorikeetClient
from lorikeet.server.evaluation.windows import cut
from tqdm import tqdm

Result = TypeVar("Result")

DEFAULT_MAX_TOKENS = 256


class LorikeetLM(LM):
    """The base or an adapter of a server, as a model of the harness.

    Args:
        client: connected.
        adapter: an id, an alias or id@digest-prefix; empty: the base.
        concurrent: requests under way.
    """

    def __init__(self, client: LorikeetClient, adapter: str = "", concurrent: int = 16) -> None:
        super().__init__()
        self._client = client
        self._adapter = adapter
        self._concurrent = concurrent

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log probability of each continuation given its context, and whether greedy decoding would write it."""
        return self._each(self._continuation, requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log probability of each text, in windows where it is longer than the context."""
        return self._each(self._text, requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continuations up to the first of the given strings."""
        return self._each(self._generate, requests)

    @cached_property
    def _max_context(self) -> int:
        return self._client.tokenize("a", self._adapter).max_context

    def _continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        # Blanks at the end of the context belong to the continuation's first token, as the harness' own models have it.
        trimmed = context.rstrip()
        whole = self._tokens(context + continuation)
        # Of an empty context there is at least what comes before every text, or nothing to score the first token with.
        first = max(1, len(self._tokens(trimmed)) if trimmed else 1)
        first = min(first, len(whole) - 1)
        if len(whole) < 2:
            return 0.0, True
        cut_off = max(0, len(whole) - self._max_context)
        first = max(1, first - cut_off)
        answer = self._client.score(token_ids=whole[cut_off:], first=first, top_logprobs=1, adapter_id=self._adapter)
        is_greedy = all(each.token_id == each.top[0].token_id for each in answer.logprobs)
        return sum(each.logprob for each in answer.logprobs), is_greedy

    def _text(self, text: str) -> float:
        tokens = self._tokens(text)
        total = 0.0
        for window in cut(len(tokens), self._max_context, max(1, self._max_context // 2)):
            answer = self._client.score(
                token_ids=tokens[window.start : window.stop],
                first=window.first - window.start,
                adapter_id=self._adapter,
            )
            total += sum(each.logprob for each in answer.logprobs)
        return total

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        is_greedy = not options.get("do_sample", False)
        # Half of what fits at least is left to the context, of which the end is taken.
        max_tokens = min(int(options.get("max_gen_toks", DEFAULT_MAX_TOKENS)), self._max_context // 2)
        answer = self._client.generate(
            token_ids=self._tokens(context)[max_tokens - self._max_context :],
            adapter_id=self._adapter,
            max_tokens=max_tokens,
            temperature=0.0 if is_greedy else float(options.get("temperature", 1.0)),
            top_p=float(options.get("top_p", 1.0)),
            stop=[until] if isinstance(until, str) else list(until),
        )
        return answer.text

    def _tokens(self, text: str) -> list[int]:
        return list(self._client.tokenize(text, self._adapter).token_ids)

    def _each(self, answer: Callable[..., Result], requests: Sequence[Instance]) -> list[Result]:
        """Answers in the order of the requests."""
        with ThreadPoolExecutor(self._concurrent) as pool:
            answers = pool.map(lambda request: answer(*request.args), requests)
            return list(tqdm(answers, total=len(requests), unit="request", disable=not sys.stderr.isatty()))


def main() -> int:
    """Run the harness and print its results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--address", default=DEFAULT_ADDRESS, help="server, as host:port [%(default)s]")
    add("--adapter", default="", help="what answers: an id, an alias or id@digest-prefix [the base]")
    add("--tasks", nargs="+", required=True, help="names of tasks")
    add("--include-path", type=Path, help="folder with task files of your own")
    add("--limit", type=int, help="examples of each task at most")
    options = parser.parse_args()
    tasks = TaskManager(include_path=None if options.include_path is None else str(options.include_path))
    with LorikeetClient(options.address) as client:
        found = lm_eval.simple_evaluate(
            model=LorikeetLM(client, options.adapter), tasks=options.tasks, task_manager=tasks, limit=options.limit
        )
    sys.stdout.write(json.dumps(found["results"], indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
