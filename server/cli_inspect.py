"""`lorikeet adapters inspect DIR`: what a folder holds and whether a server would take it, without a server."""

import sys
from pathlib import Path

from ..adapters.inspection import inspect_directory


def inspect(directory: Path) -> int:
    """Print what was found.

    Returns:
        0 if the files are in order, 2 if a server would refuse them.
    """
    found = inspect_directory(directory, None)
    lines = {
        "folder": str(directory),
        "version": found.digest,
        "tensors": str(found.num_tensors) if found.num_tensors else "",
        "weights": f"{found.weights_bytes / 2**20:.1f} MiB" if found.weights_bytes else "",
    }
    if found.report is not None:
        lines |= {
            "method": found.report.method,
            "trained for": found.report.trained_for,
            "modules": f"{found.report.num_modules}, of rank {found.report.max_rank} at most",
        }
        for module, scaling in found.report.slices.items():
            lines[f"  {module}"] = f"rank {scaling.rank}, scaling {scaling.factor:g}"
    for name, value in lines.items():
        if value:
            sys.stdout.write(f"{name:<14} {value}\n")
    if found.problem is not None:
        sys.stdout.flush()
        sys.stderr.write(f"lorikeet: a server would refuse it ({found.problem.reason}): {found.problem.message}\n")
        return 2
    sys.stdout.write("The files are in order. Names and shapes are compared with the base when a server loads them.\n")
    return 0
