"""Where and with what a number was measured: without it the number says nothing."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ISA_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "triton")
ROOT = Path(__file__).resolve().parent.parent
# Of the load average: where nothing else runs, it falls below this within a minute or two.
QUIET_LOAD = 0.5


def describe_machine() -> dict[str, Any]:
    """Processor, device, versions, commit and date, ready for JSON. Names neither the host nor a path."""
    cpuinfo = _cpuinfo()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": cpuinfo.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": [flag for flag in ISA_FLAGS if flag in cpuinfo.get("flags", "").split()],
        # Above the number of cores, something else was running.
        "load_average": round(os.getloadavg()[0], 1),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "driver": _driver() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def warn_if_busy(machine: Mapping[str, Any], effect: str) -> None:
    """Say on stderr that something else was running, if it was.

    Args:
        machine: as described before anything was measured.
        effect: what it does to the numbers, such as "times will be longer than they are".
    """
    if machine["load_average"] > QUIET_LOAD:
        sys.stderr.write(f"The machine is busy (load {machine['load_average']}); {effect}.\n")


def one_line(machine: dict[str, Any]) -> str:
    """For a heading."""
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['isa']) or 'no AVX2'})"
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    return f"{device}; {versions}; commit {machine['commit']}; {machine['date'][:10]}"


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _driver() -> str | None:
    """Version of the first card's driver."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.partition("\n")[0].strip() or None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Short hash, with `+` when the tree has changes; `unknown` outside a git checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        # Results of earlier runs are not changes of the code.
        state = [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"]
        changes = subprocess.run(state, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
