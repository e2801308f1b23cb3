"""Verified, or not written: compares a merged model with the unmerged adapters before it gets its name."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ..adapters.merge.errors import MergeLossError
from ..adapters.merge.loss_rule import refuse_after, refuse_before
from ..adapters.merge.progress import Progress
from ..adapters.merge.targets import Target
from .base.loader import read_tokenizer
from .config import ServerConfig
from .errors import ConfigError
from .evaluation.comparison import LEAST_TOKENS, compare_models
from .evaluation.report import ComparisonReport
from .evaluation.windows import choose_sizes, cut_all
from .merge_plan import MergePlan

REPORT_FILE: Final = "merge_report.json"
# What transformers needs to load a quantized model; AWQ's and GPTQ's layouts are read without a package.
_READERS: Final = {Target.AUTOROUND: "auto_round", Target.NF4: "bitsandbytes"}


class MergeVerifier:
    """The `Verify` of a merge: measures, writes the report, and refuses what lost too much.

    Args:
        plan: the merge.
        config: what `lorikeet serve` would be started with for the base.
        texts: held-out, each on its own.
        accept_loss: write the model whatever it lost.
        progress: show bars on standard error.
        tell: told how far the comparison is; None: nobody is.

    Attributes:
        report: what was measured, once it was called.
        accepted: why the model would have been refused, if that was accepted.

    Raises:
        TextTooShortError: too little of the text can be scored; said before a merge takes its time.
    """

    def __init__(
        self,
        plan: MergePlan,
        config: ServerConfig,
        texts: Sequence[str],
        *,
        accept_loss: bool,
        progress: bool,
        tell: Progress | None = None,
    ) -> None:
        self.report: ComparisonReport | None = None
        self.accepted: str | None = None
        self._plan = plan
        self._config = config
        self._texts = texts
        self._accept_loss = accept_loss
        self._progress = progress
        self._tell = tell
        tokenizer = read_tokenizer(plan.base.checkpoint.directory)
        cut_all([tokenizer.encode(text) for text in texts], *choose_sizes(None, None, 2**31), least=LEAST_TOKENS)

    def __call__(self, directory: Path) -> Sequence[str]:
        """Measure a complete model.

        Returns:
            Markdown for its card.

        Raises:
            MergeLossError: it lost too much, and that is not accepted.
            EvaluationError: the text is too short, the model cannot be loaded, or an adapter's folder changed.
        """
        paired = list(zip(self._plan.request.adapters, self._plan.members, strict=True))
        report = compare_models(
            self._config,
            [(path, member.weight) for path, member in paired],
            directory,
            self._texts,
            digests=[(path, member.version.digest) for path, member in paired],
            progress=self._progress,
            tell=self._tell,
        )
        self.report = report
        to = self._plan.request.to
        ways = (report.base, report.unmerged, report.merged)
        reason = refuse_after(*(way.perplexity.value for way in ways)) or refuse_before(to)
        if reason is not None and not self._accept_loss:
            raise MergeLossError(
                f"{reason}. Nothing was written; to write it all the same, give --accept-loss.\n\n{report.table()}"
            )
        self.accepted = reason
        written = json.dumps(describe(self._plan, report, reason), indent=2)
        (directory / REPORT_FILE).write_text(written + "\n", encoding="utf-8")
        accepted = [] if reason is None else ["", f"The loss was accepted: {reason}."]
        return [
            f"Compared on held-out text of {report.merged.perplexity.tokens} tokens, computed in "
            f"{report.compute_dtype} on {report.device}; KL divergences from the unmerged adapter, in nats:",
            "",
            "```text",
            report.table(),
            "```",
            *accepted,
        ]


def describe(plan: MergePlan, report: ComparisonReport | None, accepted: str | None) -> dict[str, Any]:
    """The report as plain dicts.

    Args:
        plan: what was merged.
        report: what was measured, if anything was.
        accepted: why it would have been refused, if that was accepted.
    """
    return {
        "base": plan.base.fingerprint.name if plan.base.fingerprint.certain else "",
        "base_sha256": plan.base.fingerprint.sha256,
        "adapters": [
            {"id": member.version.adapter_id, "version": member.version.digest, "weight": member.weight}
            for member in plan.members
        ],
        "onto": plan.onto.onto.value,
        "onto_reason": plan.onto.reason,
        "to": plan.request.to.value,
        "accepted_loss": accepted,
        "comparison": None if report is None else report.to_json(),
    }


def require_reader(to: Target) -> None:
    """Raise ConfigError unless what is written as `to` could be loaded here, to be compared."""
    package = _READERS.get(to)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"To compare a model written as {to}, transformers needs the Python package {package}, which is not "
            f"installed. Install it with `pip install {package}`, or write the model without a comparison "
            "(--unverified)."
        )
