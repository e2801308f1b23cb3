"""The command-line options that most benchmarks have, said once."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

_COMMON: Mapping[str, Mapping[str, Any]] = {
    "threads": {"type": int, "default": len(os.sched_getaffinity(0)), "help": "CPU threads [one for each core]"},
    "device": {"default": "auto", "help": "auto, cpu, cuda or cuda:N [auto]"},
    "model": {"type": Path, "help": "another base model's directory [the demo base]"},
    "out": {"type": Path, "default": RESULTS, "help": "folder for JSON and plot [benchmarks/results]"},
    "quick": {"action": "store_true", "help": "small sizes for everything: does it run?"},
}


def parser_of(description: str | None, *common: str) -> argparse.ArgumentParser:
    """A parser that has options already.

    Args:
        description: the script's docstring, shown as it is.
        common: which of threads, device, model, out and quick.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in common:
        parser.add_argument(f"--{name}", **_COMMON[name])
    return parser


def parse_or_quick(parser: argparse.ArgumentParser, quick: Mapping[str, Any]) -> argparse.Namespace:
    """The options; with `--quick` these defaults hold, and what is given beside it still counts."""
    if parser.parse_args().quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


def base_of(options: argparse.Namespace) -> str:
    """The base in words, for a result's settings."""
    return "demo (SmolLM2-135M-Instruct), NF4, double quantization" if options.model is None else "--model"
