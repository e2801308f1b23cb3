"""`make sanitize-gpu`: some cases of every kernel test under NVIDIA's compute-sanitizer.

memcheck finds reads and writes outside of what was allocated, racecheck those in shared memory that nothing orders.
Tensors are allocated one by one meanwhile: torch's caching allocator would hide what lies beyond a tensor's end. Graphs
cannot be captured that way, so tests of graphs are left out. With $OUT it writes sanitize-gpu.json and a log a tool.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
# Cases of each test function.
SAMPLES = {"memcheck": 3, "racecheck": 1}
WITHOUT = "not graph and not captured"
FOUND = 9  # exit status of the sanitizer when it has something to say
TIMED_OUT = "not finished"


def main() -> int:
    """0 when nothing was found or nothing can be run here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", action="append", choices=SAMPLES, help="only this; may be given more than once")
    parser.add_argument("--limit-s", type=float, default=270.0, help="longest time that a tool may take [270]")
    options = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None or not torch.cuda.is_available():
        print("sanitize-gpu: skipped:", "no compute-sanitizer here" if sanitizer is None else "no CUDA device here")
        return 0
    if out := os.environ.get("OUT"):
        Path(out).mkdir(parents=True, exist_ok=True)
    results = {tool: run(sanitizer, tool, options.limit_s) for tool in options.tool or SAMPLES}
    for tool, result in results.items():
        print(f"{tool:12}{result['verdict']:16}{result['tests']:48}{result['seconds']:>8.1f} s")
    if out:
        (Path(out) / "sanitize-gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["verdict"] != "clean" for result in results.values()))


def run(sanitizer: str, tool: str, limit_s: float) -> dict[str, Any]:
    """One tool: its verdict, and the last lines of what it and pytest said."""
    tests = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=--import-mode=importlib"]
    tests += ["-p", "no:cacheprovider", "--sample", str(SAMPLES[tool]), "-k", WITHOUT, "tests/kernels"]
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no", *tests]
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        log, _ = process.communicate(timeout=limit_s)
        verdict = {0: "clean", FOUND: "errors"}.get(process.returncode, "tests failed")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the sanitizer and what it runs
        log, _ = process.communicate()
        verdict = TIMED_OUT
    if out := os.environ.get("OUT"):
        (Path(out) / f"sanitize-{tool}.log").write_text(log)
    if verdict != "clean":
        print(log[-8000:])
    counts = re.findall(r"^\d+ (?:passed|failed|skipped).*$", log, re.MULTILINE)
    return {
        "verdict": verdict,
        "tests": counts[-1] if counts else "",
        "errors": [line for line in log.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line],
        "seconds": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
