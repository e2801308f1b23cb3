"""`lorikeet merge`: writes a base with adapters merged into it as one model."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from ..adapters.merge.errors import MergeLossError
from ..adapters.merge.loss_rule import refuse_before
from ..adapters.merge.targets import Onto, Target

# Of --to, what its words alone do not say.
_FORMS: Final = "awq is the algorithm of that name in its layout, gptq AutoRound's values in GPTQ's layout"


def add_merge(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument
    add("--model", required=True, metavar="BASE", help="Hugging Face directory or hub id of the base, or `demo`")
    add(
        "--adapter",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="an adapter's folder; given more than once, their sum is merged",
    )
    add(
        "--weight",
        action="append",
        default=[],
        type=float,
        metavar="W",
        help="what an adapter's effect is multiplied by; one for each --adapter, in the same order [1]",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="the model's directory; must not be there yet")
    add_merge_rules(parser)


def add_merge_rules(parser: argparse.ArgumentParser) -> None:
    """The flags that a merge has here and on a server."""
    add = parser.add_argument
    add(
        "--onto",
        choices=list(Onto),
        help="the weights that adapters are added to: the 16-bit ones, or the values of the NF4 ones, on which QLoRA "
        "adapters are trained and which a server holds [what the adapters' files say, else nf4]",
    )
    add(
        "--to", choices=list(Target), default=Target.BF16, help=f"what the result is written as: {_FORMS} [%(default)s]"
    )
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text for autoround, awq and gptq, at least 2,048 tokens, best of what the adapter was trained on "
        "[calibration.txt in the adapter's folder]",
    )
    add("--iterations", type=int, default=20, metavar="N", help="of autoround and gptq, 1 to 1000 [%(default)s]")
    verified = parser.add_mutually_exclusive_group(required=True)
    verified.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="held-out text of the kind that the adapter was trained on: base, unmerged and merged are compared on "
        "it, and what gives up more than half of the gain is not written [none]",
    )
    verified.add_argument("--unverified", action="store_true", help="write the model without comparing it")
    add(
        "--by-paragraph",
        action="store_true",
        help="paragraphs of the text, between blank lines, are texts of their own",
    )
    add("--accept-loss", action="store_true", help="write the model even if it gives up what the adapter has learnt")
    add("--allow-other-base", action="store_true", help="merge adapters that name another base, if their shapes fit")


def merge(options: argparse.Namespace) -> int:
    """Merge.

    Args:
        options: parsed flags of `add_merge`.

    Returns:
        The exit status.

    Raises:
        ServingError: what was asked for cannot be done; nothing is left behind.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    to = Target(options.to)
    lossy = refuse_before(to)
    if lossy is not None and not options.accept_loss:
        raise MergeLossError(f"{lossy}. To do it all the same, give --accept-loss.")
    # They import torch and transformers, or protobuf.
    from .base.demo import TqdmProgress
    from .cli_print import mebibytes
    from .config_loading import load_config
    from .errors import ConfigError
    from .evaluation.texts import read_texts
    from .logs import configure_logs
    from .merge_card import notes
    from .merge_job import merge as run
    from .merge_plan import MergeRequest, plan_merge
    from .merge_report import MergeVerifier, require_reader

    configure_logs("warning", "console")
    texts = []
    if options.text is not None:
        texts = read_texts(options.text, by_paragraph=options.by_paragraph)
        require_reader(to)
    if not 1 <= options.iterations <= 1000:
        raise ConfigError(f"--iterations is {options.iterations}; allowed: 1 to 1000.")
    plan = plan_merge(
        MergeRequest(
            model=options.model,
            adapters=tuple(options.adapter),
            weights=tuple(options.weight),
            onto=None if options.onto is None else Onto(options.onto),
            to=to,
            out=options.out,
            allow_other_base=options.allow_other_base,
            calibration=options.calibration,
            iterations=options.iterations,
        )
    )
    for warning in plan.warnings:
        sys.stderr.write(f"lorikeet: warning: {warning}\n")
    sys.stderr.write(f"merging onto {plan.onto.onto}: {plan.onto.reason}\n")
    if plan.calibration is not None and options.calibration is None:
        carried = " and ".join(f"{path.parent.name}/{path.name}" for path in plan.calibration.files)
        sys.stderr.write(f"calibrating on {carried}, which the adapter carries\n")
    config = load_config(["--model", options.model])
    config = config.model_copy(update={"adapter_allow_other_base": options.allow_other_base})
    progress = sys.stderr.isatty()
    verifier = MergeVerifier(plan, config, texts, accept_loss=options.accept_loss, progress=progress) if texts else None
    bars = TqdmProgress()

    def verify(directory: Path) -> Sequence[str]:
        bars.close()
        return () if verifier is None else verifier(directory)

    try:
        result = run(plan, bars, lambda: False, verify)
    finally:
        bars.close()
    if verifier is not None and verifier.report is not None:
        sys.stdout.write(f"{verifier.report.table()}\n\n")
    sys.stdout.write(f"wrote {result.out} ({mebibytes(result.weight_bytes)} of weights) in {result.seconds:.1f} s\n")
    for note in notes(to):
        sys.stderr.write(f"note: {note}\n")
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Let a termination clean up as an interruption from the keyboard does."""
    raise KeyboardInterrupt
