"""Starts a benchmark as a user would."""

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run_script(name: str, *arguments: str | Path) -> str:
    """Run a benchmark on one thread, without a network; returns what it printed."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / name, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
