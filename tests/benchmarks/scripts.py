"""Runs a benchmark as a user would, but for importing torch and its like, which takes longer than tiny benchmarks."""

import atexit
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SECONDS = 240


def run_script(name: str, *arguments: str | Path, hidden: Sequence[str] = ()) -> str:
    """Run a benchmark on one thread, without a network; returns what it printed.

    Args:
        name: of the file.
        arguments: its command line.
        hidden: modules that are to be as if they were not installed.
    """
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        job = {
            "argv": [str(BENCHMARKS / name), *map(str, arguments)],
            "env": {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            "out": str(out),
            "err": str(err),
            "hidden": list(hidden),
            "seconds": SECONDS,
        }
        process = _process()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        status = process.stdout.readline().strip()
        assert status == "0", f"exit status {status}: {err.read_text() if err.exists() else ''}"
        return out.read_text()


@functools.cache
def _process() -> subprocess.Popen[str]:
    """The one that is forked for each script; it ends with its input."""
    process = subprocess.Popen(
        [sys.executable, "-P", Path(__file__).with_name("script_process.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)
    return process
