"""`lorikeet eval`: perplexity of a text with adapters, through a running server or an engine in this process."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .cli_adapter_flags import weighted_adapter
from .cli_print import print_json_value, print_table
from .client import LorikeetClient
from .evaluation.perplexity import Perplexity
from .evaluation.remote import RemoteScorer
from .evaluation.scoring_run import ScoringRun, perplexities
from .evaluation.texts import read_texts
from .evaluation.windows import choose_sizes

BASE = "base"
_HEADER = ("ADAPTER", "PERPLEXITY", "LOSS", "±", "TOKENS", "OF BASE'S")


class Evaluated(NamedTuple):
    """What to evaluate: a name for it, and its members with their weights."""

    name: str
    members: tuple[tuple[str, float | None], ...]


def add_eval(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.description = (
        "Perplexity of a text with the base and with each adapter, computed together in mixed batches. A text longer "
        "than --context is cut into windows that begin --stride tokens apart; each token is scored once, behind at "
        "least --stride tokens of context except at the beginning of the text."
    )
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to score")
    add(
        "--adapter",
        action="append",
        default=[],
        type=evaluated,
        metavar="ID[:WEIGHT][+ID[:WEIGHT]...]",
        help="what to evaluate beside the base: an adapter, or several that answer together; with --model, folders. "
        "May be given more than once",
    )
    add("--no-base", action="store_true", help="leave the base out")
    add("--by-paragraph", action="store_true", help="paragraphs, which blank lines separate, are texts of their own")
    add("--context", type=int, metavar="N", help="tokens of a window, 2 or more [1024, or what the model takes]")
    add("--stride", type=int, metavar="N", help="tokens between windows, 1 to half the context [half the context]")
    add(
        "--model",
        metavar="MODEL",
        help="evaluate in this process, without a server: a model directory or hub id, or `demo`; other settings come "
        "from the environment or the configuration file, as for `lorikeet serve`",
    )
    add("--json", action="store_true", help="print one JSON object instead of a table")


def evaluated(text: str) -> Evaluated:
    """Members that answer together, joined with "+", which is in no id."""
    return Evaluated(text, tuple(weighted_adapter(part) for part in text.split("+")))


def evaluate_there(client: LorikeetClient, options: argparse.Namespace) -> int:
    """Evaluate on a server.

    Returns:
        The exit status.

    Raises:
        RemoteError: the server's answer.
        EvaluationError: the text, or a size that is not allowed.
    """
    adapters = {each.name: each.members for each in _chosen(options)}
    run = perplexities(
        RemoteScorer(client),
        adapters,
        read_texts(options.text, by_paragraph=options.by_paragraph),
        context=options.context,
        stride=options.stride,
        progress=sys.stderr.isatty(),
    )
    _print(run, options)
    return 0


def evaluate_here(options: argparse.Namespace) -> int:
    """Evaluate in this process.

    Returns:
        The exit status.

    Raises:
        EvaluationError: the text, an adapter folder, or a size that is not allowed.
        ConfigError, BaseModelError: the base.
        ServingError: an adapter that cannot be served.
    """
    texts = read_texts(options.text, by_paragraph=options.by_paragraph)
    choose_sizes(options.context, options.stride, 2**31)  # before the base is loaded
    chosen = {
        each.name: tuple((Path(folder), 1.0 if weight is None else weight) for folder, weight in each.members)
        for each in _chosen(options)
    }
    short = {name: _short(members) for name, members in chosen.items()}
    if len(set(short.values())) == len(short):
        chosen = {short[name]: members for name, members in chosen.items()}
    from .config_loading import load_config
    from .evaluation.local_engine import local_engine  # imports torch and transformers
    from .logs import configure_logs

    configure_logs("warning", "console")
    progress = sys.stderr.isatty()
    folders = [folder for members in chosen.values() for folder, _ in members]
    config = load_config(["--model", options.model])
    with local_engine(config, folders, context=options.context or 0, progress=progress) as engine:
        run = perplexities(engine, chosen, texts, context=options.context, stride=options.stride, progress=progress)
    _print(run, options)
    return 0


def _short(members: tuple[tuple[Path, float], ...]) -> str:
    """Names of the folders alone."""
    named = [f"{folder.resolve().name}{'' if weight == 1 else f':{weight:g}'}" for folder, weight in members]
    return "+".join(named) or BASE


def _chosen(options: argparse.Namespace) -> list[Evaluated]:
    adapters: list[Evaluated] = options.adapter
    return adapters if options.no_base and adapters else [Evaluated(BASE, ()), *adapters]


def _print(run: ScoringRun, options: argparse.Namespace) -> None:
    if options.json:
        print_json_value(
            {
                "text": str(options.text),
                "by_paragraph": options.by_paragraph,
                "context": run.sizes.context,
                "stride": run.sizes.stride,
                "results": [
                    {
                        "adapter": "" if name == BASE else name,
                        "perplexity": found.value,
                        "loss": found.loss,
                        "standard_error": found.error,
                        "tokens": found.tokens,
                    }
                    for name, found in run.results.items()
                ],
            }
        )
        return
    print_table(_HEADER, _rows(run.results), optional=["OF BASE'S"])
    sys.stdout.write(f"windows of {run.sizes.context} tokens, {run.sizes.stride} apart; loss in nats a token\n")


def _rows(results: Mapping[str, Perplexity]) -> list[tuple[str, ...]]:
    base = results.get(BASE)
    return [
        (
            name,
            f"{found.value:.3f}",
            f"{found.loss:.4f}",
            f"{found.error:.4f}",
            str(found.tokens),
            "" if base is None or found is base else f"{found.value / base.value:.1%}",
        )
        for name, found in results.items()
    ]
