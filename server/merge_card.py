"""The model card of a merged model: what it was made of, how, and what was measured."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from .. import __version__
from ..adapters.card import CARD_FILE
from ..adapters.merge.targets import CALIBRATED, DENSE, Target
from .merge_plan import MergePlan

# Seen on the demo base with the adapter kjv (2026-11-23): served again in NF4, the merged model answered as the base.
_AGAIN_IN_NF4: Final = (
    "Quantized to NF4 again, which is what `lorikeet serve` does with every 16-bit model, it loses most of what the "
    "adapter adds: run it in 16 bit, or serve the adapter unmerged."
)
_QUANTIZED: Final = {
    Target.AUTOROUND: "by AutoRound, in its layout",
    Target.AWQ: "by AWQ (scales, no clipping), in its layout",
    Target.GPTQ: "by AutoRound, in GPTQ's layout",
}
# What transformers 5.23 asks for to load a layout; it loads 16-bit models by itself.
_LOADED_WITH: Final = {
    Target.AUTOROUND: "auto-round",
    Target.AWQ: "gptqmodel",
    Target.GPTQ: "gptqmodel",
    Target.NF4: "bitsandbytes",
}
_PACKAGES: Final = ("torch", "transformers", "bitsandbytes", "safetensors")


def notes(to: Target) -> list[str]:
    """What whoever has merged should know of the result."""
    if to in DENSE:
        return [_AGAIN_IN_NF4]
    return [f"To load it, transformers needs the Python package {_LOADED_WITH[to]}."]


def write_card(directory: Path, plan: MergePlan, measured: Sequence[str]) -> None:
    """Write README.md.

    Args:
        directory: the merged model's.
        plan: what was merged.
        measured: Markdown of what was compared, or empty.

    Raises:
        OSError: the disk is full, or failed.
    """
    name = plan.base.fingerprint.name
    front = [f"base_model: {name}"] if plan.base.fingerprint.certain else []
    rows = [
        f"| {_cell(member.version.adapter_id)} | `{member.version.digest}` | {member.weight:g} | "
        f"{_cell(member.origin.report.method)} |"
        for member in plan.members
    ]
    to = plan.request.to
    packages = (*_PACKAGES, "auto-round") if to in CALIBRATED else _PACKAGES
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    shown = name if plan.base.fingerprint.certain else Path(name).name
    (directory / CARD_FILE).write_text(
        "\n".join(
            [
                "---",
                *front,
                "library_name: transformers",
                "pipeline_tag: text-generation",
                "tags: [merged, lora, lorikeet]",
                "---",
                "",
                f"# {_cell(plan.request.out.name)}",
                "",
                f"{_cell(shown)} with {len(rows)} adapter{'s' if len(rows) > 1 else ''} merged into its weights by "
                f"`lorikeet merge` {__version__}.",
                "",
                "| adapter | version (SHA-256) | weight | method |",
                "|---|---|---|---|",
                *rows,
                "",
                "| | |",
                "|---|---|",
                f"| base | {_cell(shown)}, hash `{plan.base.fingerprint.sha256}` |",
                f"| merged onto | {plan.onto.onto}: {_cell(plan.onto.reason)} |",
                f"| written as | {to}{f', quantized {_QUANTIZED[to]}' if to in CALIBRATED else ''} |",
                f"| made with | {versions} |",
                "",
                "Each weight is W + s·BA, computed in float32 and rounded once.",
                *notes(to),
                "",
                *(measured or ["It was not compared with the unmerged adapter: no held-out text was given."]),
                "",
            ]
        ),
        encoding="utf-8",
    )


def _cell(text: str) -> str:
    """Text that stays in its cell, and on its line."""
    return " ".join(text.replace("|", "\\|").split())
